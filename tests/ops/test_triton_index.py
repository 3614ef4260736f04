"""Triton's ops of latents and of index keys against the reference, interpreted where there is no GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import relative_error
from ops.caches import with_padding
from ops.cases import combined, over
from ops.interpreter import HAS_GPU
from ops.latents import Scene, index_scene, latent_scene
from ops.shapes import BATCHES, INDEXERS, LATENTS

from octavo import ops
from octavo.errors import OctavoError
from octavo.ops import reference_latent
from octavo.ops.triton import index_keys, latent_write, select_keys
from octavo.platform import FP8_MAX, Platform

TRITON: Any = SimpleNamespace(
    write_latent=latent_write.write_latent,
    absorbed_queries=latent_write.absorbed_queries,
    head_linear=latent_write.head_linear,
    write_index_keys=index_keys.write_index_keys,
    select_keys=select_keys.select_keys,
)
DTYPES = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")  # numpy's, of infinities that the kernels mask


def both(make: Any, *args: Any, **options: Any) -> tuple[Scene, Scene]:
    """The same scene, written by Triton and by the reference."""
    state = torch.random.get_rng_state()
    ours = (
        make(*args[:2], TRITON, *args[2:], **options) if make is index_scene else make(*args[:3], TRITON, *args[3:], **options)
    )
    torch.random.set_rng_state(state)
    theirs = (
        make(*args[:2], reference_latent, *args[2:], **options)
        if make is index_scene
        else make(*args[:3], reference_latent, *args[3:], **options)
    )
    return ours, theirs


def assert_same(ours: tuple[Any, ...], theirs: tuple[Any, ...], name: str) -> None:
    """Scales are equal but where a last bit moved a peak over a power of two, and codes but for few that it rounded over."""
    for a, b in zip(ours, theirs, strict=True):
        if a is not None:
            x, y = a.float(), b.float()
            assert x.isfinite().all()
            apart = (x - y).abs() > (0.002 if a.dtype in FP8_MAX else 0.02) * y.abs()
            assert apart.float().mean() < (5e-3 if a.dtype in FP8_MAX else 1e-3), name
            assert relative_error(x, y) < 0.02, name


FORMATS = [("auto", torch.float32), ("bfloat16", torch.float32), ("fp8_ds_mla", torch.bfloat16)]


@over("interleaved, shape, cache", combined([True, False], LATENTS, FORMATS))
def test_latents_are_stored(
    interleaved: bool, shape: tuple[int, int, int, int, int], cache: tuple[str, torch.dtype], platform: Platform
) -> None:
    """As the reference stores them, from rows of a wider product; what was there before, written of NaN, is finite too."""
    kv, dtype = cache
    ours, theirs = both(latent_scene, [(2, 1), (0, 5)], shape, kv, platform, dtype, interleaved=interleaved)
    assert_same(ours.cache, theirs.cache, "scene")
    width = shape[1] + shape[3]
    wide = torch.randn(5, width + 16, device=platform.device).to(dtype)
    slots, rows = (torch.randperm(40, device=platform.device)[:5] for _ in range(2))
    for scene in (ours, theirs):
        scene.op.write_latent(wide[:, 8 : 8 + width], scene.norm, scene.rotation._replace(rows=rows), scene.cache, slots)
    assert_same(ours.cache, theirs.cache, "rows of a wider product")


@over("interleaved, shape, dtype", combined([True, False], LATENTS, DTYPES))
def test_queries_that_meet_latents(
    interleaved: bool, shape: tuple[int, int, int, int, int], dtype: torch.dtype, platform: Platform
) -> None:
    heads, rank, nope, rope, v = shape
    scene = latent_scene([(0, 9)], shape, "auto", reference_latent, platform, dtype, interleaved=interleaved)
    q = torch.randn(9, heads, nope + rope + 8, device=platform.device).to(dtype)[..., : nope + rope]
    up = (torch.randn(heads, nope + v, rank, device=platform.device) * rank**-0.5).to(dtype)
    args = q, up[:, :nope], scene.rotation
    found, expected = latent_write.absorbed_queries(*args), reference_latent.absorbed_queries(*args)
    assert relative_error(found, expected) < (5e-3 if dtype is torch.bfloat16 else 1e-6)
    latent = torch.randn(9, heads, rank, device=platform.device).to(dtype)
    out = latent_write.head_linear(latent, up[:, nope:].mT)
    assert out.is_contiguous()
    exact = torch.einsum("thr,hvr->thv", latent.double(), up[:, nope:].double())
    assert relative_error(out, exact) < (5e-3 if dtype is torch.bfloat16 else 1e-5)
    assert latent_write.head_linear(latent[:0], up[:, nope:].mT).shape == (0, heads, v)


STEPS = [("mixed", torch.float32, False), ("decode", torch.bfloat16, True), ("prefill", torch.bfloat16, False),
         ("many", torch.float32, True)]  # fmt: skip


@over("wide, shape, step", combined([True, False], INDEXERS, STEPS))
def test_index_keys_and_choices(
    wide: bool, shape: tuple[int, int, int], step: tuple[str, torch.dtype, bool], platform: Platform
) -> None:
    """Keys as the reference stores them; of the same keys, what it chooses, but where two scores are next to each other."""
    (heads, dim, top_k), (name, dtype, interleaved) = shape, step
    ours, scene = both(index_scene, BATCHES[name], dim, platform, dtype, wide=wide, interleaved=interleaved)
    assert_same(ours.cache, scene.cache, "keys")
    batch = scene.batch
    q = torch.randn(batch.num_tokens, heads, dim, device=platform.device).to(dtype)
    weights = torch.randn(batch.num_tokens, heads, device=platform.device).to(dtype)
    args = scene.rotation, scene.cache, batch, top_k
    found, expected = TRITON.select_keys(q, weights, *args), reference_latent.select_keys(q, weights, *args)
    assert_chosen(found, expected)
    if name in ("decode", "many"):
        padded = with_padding(batch, 2, 0, bound=64)
        q, weights = (torch.cat([x, torch.full_like(x[:2], 3.0)]) for x in (q, weights))
        rotation = scene.rotation._replace(rows=padded.rotary_rows)
        more = TRITON.select_keys(q, weights, rotation, scene.cache, padded, top_k)
        assert torch.equal(more[:-2], found)
        assert (more[-2:] == -1).all()


def assert_chosen(found: torch.Tensor, expected: torch.Tensor) -> None:
    found, expected = found.cpu(), expected.cpu()
    assert torch.equal((found >= 0).sum(1), (expected >= 0).sum(1))
    shared = 0
    for a, b in zip(found.tolist(), expected.tolist(), strict=True):
        chosen = [x for x in a if x >= 0]
        assert a == sorted(set(chosen)) + [-1] * (len(a) - len(chosen))
        shared += len(set(chosen) & {x for x in b if x >= 0})
    assert shared >= 0.98 * (expected >= 0).sum()


@over("chunk, top_k", [(1 << 15, 40), (256, 100), (256, 1)])
def test_the_highest_of_a_row(chunk: int, top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly those of a stable sort, by one chunk and by lists of lists, of scores that are alike, zeros with signs, huge,
    infinite, tiny and NaN."""
    monkeypatch.setattr(select_keys, "CHUNK", chunk)
    monkeypatch.setattr(select_keys, "SEGMENT", 128)
    device = torch.device("cuda" if HAS_GPU else "cpu")
    lengths = [1, top_k, top_k + 1, 129, 600, 1000, 1000, 1000, 1000, 0]
    scores = torch.randn(len(lengths), 1008) * torch.tensor([1, 1, 1, 1, 1e-30, 1, 1e30, 1, 1, 1])[:, None]
    scores[4] = scores[4].mul(1e10).exp()
    scores[5] = torch.randint(-2, 3, (1008,)).float() * torch.tensor([0.0, -0.0, 1.0])[torch.randint(3, (1008,))]
    scores[6, ::3], scores[6, 1::5] = float("inf"), float("-inf")
    scores[7, torch.randperm(1008)[:990]] = float("nan")
    scores[8] = (torch.randn(1008) * 2).sinh().sinh()
    exact = torch.where(scores.isnan(), float("-inf"), scores)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32, device=device)
    out = torch.full((len(lengths), top_k), -7, dtype=torch.int32, device=device)
    select_keys._highest(
        scores.to(device), (None, starts, seq_lens, None), out, 0, len(lengths), 1008, 1008,
        dict(TOKENS=1, TOP_K=top_k, SINGLE=True),
    )  # fmt: skip
    for row, length in enumerate(lengths):
        best = exact[row, :length].argsort(stable=True, descending=True)[:top_k].sort().values.tolist()
        assert out[row].tolist() == best + [-1] * (top_k - len(best)), row


def test_prompts_in_parts(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scratch too small for all rows gives the same, and tokens that pad a prompt's graph choose nothing."""
    scene = index_scene([(7, 1), (3, 1), (5, 17), (0, 9)], 32, reference_latent, platform)
    q = torch.randn(28, 8, 32, device=platform.device)
    weights = torch.randn(28, 8, device=platform.device)
    whole = TRITON.select_keys(q, weights, scene.rotation, scene.cache, scene.batch, 4)
    assert_chosen(whole, reference_latent.select_keys(q, weights, scene.rotation, scene.cache, scene.batch, 4))
    monkeypatch.setattr(select_keys, "SCRATCH", 100)
    assert torch.equal(TRITON.select_keys(q, weights, scene.rotation, scene.cache, scene.batch, 4), whole)
    scene.batch.live = torch.tensor([15], dtype=torch.int32, device=platform.device)
    found = TRITON.select_keys(q, weights, scene.rotation, scene.cache, scene.batch, 4)
    assert torch.equal(found[:15], whole[:15])
    assert (found[15:] == -1).all()
    with pytest.raises(OctavoError, match="index_topk"):
        TRITON.select_keys(q, weights, scene.rotation, scene.cache, scene.batch, 16385)


def test_of_equal_scores_the_first(platform: Platform) -> None:
    ops.bind(platform)
    scene = index_scene([(19, 2), (0, 3)], 32, reference_latent, platform)
    q, weights = torch.randn(5, 4, 32, device=platform.device), torch.zeros(5, 4, device=platform.device)
    weights[1] = float("nan")
    found = TRITON.select_keys(q, weights, scene.rotation, scene.cache, scene.batch, 4)
    assert found.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, -1, -1, -1], [0, 1, -1, -1], [0, 1, 2, -1]]
