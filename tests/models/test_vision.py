"""Models of text and images against transformers: images of odd sizes, clips, text between them, over 1, 2 and 4 ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import cases
from conftest import VOCAB, relative_error
from models import test_kimi, test_qwen3_vl
from models.test_kimi import kimi, write
from models.test_moe_quantized import FakeExperts
from models.test_quantized import CPU, fake_quantize
from models.test_qwen3_vl import qwen3_vl, qwen3_vl_moe
from ranks import run_ranks
from torch import Tensor
from transformers import PreTrainedModel

from octavo import batch, ops
from octavo.distributed import TensorParallel
from octavo.engine.vocabulary import Vocabulary
from octavo.errors import OctavoError
from octavo.images import Grid
from octavo.kvcache import KVCache, Layout
from octavo.layers.vision import ImageInput
from octavo.models import architecture, read_config
from octavo.quant import BF16, FP8_PER_CHANNEL, QuantRules, Scheme
from octavo.weights import Loader, SafetensorsSource, load

IMAGE = 250  # the token in whose places features go
TEXT = [[10, 11, 12], [13, 252], [14], [15, 16, 17, 18]]


class Case(NamedTuple):
    """grids: in patches, of the images between TEXT. patch: values of one. per_token: patches of one."""

    make: Callable[[], PreTrainedModel]
    grids: list[Grid]
    patch: tuple[int, ...]

    @property
    def counts(self) -> list[int]:
        """Tokens of each image; a clip's frames share theirs."""
        return [grid.rows * grid.columns // 4 for grid in self.grids]

    def prompt(self) -> tuple[list[int], Tensor]:
        ids = list(TEXT[0])
        for count, text in zip(self.counts, TEXT[1:], strict=True):
            ids += [IMAGE] * count + text
        values = torch.randn(sum(grid.patches for grid in self.grids), *self.patch, generator=torch.Generator().manual_seed(1))
        return ids, values


ODD = [Grid(1, 4, 6), Grid(1, 2, 8), Grid(1, 6, 2)]  # Qwen3-VL has each frame of a clip between texts of its own
CASES = {
    "qwen3_vl": Case(lambda: qwen3_vl(), ODD, (3 * 2 * 4 * 4,)),
    "qwen3_vl_moe": Case(lambda: qwen3_vl_moe(), ODD, (3 * 2 * 4 * 4,)),
    "kimi_k25": Case(lambda: kimi(), ODD, (3, 14, 14)),
}


def saved(name: str, path: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    model = CASES[name].make()
    if name == "kimi_k25":
        write(path, model, int4=False)
    else:
        model.save_pretrained(path)
    return model


def reference(name: str, model: PreTrainedModel) -> Tensor:
    ids, patches = CASES[name].prompt()
    given = {} if name == "kimi_k25" else {"mm_token_type_ids": torch.tensor([[int(token == IMAGE) for token in ids]])}
    grids = torch.tensor(CASES[name].grids)
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([ids]), pixel_values=patches, image_grid_thw=grids, **given).logits[0]
    return logits


def loaded(path: Path, tp: TensorParallel, scheme: Scheme = BF16) -> Any:
    ops.bind(CPU)
    config = read_config(path)
    arch = architecture(config)
    model = arch.Model(arch.Config.from_json(config), tp, 512, vision=True)
    load(model, Loader(SafetensorsSource(path), CPU, QuantRules(scheme), torch.float32, tp), model.ignored)
    return model


def octavo_logits(name: str, path: Path, tp: TensorParallel, scheme: Scheme = BF16, parts: tuple[int, ...] = ()) -> Tensor:
    """Of every position, computed in parts of the given lengths, which may cut images."""
    model = loaded(path, tp, scheme)
    cache = KVCache(model.kv_specs("auto", torch.float32, CPU.fp8_dtype, Layout.on(True)), 40, 4, CPU.device)
    model.bind_cache(cache.views)
    (ids, patches), grids = CASES[name].prompt(), CASES[name].grids
    last = max(place for place, token in enumerate(ids) if token == IMAGE)
    firsts = [place for place, token in enumerate(ids) if token == IMAGE and ids[place - 1] != IMAGE]
    images = list(zip(firsts, grids, strict=True))
    after = model.image_positions(images, len(ids), len(ids) + 1)
    delta = 0 if after is None else int(after[0, 0]) - len(ids)
    found, start = [], 0
    with torch.inference_mode():
        features = model.encode(patches, grids)
        for length in parts or (len(ids),):
            stop = start + length
            given = None  # behind the last image it goes as decode steps go
            if start <= last:
                part = features[ids[:start].count(IMAGE) : ids[:stop].count(IMAGE)]
                places = torch.tensor([at for at, token in enumerate(ids[start:stop]) if token == IMAGE], dtype=torch.int64)
                given = ImageInput(part, places, model.image_positions(images, start, stop))
            span = batch.Span(ids[start:stop], start, list(range(1, 20)), 0 if given else delta)
            built = batch.build([span], 4, CPU.device)
            found.append(model.logits(model(built, model.embed(built.input_ids, given))))
            start = stop
        assert start == len(ids)
        return Vocabulary(VOCAB, tp).whole(torch.cat(found))


@pytest.mark.parametrize("name", CASES)
def test_logits_with_images_equal_transformers(name: str, tmp_path: Path) -> None:
    expected = reference(name, saved(name, tmp_path))
    length = len(CASES[name].prompt()[0])
    for ranks in (1, 2, 4):
        for parts in ((), (5, 7, 1, 6, length - 21, 1, 1)):
            for out in run_ranks(ranks, lambda tp, parts=parts: octavo_logits(name, tmp_path, tp, parts=parts)):  # type: ignore[misc]
                assert relative_error(out, expected) < 1e-4, (ranks, parts)


def test_kimis_tokens_see_all_frames_of_a_clip(tmp_path: Path) -> None:
    """Features alone: transformers' class counts a clip's tokens as if its frames were not averaged, and gives no logits."""
    model, clips = saved("kimi_k25", tmp_path), [Grid(3, 4, 6), Grid(3, 2, 2)]
    patches = torch.randn(sum(clip.patches for clip in clips), 3, 14, 14, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        pooled = model.model.vision_tower(patches, grid_thw=torch.tensor(clips)).pooler_output
        expected = model.model.mm_projector(pooled).flatten(0, 1)
    for ranks in (1, 2, 4):
        for out in run_ranks(ranks, lambda tp: loaded(tmp_path, tp).encode(patches, clips)):
            assert relative_error(out, expected) < 1e-4, ranks
    ours = loaded(tmp_path, TensorParallel())
    assert len(ours.encode(torch.randn(16, 3, 14, 14), [Grid(4, 2, 2)])) == 1  # pos_emb_time is 4
    with pytest.raises(IndexError):
        model.model.vision_tower(torch.randn(20, 3, 14, 14), grid_thw=torch.tensor([[5, 2, 2]]))
    with pytest.raises(OctavoError, match="A clip of 5 frames is over the 4 that this model reads at a time"):
        ours.encode(torch.randn(20, 3, 14, 14), [Grid(5, 2, 2)])


TOWERS = {"qwen3_vl": test_qwen3_vl.TOWER, "kimi_k25": test_kimi.TOWER}
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3_vl", {"depth": None}, "config.json has no vision_config.depth, which this architecture needs."),
    ("qwen3_vl", {"hidden_size": "64"}, "config.json: vision_config.hidden_size must be of type int, not '64'."),
    ("qwen3_vl", {"num_heads": 0}, "config.json: vision_config.num_heads must be positive, not 0."),
    ("qwen3_vl", {"num_heads": 5}, "config.json: vision_config.hidden_size must be a multiple of 4 times its num_heads."),
    ("qwen3_vl", {"num_position_embeddings": 5}, "config.json: vision_config.num_position_embeddings must be a square number."),
    ("qwen3_vl", {"deepstack_visual_indexes": [99]}, "config.json: vision_config.deepstack_visual_indexes must list layers, "),
    ("kimi_k25", {"patch_size": None}, "config.json has no vision_config.patch_size, which this architecture needs."),
    ("kimi_k25", {"vt_hidden_size": "64"}, "config.json: vision_config.vt_hidden_size must be of type int, not '64'."),
    ("kimi_k25", {"pos_emb_time": 1 << 40}, "config.json: vision_config.pos_emb_time is 1099511627776, which no model has."),
    ("kimi_k25", {"merge_kernel_size": [2]}, "config.json: vision_config.merge_kernel_size must be two equal integers, not"),
    ("kimi_k25", {"num_attention_heads": 5}, "config.json: the heads of vision_config must have dimensions that are a multi"),
]


@cases(("name", "changes", "told"), WRONG)
def test_a_field_of_the_tower_is_named_with_its_place(name: str, changes: dict[str, Any], told: str) -> None:
    """The text model has fields of the same names."""
    config = TOWERS[name] | changes
    for field in changes:  # the hub's own name of it
        config.pop(field.removeprefix("vt_") if field.startswith("vt_") else "", None)
    with pytest.raises(OctavoError) as caught:
        architecture({"model_type": name}).VisionConfig.from_json(config)
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize("name", ["qwen3_vl", "kimi_k25"])
def test_the_tower_in_fp8_is_what_float64_makes_of_it(name: str, tmp_path: Path) -> None:
    """All of its products too; its inner dimension, 36, is no multiple of 16 on any number of ranks."""
    model = saved(name, tmp_path)
    dense = reference(name, model)
    fake_quantize(model, "ptpc_fp8", but=("lm_head", "kv_b_proj", "experts"))
    for layer in model.model.language_model.layers if name == "kimi_k25" else ():
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = FakeExperts(layer.mlp.experts, "ptpc_fp8")
    expected = reference(name, model)
    (out,) = run_ranks(1, lambda tp: octavo_logits(name, tmp_path, tp, FP8_PER_CHANNEL))
    assert relative_error(out, expected) < 0.02
    assert relative_error(expected, dense) > 0.05
