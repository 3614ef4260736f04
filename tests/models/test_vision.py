"""Models of text and images against transformers: images of odd sizes, clips, text between them, over 1, 2, 4 and 8 ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import cases
from conftest import VOCAB, relative_error
from models import test_kimi, test_qwen3_vl
from models.test_kimi import TOWER as KIMI
from models.test_kimi import kimi, write
from models.test_moe_quantized import FakeExperts
from models.test_quantized import CPU, fake_quantize
from models.test_qwen3_vl import TOWER as QWEN
from models.test_qwen3_vl import qwen3_vl, qwen3_vl_moe
from ranks import run_ranks
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from octavo import batch, ops
from octavo.distributed import TensorParallel
from octavo.engine.vocabulary import Vocabulary
from octavo.errors import OctavoError
from octavo.images import Grid
from octavo.kvcache import KVCache, Layout
from octavo.layers.vision import FusedQKVLinear, ImageInput, VisionMLP
from octavo.models import architecture, read_config
from octavo.quant import BF16, FP8_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, QTensor, QuantRules, Scheme, quantize
from octavo.weights import Loader, SafetensorsSource, load

IMAGE = 250  # the token in whose places features go
TEXT = [[10, 11, 12], [13, 252], [14], [15, 16, 17, 18]]


class Case(NamedTuple):
    """grids: in patches, of the images between TEXT. patch: values of one."""

    make: Callable[[], PreTrainedModel]
    grids: list[Grid]
    patch: tuple[int, ...]
    ranks: tuple[int, ...] = (1, 2, 4)

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
# A rank of 8 has one head and 5 of the MLP's inner dimensions.
QWEN_8, KIMI_8 = (
    tower | {name: 8, "intermediate_size": 40} for tower, name in ((QWEN, "num_heads"), (KIMI, "num_attention_heads"))
)
TEXT_8 = dict(num_attention_heads=8)
CASES = {
    "qwen3_vl": Case(lambda: qwen3_vl(), ODD, (3 * 2 * 4 * 4,)),
    "qwen3_vl_moe": Case(lambda: qwen3_vl_moe(), ODD, (3 * 2 * 4 * 4,)),
    "kimi_k25": Case(lambda: kimi(), ODD, (3, 14, 14)),
    "qwen3_vl, 8 heads": Case(lambda: qwen3_vl(QWEN_8, **TEXT_8), ODD, (3 * 2 * 4 * 4,), (2, 4, 8)),
    "kimi_k25, 8 heads": Case(lambda: kimi(KIMI_8, **TEXT_8 | dict(num_key_value_heads=8)), ODD, (3, 14, 14), (2, 4, 8)),
}


def saved(name: str, path: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    model = CASES[name].make()
    if name.startswith("kimi_k25"):
        write(path, model, int4=False)
    else:
        model.save_pretrained(path)
    return model


def reference(name: str, model: PreTrainedModel) -> Tensor:
    ids, patches = CASES[name].prompt()
    given = {} if name.startswith("kimi_k25") else {"mm_token_type_ids": torch.tensor([[int(token == IMAGE) for token in ids]])}
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
    for ranks in CASES[name].ranks:
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
    """All of its products too; its inner dimension, 36, is no multiple of 16."""
    model = saved(name, tmp_path)
    dense = reference(name, model)
    fake_quantize(model, "ptpc_fp8", but=("lm_head", "kv_b_proj", "experts"))
    for layer in model.model.language_model.layers if name == "kimi_k25" else ():
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = FakeExperts(layer.mlp.experts, "ptpc_fp8")
    expected = reference(name, model)
    (out,) = run_ranks(1, lambda tp: octavo_logits(name, tmp_path, tp, FP8_PER_CHANNEL))
    assert relative_error(out, expected) < 1e-4
    assert relative_error(expected, dense) > 0.05


@pytest.mark.parametrize("name", ["qwen3_vl, 8 heads", "kimi_k25, 8 heads"])
@cases("scheme", [FP8_PER_TENSOR, FP8_PER_CHANNEL, FP8_BLOCK], ids=lambda s: s.name)
def test_a_sharded_tower_in_fp8_errs_as_a_whole_one_does(scheme: Scheme, name: str, tmp_path: Path) -> None:
    """Ranks have the same codes, and scales of their own for what they read, so the error is as large and another."""
    saved(name, tmp_path)
    (_, patches), grids = CASES[name].prompt(), CASES[name].grids

    def features(ranks: int, scheme: Scheme) -> list[Tensor]:
        with torch.inference_mode():
            return run_ranks(ranks, lambda tp: loaded(tmp_path, tp, scheme).encode(patches, grids))

    (dense,), (whole,) = features(1, BF16), features(1, scheme)
    error = relative_error(whole, dense)
    assert 0.01 < error < 0.2
    for ranks in CASES[name].ranks:
        first, *others = features(ranks, scheme)
        assert 0.01 < relative_error(first, dense) < 1.4 * error, ranks
        assert all(torch.equal(first, other) for other in others)


@cases("stored", [False, True], ids=["in BF16", "in codes"])
@cases("scheme", [FP8_PER_TENSOR, FP8_PER_CHANNEL, FP8_BLOCK], ids=lambda s: s.name)
def test_a_matrix_of_queries_keys_and_values_has_the_same_codes_on_any_number_of_ranks(
    scheme: Scheme, stored: bool, tmp_path: Path
) -> None:
    """Its scales are the whole matrix's, in the file and while loading; whole, it may have tiles over two of the three."""
    w = torch.randn(192, 64, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.1, 3, 192)[:, None]
    whole = quantize(w.bfloat16(), scheme)
    assert whole.scale is not None
    kept = whole.scale[:1, 0] if scheme is FP8_PER_TENSOR else whole.scale
    save_file(
        {"qkv.weight": whole.data, "qkv.weight_scale": kept} if stored else {"qkv.weight": w.bfloat16()},
        tmp_path / "model.safetensors",
    )

    def part(tp: TensorParallel) -> QTensor:
        layer = FusedQKVLinear("qkv", 64, 4, tp)
        loader = Loader(SafetensorsSource(tmp_path), CPU, QuantRules(), torch.float32, tp)
        return loader.stacked(layer.names, layer.shapes, layer.shards, scheme)

    for ranks in (1,) if scheme is FP8_BLOCK else (1, 2, 4):
        for rank, found in enumerate(run_ranks(ranks, part)):
            rows = torch.arange(192).view(3, ranks, -1)[:, rank].flatten() if scheme is not FP8_BLOCK else slice(None)
            assert torch.equal(found.data.view(torch.uint8), whole.data.view(torch.uint8)[rows])
            assert found.scale is not None
            assert torch.equal(found.scale, whole.scale if scheme is FP8_BLOCK else whole.scale[rows])


class Held(nn.Module):
    """A tower's MLP at published sizes, whose inner dimension is 4,304 in Qwen3-VL and in Kimi-K2.5."""

    def __init__(self, tp: TensorParallel):
        super().__init__()
        self.mlp = VisionMLP("fc1", "fc2", (1152, 4304, 1152), "tanh", tp)


def float64_mlp(tensors: dict[str, Tensor], x: Tensor, ranks: int, *, fp8: bool) -> Tensor:
    """The MLP in float64; fp8: weights in a scale a row, and what each of the ranks multiplies in a scale a token."""

    def codes(values: Tensor) -> Tensor:
        return quantized(values) if fp8 else values

    up, down = (codes(tensors[f"mlp.fc{n}.weight"].double()) for n in (1, 2))
    inner = F.gelu(codes(x.double()) @ up.mT + tensors["mlp.fc1.bias"].double(), approximate="tanh")
    units = inner.shape[1] // 16  # of which each rank has as many as another, or one more
    sizes = [16 * (units // ranks + (rank < units % ranks)) for rank in range(ranks)]
    parts = [codes(part) @ w.mT for part, w in zip(inner.split(sizes, 1), down.split(sizes, 1), strict=True)]
    return torch.stack(parts).sum(0) + tensors["mlp.fc2.bias"].double()


def quantized(values: Tensor) -> Tensor:
    """e4m3fn with a scale a row, in float64."""
    scale = values.abs().amax(1, keepdim=True) / 448
    return (values / scale).to(torch.float8_e4m3fn).double() * scale


def test_what_is_not_divisible_by_16(tmp_path: Path) -> None:
    """`mat2 shape (1152x538) must be divisible by 16`: torch's library refuses each of these splits, and Octavo computes it.

    On the meta device the library has other words for the same check.
    """
    torch.manual_seed(0)
    shapes = {"fc1.weight": (4304, 1152), "fc1.bias": (4304,), "fc2.weight": (1152, 4304), "fc2.bias": (1152,)}
    tensors = {f"mlp.{name}": torch.randn(shape).div(30).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    x = torch.randn(70, 1152)

    def scaled_mm(m: int, k: int, n: int) -> Tensor:
        a, b = (torch.empty(shape, device="meta").to(torch.float8_e4m3fn) for shape in ((m, k), (n, k)))
        one = torch.ones((), device="meta")
        return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    packed: list[torch.Size] = []

    class Watched(Loader):
        def pack(self, q: QTensor, *, row_lookup: bool = False) -> ops.PackedWeight:
            packed.append(q.data.shape)
            return super().pack(q, row_lookup=row_lookup)

    def octavo(tp: TensorParallel) -> Tensor:
        ops.bind(CPU)
        held = Held(tp)
        load(held, Watched(SafetensorsSource(tmp_path), CPU, QuantRules(FP8_PER_CHANNEL), torch.float32, tp))
        return held.mlp(x)  # type: ignore[no-any-return]

    dense = float64_mlp(tensors, x, 1, fp8=False)
    for ranks in (1, 2, 4, 8):
        inner = 4304 // ranks
        if ranks == 1:
            assert scaled_mm(70, 1152, inner).shape == (70, inner)
        else:
            with pytest.raises(RuntimeError, match=rf"mat2 .*divisible by 16.*1152, {inner}"):
                scaled_mm(70, 1152, inner)
            with pytest.raises(RuntimeError, match=rf"divisible by 16.*{inner}"):
                scaled_mm(70, inner, 1152)
        expected = float64_mlp(tensors, x, ranks, fp8=True)
        for out in run_ranks(ranks, octavo):
            assert relative_error(out, expected) < 0.01, ranks  # a rounding of FP32 sums turns some codes into their neighbours
        assert 0.03 < relative_error(expected, dense) < 0.08
        taken = [scaled_mm(70, k, n).shape[1] for n, k in packed]  # the library takes what Octavo packs
        assert sum(taken) == 4304 + 1152 * ranks, "parts of 16 rows each, none of them padded"
        packed.clear()
