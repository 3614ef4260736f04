"""MLA's and the indexer's ops, as bound here and in plain torch: caches to the byte, attention and choices in float64."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from conftest import relative_error
from ops.caches import with_padding
from ops.cases import over
from ops.latents import attended, double_keys, double_latents, index_scene, latent_scene, stored
from ops.shapes import BATCHES, INDEXERS, LATENTS
from quant.float64 import E4M3FN, E4M3FNUZ

from octavo import ops
from octavo.kvcache import index_spec, latent_spec
from octavo.ops import reference_latent
from octavo.platform import Platform

SCALE = 0.11
FORMATS = [(kv, dtype) for kv in ("auto", "bfloat16", "fp8_ds_mla") for dtype in (torch.float32, torch.bfloat16)]
implementations = over("op", [ops, reference_latent])


def rounding(op: ModuleType, platform: Platform, dtype: torch.dtype, kv: str = "auto") -> float:
    """The bound on an error: an accelerator multiplies in BF16, or over codes in what keeps as much."""
    if dtype is torch.bfloat16:
        return 1e-2
    return 1e-5 if platform.is_cpu or op is reference_latent else 1e-2


def test_the_bytes_are_those_that_flashmla_and_deepgemm_read(platform: Platform) -> None:
    """656 bytes a token: 512 codes, 4 FP32 scales, 64 BF16; index keys 132 bytes, in a block all codes, then all scales."""
    assert latent_spec("fp8_e4m3", 512, 64, torch.bfloat16, torch.float8_e4m3fn).bytes_per_token == 656
    assert latent_spec("auto", 512, 64, torch.bfloat16, torch.float8_e4m3fn).bytes_per_token == 1152
    assert index_spec(128, torch.float8_e4m3fn, wide=False).bytes_per_token == 132
    form = E4M3FNUZ if platform.fp8_dtype is torch.float8_e4m3fnuz else E4M3FN
    scene = latent_scene([(0, 9)], LATENTS[-1], "fp8_ds_mla", ops, platform)
    table = scene.batch.block_tables[0].tolist()
    rows = scene.buffer.cpu().numpy().reshape(-1, 656)
    exact = double_latents(scene, 0)
    for token in range(9):
        row = rows[table[token // 4] * 4 + token % 4]
        scales = row[512:528].copy().view(np.float32)
        peaks = np.maximum(exact[token, :512].reshape(4, 128).abs().amax(1).numpy(), 1e-4)
        assert np.array_equal(scales, 2.0 ** np.ceil(np.log2((peaks / form.limit).astype(np.float32)))), "powers of two"
        values = form.values[row[:512]].reshape(4, 128) * scales[:, None]
        nearest = form.values[form.nearest(exact[token, :512].numpy().reshape(4, 128) / scales[:, None])] * scales[:, None]
        assert (values != nearest).mean() < 5e-3, "but for the few that FP32 rounds the other way"
        assert np.allclose(values, nearest, rtol=0.13)
        rope = torch.from_numpy(row[528:].copy()).view(torch.bfloat16).double()
        assert relative_error(rope, exact[token, 512:]) < 4e-3
    scene = index_scene([(0, 9)], 128, ops, platform)
    table = scene.batch.block_tables[0].tolist()
    blocks = scene.buffer.cpu().numpy()
    turned = double_keys(scene, 0) @ reference_latent.hadamard(128).double()
    for token in range(9):
        block, at = blocks[table[token // 4]], token % 4
        scale = block[4 * 128 + 4 * at :][:4].copy().view(np.float32)
        assert np.log2(scale) % 1 == 0
        assert relative_error(torch.from_numpy(form.values[block[at * 128 :][:128]] * scale), turned[token]) < 0.04


@implementations
def test_latents_are_stored(op: ModuleType, platform: Platform) -> None:
    check_stored(op=op, platform=platform)


@over("shape", LATENTS)
@over("kv, dtype", FORMATS)
def check_stored(shape: tuple[int, ...], kv: str, dtype: torch.dtype, op: ModuleType, platform: Platform) -> None:
    bound = {"fp8_ds_mla": 0.04}.get(kv, 4e-3 if kv == "bfloat16" or dtype is torch.bfloat16 else 1e-6)
    for interleaved in (True, False):
        scene = latent_scene(BATCHES["mixed"], shape, kv, op, platform, dtype, interleaved=interleaved)  # type: ignore[arg-type]
        for request in range(len(scene.given)):
            assert relative_error(stored(scene, request), double_latents(scene, request)) < bound


@implementations
@over("rows", BATCHES)
def test_attention_over_latents(rows: str, op: ModuleType, platform: Platform) -> None:
    """Over all of a context, over chosen places, and over keys and values made of latents: float64 of the same codes."""
    check_attention(rows=rows, op=op, platform=platform)


@over("shape", LATENTS)
@over("kv, dtype", FORMATS)
def check_attention(rows: str, shape: tuple[int, ...], kv: str, dtype: torch.dtype, op: ModuleType, platform: Platform) -> None:
    heads, rank, nope, rope, v = shape
    scene = latent_scene(BATCHES[rows], shape, kv, op, platform, dtype)  # type: ignore[arg-type]
    batch, cache, bound = scene.batch, scene.cache, rounding(op, platform, dtype, kv)
    q = torch.randn(batch.num_tokens, heads, rank + rope).to(platform.device, dtype)
    chosen = torch.full((batch.num_tokens, 7), -1, dtype=torch.int32)
    raw = torch.randn(batch.num_tokens, heads, nope + rope).to(platform.device, dtype)
    up_k, up_v = (torch.randn(heads, n, rank).to(platform.device, dtype) * rank**-0.5 for n in (nope, v))
    absorbed = op.absorbed_queries(raw, up_k, scene.rotation)
    expected: dict[str, list[torch.Tensor]] = {"all": [], "chosen": [], "expanded": [], "absorbed": []}
    start = 0
    for request, (count, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        part, keys = slice(start, start + count), stored(scene, request)
        for token in range(count):
            places = torch.randperm(context - count + token + 1)[:7].sort().values
            chosen[start + token, : len(places)] = places.int()
        own = q[part].double().cpu()
        expected["all"].append(attended(own, keys, rank, SCALE))
        expected["chosen"].append(attended(own, keys, rank, SCALE, chosen[part]))
        latent = attended(absorbed[part].double().cpu(), keys, rank, SCALE)
        expected["expanded"].append(torch.einsum("qhr,hvr->qhv", latent, up_v.double().cpu()))
        start += count
    found = {
        "all": op.latent_attention(q, cache, batch, SCALE),
        "chosen": op.latent_attention(q, cache, batch, SCALE, chosen.to(platform.device)),
        "expanded": op.expanded_attention(raw, up_k, up_v.mT, scene.rotation, cache, batch, SCALE),
        "absorbed": torch.einsum("qhr,hvr->qhv", op.latent_attention(absorbed, cache, batch, SCALE).double(), up_v.double()),
    }
    expected["absorbed"] = expected["expanded"]
    for way, out in found.items():
        assert relative_error(out, torch.cat(expected[way])) < bound, (way, kv, dtype)
    if set(batch.query_lens) == {1}:
        padded = with_padding(batch, 2, 0, bound=POSITIONS_BOUND)
        more = torch.cat([q, torch.full((2, *q.shape[1:]), 7.0, device=q.device, dtype=dtype)])
        wide = torch.cat([chosen, torch.full((2, 7), -1, dtype=torch.int32)]).to(platform.device)
        if op is ops and ops.table()["latent_attention"] != "reference_latent":  # which takes the host's bounds for lengths
            for given, name in ((None, "all"), (wide, "chosen")):
                out = op.latent_attention(more, cache, padded, SCALE, given)
                assert relative_error(out[:-2], torch.cat(expected[name])) < bound
                assert torch.equal(out[-2:], torch.zeros_like(out[-2:]))


POSITIONS_BOUND = 64  # on contexts, as graphs have it


def test_products_of_heads(platform: Platform) -> None:
    for heads, rank, nope, _, v in LATENTS:
        for tokens in (0, 1, 9):
            for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 5e-3)):
                x, up = torch.randn(tokens, heads, nope).to(dtype), torch.randn(heads, nope + v, rank).to(dtype)
                out = ops.head_linear(x.to(platform.device), up[:, :nope].to(platform.device))
                expected = torch.einsum("thn,hnr->thr", x.double(), up[:, :nope].double())
                assert out.dtype is dtype
                assert not tokens or relative_error(out, expected) < bound
                out = ops.head_linear(out, up[:, nope:].mT.to(platform.device))
                assert out.shape == (tokens, heads, v)


@implementations
def test_the_highest_scores_are_chosen(op: ModuleType, platform: Platform) -> None:
    check_choices(op=op, platform=platform)


@over("dtype", [torch.float32, torch.bfloat16])
@over("wide", [True, False])
@over("shape", INDEXERS)
def check_choices(shape: tuple[int, int, int], wide: bool, dtype: torch.dtype, op: ModuleType, platform: Platform) -> None:
    """Each chosen place scores, in float64 of the same keys, at least what any that is not chosen does, but for rounding."""
    heads, dim, top_k = shape
    for interleaved, name in ((False, "mixed"), (True, "decode"), (False, "prefill"), (False, "many")):
        scene = index_scene(BATCHES[name], dim, op, platform, dtype, wide=wide, interleaved=interleaved)
        batch, cache = scene.batch, scene.cache
        q = torch.randn(batch.num_tokens, heads, dim).to(platform.device, dtype)
        weights = torch.randn(batch.num_tokens, heads).to(platform.device, dtype)
        found = op.select_keys(q, weights, scene.rotation, cache, batch, top_k).cpu()
        assert found.shape == (batch.num_tokens, top_k)
        assert found.dtype is torch.int32
        turned = torch.cat(
            [reference_latent.rotated(q[..., : dim // 2].float(), scene.rotation), q[..., dim // 2 :].float()], -1
        )
        token = 0
        for request, (count, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
            keys = stored(scene, request)
            if not wide:
                keys = keys @ reference_latent.hadamard(dim).double()
            assert relative_error(keys, double_keys(scene, request)) < (
                0.05 if not wide else 5e-3 if dtype is not torch.float32 else 1e-6
            )
            for position in range(context - count, context):
                own = turned[token].double().cpu() @ keys[: position + 1].T
                scores = own.relu().mul(weights[token].double().cpu()[:, None]).sum(0)
                picked, rest = found[token][found[token] >= 0].long(), found[token][found[token] < 0]
                assert len(picked) == min(top_k, position + 1)
                assert picked.tolist() == sorted(set(picked.tolist()))
                assert found[token].tolist()[len(picked) :] == [-1] * len(rest)
                others = torch.ones(position + 1, dtype=torch.bool).index_fill(0, picked, False)
                if others.any():
                    slack = (
                        (0.06 if not wide else 0.02 if dtype is not torch.float32 or not platform.is_cpu else 1e-5)
                        * own.norm()
                        * weights[token].double().norm().cpu()
                    )
                    assert scores[picked].min() > scores[others].max() - slack
                token += 1


@implementations
def test_of_equal_scores_the_first_are_chosen_and_nan_last(op: ModuleType, platform: Platform) -> None:
    check_equal_scores(op, platform)


def check_equal_scores(op: ModuleType, platform: Platform) -> None:
    scene = index_scene([(19, 2), (0, 3)], 32, op, platform)
    batch = scene.batch
    q = torch.randn(5, 4, 32, device=platform.device)
    weights = torch.zeros(5, 4, device=platform.device)
    found = op.select_keys(q, weights, scene.rotation, scene.cache, batch, 4).cpu().tolist()
    assert found == [[0, 1, 2, 3], [0, 1, 2, 3], [0, -1, -1, -1], [0, 1, -1, -1], [0, 1, 2, -1]]
    weights[1] = float("nan")
    found = op.select_keys(q, weights, scene.rotation, scene.cache, batch, 4).cpu().tolist()
    assert found[1] == [0, 1, 2, 3], "a request's NaN chooses what exists"


def test_a_group_s_scale_is_the_smallest_power_of_two_that_holds_it() -> None:
    """Its largest value over 448, where that is a power of two itself, too; by logarithms in float64."""
    peaks = torch.tensor([448.0, 448.0 * 2**-9, 7.0, 7.0001, 6.9999, 1e-4, 0.0, 3.5e3], dtype=torch.float64)
    x = (peaks[:, None] * torch.linspace(-1, 1, 128, dtype=torch.float64)).float()
    codes, scale = reference_latent.power_of_two_codes(x, torch.float8_e4m3fn)
    expected = 2.0 ** torch.ceil(torch.log2(peaks.clamp(min=1e-4) / 448))
    assert torch.equal(scale[:, 0].double(), expected)
    assert codes.float().abs().max() == 448
