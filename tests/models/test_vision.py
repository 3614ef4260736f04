"""Models of text and images against transformers: images of odd sizes, clips, text between them, over 1, 2 and 4 ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB, relative_error
from models.test_quantized import CPU, fake_quantize
from models.test_qwen3_vl import qwen3_vl, qwen3_vl_moe
from ranks import run_ranks
from torch import Tensor
from transformers import PreTrainedModel

from octavo import batch, ops
from octavo.distributed import TensorParallel
from octavo.engine.vocabulary import Vocabulary
from octavo.kvcache import KVCache, Layout
from octavo.layers.vision import Grid
from octavo.models import architecture, read_config
from octavo.models.qwen3_vl import ImageInput, positions
from octavo.quant import BF16, FP8_PER_CHANNEL, QuantRules, Scheme
from octavo.weights import Loader, SafetensorsSource, load

MERGE = 2
IMAGES = [Grid(1, 4, 6), Grid(1, 2, 8), Grid(1, 6, 2)]  # each frame of a clip is one: its rows and columns start anew
TEXT = [[10, 11, 12], [13, 252], [14], [15, 16, 17, 18]]
MODELS = {"dense": lambda: qwen3_vl(), "experts": lambda: qwen3_vl_moe()}


def prompt() -> tuple[list[int], Tensor, Tensor]:
    """Token ids, which of them are of images, and patches."""
    ids = list(TEXT[0])
    for grid, text in zip(IMAGES, TEXT[1:], strict=True):
        ids += [250] * (grid.patches // MERGE**2) + text
    patches = torch.randn(sum(g.patches for g in IMAGES), 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    return ids, torch.tensor([[int(i == 250) for i in ids]]), patches


def reference(model: PreTrainedModel) -> Tensor:
    ids, kinds, patches = prompt()
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([ids]), pixel_values=patches, image_grid_thw=torch.tensor(IMAGES), mm_token_type_ids=kinds
        ).logits[0]


def octavo_logits(path: Path, tp: TensorParallel, scheme: Scheme = BF16, parts: tuple[int, ...] = ()) -> Tensor:
    """Of every position, computed in parts of the given lengths, which may cut images."""
    ops.bind(CPU)
    config = read_config(path)
    arch = architecture(config)
    model = arch.Model(arch.Config.from_json(config), tp, 512, vision=True)
    load(model, Loader(SafetensorsSource(path), CPU, QuantRules(scheme), torch.float32, tp), model.ignored)
    cache = KVCache(model.kv_specs("auto", torch.float32, CPU.fp8_dtype, Layout.on(True)), 40, 4, CPU.device)
    model.bind_cache(cache.views)
    ids, _, patches = prompt()
    found, start = [], 0
    with torch.inference_mode():
        features = model.encode(patches, IMAGES)
        where, delta = positions(ids, IMAGES, model.config)
        for length in parts or (len(ids),):
            stop = start + length
            images = slice(ids[:start].count(250), ids[:stop].count(250))
            built = batch.build([batch.Span(ids[start:stop], start, list(range(1, 20)), 0)], 4, CPU.device)
            given: Any = ImageInput(features[images], where[:, start:stop])
            if start > max(i for i, token in enumerate(ids) if token == 250):  # as decode steps go: no images, moved rows
                built, given = batch.build([batch.Span(ids[start:stop], start, list(range(1, 20)), delta)], 4, CPU.device), None
            found.append(model.logits(model(built, model.embed(built.input_ids, given))))
            start = stop
        return Vocabulary(VOCAB, tp).whole(torch.cat(found))


@pytest.mark.parametrize("name", MODELS)
def test_logits_with_images_equal_transformers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    expected = reference(model)
    for ranks in (1, 2, 4):
        for parts in ((), (5, 7, 1, 6, 2, 3, 1, 1)):
            for out in run_ranks(ranks, lambda tp, parts=parts: octavo_logits(tmp_path, tp, parts=parts)):  # type: ignore[misc]
                assert relative_error(out, expected) < 1e-4, (ranks, parts)


def test_the_tower_in_fp8_is_what_float64_makes_of_it(tmp_path: Path) -> None:
    """All of its products too; its inner dimension, 36, is no multiple of 16 on any number of ranks."""
    torch.manual_seed(0)
    model = qwen3_vl()
    model.save_pretrained(tmp_path)
    dense = reference(model)
    fake_quantize(model, "ptpc_fp8", but=("lm_head",))
    expected = reference(model)
    (out,) = run_ranks(1, lambda tp: octavo_logits(tmp_path, tp, FP8_PER_CHANNEL))
    assert relative_error(out, expected) < 0.02
    assert relative_error(expected, dense) > 0.05
