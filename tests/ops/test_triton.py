"""Every Triton kernel against the op's reference, over the shared shapes: on the GPU where there is one, else interpreted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import relative_error
from ops.caches import SCALES, Scale, layer_cache, with_padding
from ops.cases import combined, over
from ops.interpreter import HAS_GPU
from ops.shapes import BATCHES, HEADS, LINEAR

from octavo import batch as batches
from octavo.kvcache import KVCache, KVCacheSpec, Layout, spec_for
from octavo.ops import reference
from octavo.ops.contract import Activation, CodeFormat, HeadNorms, PackedWeight, Quantized, Rope, Unscaled
from octavo.ops.triton import (
    argmax,
    attention,
    block_linear,
    decode,
    elementwise,
    launch,
    linear,
    prefill,
    rope,
    weight_only,
)
from octavo.platform import FP8_MAX, Platform
from octavo.quant import FP8_BLOCK, FP8_PER_CHANNEL, FP8_W8A16, dequantize, quantize
from octavo.quant.scheme import Granularity

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
FP8 = [torch.float8_e4m3fn]  # the interpreter has no e4m3fnuz; that one is compiled, in test_compile.py
KV_DTYPES = ["auto", "fp8_e4m3", "fp8_e5m2", "fp8_per_token_head"]
fp8_dtypes = over("fp8", FP8)
pytestmark = pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")  # numpy's, of infinities that the kernels mask


def spec(kv: str, heads: int, dim: int) -> KVCacheSpec:
    """As an engine on a GPU lays its cache out."""
    return spec_for(kv, heads, dim, torch.bfloat16, torch.float8_e4m3fn, Layout.TENSOR_CORE)


class Reads(PackedWeight):
    def __init__(self, fp8: torch.dtype, width: int, granularity: Granularity = Granularity.ROW):
        self.reads = CodeFormat(fp8, granularity, width)


def values(given: Quantized | Activation) -> torch.Tensor:
    """What the codes stand for, of an activation that has no dense values."""
    if isinstance(given, Activation):
        assert given.dense is None
        assert given.quantized is not None
        given = given.quantized
    return given.codes.float() * given.scale


def assert_codes(found: Quantized, expected: torch.Tensor, fp8: torch.dtype) -> None:
    """The reference's codes of `expected`, but for the few that a last bit of the division rounds the other way."""
    codes, scale = (x.to(DEVICE) for x in reference.quantize_activation(expected.cpu(), Granularity.ROW, fp8))
    k = expected.shape[1]
    assert torch.equal(found.codes[:, k:].float(), torch.zeros_like(found.codes[:, k:].float()))
    torch.testing.assert_close(found.scale, scale, rtol=1e-6, atol=0)
    different = found.codes[:, :k].float() != codes.float()
    assert different.sum() <= 2e-3 * different.numel()
    if expected.numel():
        assert relative_error(values(found)[:, :k], codes.float() * scale) < 5e-3


@over("dtype", [torch.float32, torch.bfloat16])
@over("shape", [(1, 1), (5, 100), (3, 4, 17), (2, 1024), (0, 8)])
@over("with_residual", [False, True])
def test_rms_norm(shape: tuple[int, ...], with_residual: bool, dtype: torch.dtype) -> None:
    x, residual = (torch.randn(shape, dtype=dtype, device=DEVICE) for _ in range(2))
    weight = torch.randn(shape[-1], dtype=dtype, device=DEVICE)
    args = x, weight, 1e-3, residual if with_residual else None
    (ours, total), (theirs, expected_total) = elementwise.rms_norm(*args), reference.rms_norm(*args)
    assert ours.quantized is None
    for found, expected in ((ours.values(), theirs.values()), (total, expected_total)):
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)


@fp8_dtypes
@over("size", [1, 33, 100, 1024])
def test_rms_norm_that_quantizes(size: int, fp8: torch.dtype) -> None:
    x, residual = (torch.randn(5, size, device=DEVICE).bfloat16() for _ in range(2))
    weight = torch.randn(size, device=DEVICE).bfloat16()
    width = size + -size % 16
    made, carried = elementwise.rms_norm(x, weight, 1e-5, residual, [Reads(fp8, width)])
    (dense, total), found = reference.rms_norm(x, weight, 1e-5, residual), made.quantized
    expected = dense.values()
    assert made.dense is None
    assert isinstance(found, Quantized)
    assert torch.equal(carried, total)
    assert found.codes.shape == (5, width)
    assert relative_error(values(found)[:, :size], expected) < 0.04
    codes, _ = reference.quantize_activation(expected, Granularity.ROW, fp8)
    assert (found.codes[:, :size].float() != codes.float()).float().mean() < 0.02  # a last bit of the norm moves a code


def test_rms_norm_of_strided_heads() -> None:
    qkv = torch.randn(3, 7 * 24, device=DEVICE)
    q = qkv.unflatten(1, (-1, 24))[:, 1:5]
    weight = torch.randn(24, device=DEVICE)
    found, _ = elementwise.rms_norm(q, weight, 1e-6)
    torch.testing.assert_close(found.values(), reference.rms_norm(q, weight, 1e-6)[0].values())


@over("quantized", [False, True])
def test_scales_that_a_product_left_over(quantized: bool) -> None:
    x, residual = torch.randn(5, 96, device=DEVICE).bfloat16() * 1e5, torch.randn(5, 96, device=DEVICE).bfloat16()
    product = Unscaled(x, torch.rand(5, 1, device=DEVICE) * 1e-3, torch.rand(1, 96, device=DEVICE) * 1e-2)
    weight = torch.randn(96, device=DEVICE).bfloat16()
    reads = [Reads(torch.float8_e4m3fn, 96)] if quantized else []
    found, carried = elementwise.rms_norm(product, weight, 1e-5, residual, reads)
    expected, total = reference.rms_norm(product, weight, 1e-5, residual)
    assert torch.equal(carried, total)
    assert relative_error(values(found) if quantized else found.values(), expected.values()) < (0.04 if quantized else 5e-3)
    gated = elementwise.silu_mul(product, [Reads(torch.float8_e4m3fn, 48)] if quantized else [])
    gate, up = (x.double() * product.row * product.column).chunk(2, 1)
    by_hand = gate * gate.sigmoid() * up
    assert relative_error(values(gated) if quantized else gated.values(), by_hand) < (0.04 if quantized else 2e-2)


@fp8_dtypes
@over("size", [1, 17, 136, 2048])
@over("rows", [0, 1, 6])
def test_silu_mul(rows: int, size: int, fp8: torch.dtype) -> None:
    x = torch.randn(rows, 2 * size, device=DEVICE).bfloat16() * 4
    expected = reference.silu_mul(x).values()
    plain = elementwise.silu_mul(x).values()
    torch.testing.assert_close(plain, expected, rtol=1e-2, atol=1e-6)
    found = elementwise.silu_mul(x, [Reads(fp8, size + -size % 16)]).quantized
    assert isinstance(found, Quantized)
    if rows:
        assert relative_error(values(found)[:, :size], expected) < 0.04


@fp8_dtypes
@over("rows, size", [(0, 16), (1, 1), (3, 33), (4, 5000)])
def test_quantize(rows: int, size: int, fp8: torch.dtype) -> None:
    x = torch.randn(rows, size + 3, device=DEVICE).bfloat16()[:, :size] * torch.rand(rows, 1, device=DEVICE).mul(9).exp()
    x = x.bfloat16()
    if rows > 1:
        x[1] = 0  # an empty token must not divide by zero
    assert_codes(elementwise.quantize(x, fp8, size + -size % 16), x, fp8)


@fp8_dtypes
@over("split", [None, 1, 3])
@over("shape", [s for s in LINEAR if s[0] <= linear.MAX_TOKENS])
def test_small_linear(shape: tuple[int, int, int], split: int | None, fp8: torch.dtype) -> None:
    m, n, k = shape
    q = quantize(torch.randn(n, k, device=DEVICE), FP8_PER_CHANNEL, fp8).padded(16)
    x = elementwise.quantize(torch.randn(m, k, device=DEVICE).bfloat16(), fp8, q.data.shape[1])
    assert q.scale is not None
    found = linear.small_linear(x, q.data, q.scale, n, {"split": split} if split else None)
    assert found.shape == (m, n)
    if m:
        expected = values(x)[:, :k].double() @ dequantize(q).double().mT
        assert relative_error(found, expected) < 4e-3


@fp8_dtypes
@over("split", [None, 3])
@over("shape", [s for s in LINEAR if s[0] <= linear.MAX_TOKENS])
def test_small_linear_of_pairs(shape: tuple[int, int, int], split: int | None, fp8: torch.dtype) -> None:
    """As exact as a product in BF16."""
    m, n, k = shape
    q = quantize(torch.randn(n, k, device=DEVICE) * torch.logspace(-4, 0, k, device=DEVICE), FP8_W8A16, fp8).padded(16)
    x = torch.randn(m, k, device=DEVICE).mul_(torch.rand(m, 1, device=DEVICE).mul(9).exp()).bfloat16()
    assert q.scale is not None
    pairs = weight_only.codes_in_pairs(x, fp8, q.data.shape[1], adjacent=True)
    spoiled = torch.full((m, n), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    del spoiled  # memory that the result is likely to get
    found = linear.small_linear(pairs, q.data, q.scale, n, {"split": split} if split else None, pairs=True)
    assert (found.shape, found.dtype) == ((m, n), torch.bfloat16)
    if m:
        assert relative_error(found, x.double() @ dequantize(q).double().mT) < 4e-3


@over("adjacent", [False, True])
@over("dtype", [torch.float32, torch.bfloat16])
@over("rows, size", [(0, 16), (1, 1), (3, 33), (4, 5000)])
def test_codes_in_pairs(rows: int, size: int, dtype: torch.dtype, adjacent: bool) -> None:
    """Each value to within 2^-8 of itself, and 2^-16 of the token's largest."""
    x = torch.randn(rows, size + 3, device=DEVICE)[:, :size] * torch.logspace(-8, 8, max(rows, 1), device=DEVICE)[:rows, None]
    x = x.to(dtype)
    if rows > 1:
        x[1] = 0
    found = weight_only.codes_in_pairs(x, torch.float8_e4m3fn, size + -size % 16, adjacent=adjacent)
    assert found.codes.shape == (2 * rows, size + -size % 16)
    assert not found.codes[:, size:].float().any()
    values = found.codes[:, :size].double() * found.scale
    both = values.unflatten(0, (rows, 2)).sum(1) if adjacent else values[:rows] + values[rows:]
    peak = x.double().abs().amax(1, keepdim=True) if rows else x.double()
    assert ((both - x.double()).abs() <= x.double().abs() * 2**-8 + peak * 2**-16).all()


@over("scale_rows", [False, True])
@over("shape", [*LINEAR, (130, 260, 300)])
def test_block_linear(shape: tuple[int, int, int], scale_rows: bool) -> None:
    m, n, k = shape
    q = quantize(torch.randn(n, k, device=DEVICE) * torch.rand(n, 1, device=DEVICE).mul(4).exp(), FP8_BLOCK).padded(16)
    assert q.scale is not None
    expanded = q.scale.repeat_interleave(128, 0)[:n].contiguous() if scale_rows else q.scale
    x = torch.randn(m, k, device=DEVICE).bfloat16()
    codes, scale = elementwise.quantize(x, q.data.dtype, q.data.shape[1], Granularity.BLOCK)
    found = block_linear.block_linear(codes, scale, q.data, expanded, n)
    assert found.shape == (m, n)
    if m:
        # on the CPU: a GPU divides by a number with its reciprocal, whose last bit makes other codes
        wanted_codes, wanted_scale = reference.quantize_activation(x.cpu(), Granularity.BLOCK, q.data.dtype)
        torch.testing.assert_close(scale.cpu(), wanted_scale, rtol=1e-6, atol=0)
        assert (codes[:, :k].cpu().float() != wanted_codes.float()).sum() <= 2e-3 * m * k + 2
        widened = codes[:, :k].double() * scale.repeat_interleave(128, 1)[:, :k].double()
        assert relative_error(found, widened @ dequantize(q).double().mT) < 4e-3


@over("kv, normed, shape", combined(KV_DTYPES, [False, True], [(16, 16, 5), (24, 24, 5), (32, 16, 34), (24, 12, 3)]))
def test_rope_write_kv(shape: tuple[int, int, int], normed: bool, kv: str) -> None:
    check_rope_write_kv(*shape, normed, kv, (0.3, 0.2))


BY_HEAD = [([0.3, 0.71, 1.3, 0.09], [0.2, 0.037, 0.9, 2.1]), ([0.3, 0.71, 1.3, 0.09], 0.2)]


@over("kv, scales, tokens", combined(["fp8_e4m3", "fp8_per_token_head", "auto"], BY_HEAD, [5, 34]))
def test_rope_write_kv_by_scales_of_heads(
    tokens: int, scales: tuple[Scale, Scale], kv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By programs of one head and of several."""
    check_rope_write_kv(24, 12, tokens, False, kv, scales)
    with monkeypatch.context() as patch:
        patch.setattr(rope, "TILES", ((1 << 31, 16, 2, 4),))
        check_rope_write_kv(32, 32, tokens, True, kv, scales)


def check_rope_write_kv(dim: int, rotated: int, tokens: int, normed: bool, kv: str, scales: tuple[Scale, Scale]) -> None:
    heads, kv_heads, block_size = 8, 4, 4
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim, device=DEVICE).bfloat16()
    qkv[1, heads + 1, 3], qkv[2, -1, 2] = float("nan"), float("inf")
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    angles = torch.rand(40, rotated // 2, device=DEVICE) * 7
    cos_sin = torch.cat([angles.cos(), angles.sin()], 1)
    positions, slots = (torch.randperm(40, device=DEVICE)[:tokens] for _ in range(2))
    norms = HeadNorms(*(torch.randn(dim, device=DEVICE).bfloat16() for _ in range(2)), 1e-5) if normed else None
    ours, theirs = (KVCache([spec(kv, kv_heads, dim)], 10, block_size, DEVICE) for _ in range(2))
    args = q, k, v, Rope(norms, cos_sin, positions)
    found = rope.rope_write_kv(*args, layer_cache(ours.views[0], *scales), slots)
    expected = reference.rope_write_kv(*args, layer_cache(theirs.views[0], *scales), slots)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-2)
    for name in ours.views[0]:
        a, b = ours.views[0][name].float(), theirs.views[0][name].float()
        assert relative_error(a, b) < (0.01 if normed else 5e-3), name
        assert a.count_nonzero() <= b.count_nonzero() + 2  # nothing is written beside the slots


@over("kv", ["fp8_e4m3", "fp8_per_token_head"])
@over("first", [64, 80, 69])
def test_values_of_a_stretch_of_a_block(monkeypatch: pytest.MonkeyPatch, first: int, kv: str) -> None:
    """Adjacent tokens of a block are written together, wherever they begin; a program's last ones may lie in the next block."""
    monkeypatch.setattr(rope, "TILES", ((1 << 31, 16, 2, 4),))
    q, k, v = torch.randn(40, 4 + 2 + 2, 32, device=DEVICE).bfloat16().split([4, 2, 2], 1)
    cos_sin, slots = torch.rand(40, 32, device=DEVICE), torch.arange(first, first + 40, device=DEVICE)
    ours, theirs = (KVCache([spec(kv, 2, 32)], 3, 64, DEVICE).views[0] for _ in range(2))
    for views in (ours, theirs):
        op = (rope if views is ours else reference).rope_write_kv
        op(q, k, v, Rope(None, cos_sin, slots - first), layer_cache(views, 0.3, 0.2), slots)
    for name in ours:
        assert relative_error(ours[name].float(), theirs[name].float()) < 5e-3, name
        assert torch.equal(ours[name].float() != 0, theirs[name].float() != 0), name


@over("kv, window, heads, rows", combined(KV_DTYPES, [None, 5], HEADS, BATCHES.values()))
def test_attention(rows: list[tuple[int, int]], heads: tuple[int, int, int], window: int | None, kv: str) -> None:
    check_attention(rows, heads, window, kv, (0.04, 0.03))


@over("kv, scales, rows", combined(["fp8_e4m3", "fp8_e5m2", "fp8_per_token_head"], SCALES, ["decode", "mixed"]))
def test_attention_by_scales_of_heads(rows: str, scales: str, kv: str) -> None:
    check_attention(BATCHES[rows], (4, 2, 16), None, kv, SCALES[scales])


def check_attention(
    rows: list[tuple[int, int]], heads: tuple[int, int, int], window: int | None, kv: str, scales: tuple[Scale, Scale]
) -> None:
    query_heads, kv_heads, dim = heads
    block_size, lengths = 4, [sum(row) for row in rows]
    free = iter(torch.randperm(sum(lengths) + 8).add(1).tolist())
    tables = [[next(free) for _ in range(-(-length // block_size))] for length in lengths]
    spans = [batches.Span([5] * count, before, t) for (before, count), t in zip(rows, tables, strict=True)]
    batch = batches.build(spans, block_size, DEVICE)
    cache = KVCache([spec(kv, kv_heads, dim)], sum(lengths) + 10, block_size, DEVICE)
    slots = torch.arange(cache.num_blocks * block_size, device=DEVICE)
    k, v = (torch.randn(len(slots), kv_heads, dim, device=DEVICE).bfloat16() for _ in range(2))
    views = cache.views[0]
    layer = layer_cache(views, *scales)
    reference.write_kv(layer, slots, k, v)
    q = torch.randn(sum(c for _, c in rows), query_heads, dim, device=DEVICE).bfloat16()
    args = layer, batch, dim**-0.5, window
    found, expected = attention.attention(q, *args), reference.attention(q, *args)
    prefills = any(count > 1 for _, count in rows)
    rounded = prefills and views["k"].dtype in FP8_MAX and "k_scale" not in views  # queries and probabilities are FP8 too
    assert relative_error(found, expected) < (0.04 if rounded else 6e-3)  # rounding to 3 bits is 2.6% of random values


@over(
    "kv, window, shape",
    combined(KV_DTYPES, [None, 70], [(16, 32, 1), (16, 32, 2), (64, 32, 8), (64, 128, 1), (64, 128, 2)]),
)
def test_decode_splits(kv: str, window: int | None, shape: tuple[int, int, int]) -> None:
    """Contexts of one tile and of many, over parts of which some get nothing."""
    block_size, dim, splits = shape
    lengths = [1, 63, 64, 65, 300]
    count = -(-max(lengths) // block_size)
    tables = torch.randperm(len(lengths) * count).add(1).view(len(lengths), count).tolist()
    spans = [batches.Span([5], n - 1, t) for n, t in zip(lengths, tables, strict=True)]
    batch = batches.build(spans, block_size, DEVICE)
    cache = KVCache([spec(kv, 2, dim)], len(lengths) * count + 1, block_size, DEVICE)
    slots = torch.arange(cache.num_blocks * block_size, device=DEVICE)
    k, v = (torch.randn(len(slots), 2, dim, device=DEVICE).bfloat16() for _ in range(2))
    layer = layer_cache(cache.views[0], 0.04, 0.03)
    reference.write_kv(layer, slots, k, v)
    q = torch.randn(len(lengths), 6, dim, device=DEVICE).bfloat16()
    out = torch.full_like(q, float("nan"))
    decode.decode_attention(q, out, layer, batch, len(lengths), max(lengths), 0.2, window, {"splits": splits})
    assert relative_error(out, reference.attention(q, layer, batch, 0.2, window)) < 6e-3


@over("kv, splits, normed, head", combined(KV_DTYPES, [1, 3], [False, True], [(64, 64), (80, 80), (128, 64)]))
def test_decode_of_new_tokens(kv: str, splits: int, normed: bool, head: tuple[int, int]) -> None:
    """As `rope_write_kv` and attention one after the other; the new token is a block's first, its last, alone."""
    check_new_tokens([1, 64, 65, 300 if HAS_GPU else 150], 0, kv, splits, normed, *head, (0.04, 0.03))


@over("scales, splits", zip(SCALES, [1, 3, 3, 1], strict=True))
def test_decode_of_new_tokens_by_scales_of_heads(splits: int, scales: str) -> None:
    check_new_tokens([1, 65, 130], 0, "fp8_e4m3", splits, False, 64, 64, SCALES[scales])


@over("kv, splits", zip(KV_DTYPES, [1, 3, 1, 3], strict=True))
def test_rows_without_a_context_are_zeros(kv: str, splits: int) -> None:
    """As a graph has them; they bring tokens, which are not written, not even to the scratch block."""
    check_new_tokens([1, 65, 130], 3, kv, splits, True, 64, 64, (0.04, 0.03))


def check_new_tokens(
    lengths: list[int], padding: int, kv: str, splits: int, normed: bool, dim: int, rotated: int, scales: tuple[Scale, Scale]
) -> None:
    """Requests of `lengths` with their new tokens, and rows that pad them, against the reference, which has those alone; a
    token's rotary row is not its place."""
    heads, kv_heads, block_size, total = 6, 2, 16, len(lengths) + padding
    count = -(-max(lengths) // block_size)
    tables = torch.randperm(len(lengths) * count).add(1).view(len(lengths), count).tolist()
    spans = [batches.Span([5], n - 1, t) for n, t in zip(lengths, tables, strict=True)]
    batch = batches.build(spans, block_size, DEVICE)
    ours, theirs = (
        layer_cache(KVCache([spec(kv, kv_heads, dim)], len(lengths) * count + 1, block_size, DEVICE).views[0], *scales)
        for _ in range(2)
    )
    slots = torch.arange((len(lengths) * count + 1) * block_size, device=DEVICE)
    old = [torch.randn(len(slots), kv_heads, dim, device=DEVICE).bfloat16() for _ in range(2)]
    for cache in (ours, theirs):
        reference.write_kv(cache, slots, *old)
    qkv = torch.randn(total, heads + 2 * kv_heads, dim, device=DEVICE).bfloat16()
    qkv[1, heads, 3], qkv[2, -1, 2] = float("nan") if not normed else 1.0, float("inf")
    qkv[len(lengths) :] = float("nan")
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    angles = torch.rand(310, rotated // 2, device=DEVICE) * 7
    cos_sin = torch.cat([angles.cos(), angles.sin()], 1)
    norms = HeadNorms(*(torch.randn(dim, device=DEVICE).bfloat16() for _ in range(2)), 1e-5) if normed else None
    real = slice(len(lengths))
    rows = Rope(norms, cos_sin, batch.positions + 7)
    turned = reference.rope_write_kv(q[real], k[real], v[real], rows, theirs, batch.slot_mapping)
    expected = reference.attention(turned, theirs, batch, 0.2, None)
    if padding:
        batch = with_padding(batch, padding, 0, bound=1000)
    out = torch.full(q.shape, float("nan"), dtype=q.dtype, device=DEVICE)
    new = decode.New(k, v, Rope(norms, cos_sin, batch.positions + 7), batch.slot_mapping)
    decode.decode_attention(q, out, ours, batch, total, max(lengths), 0.2, None, {"splits": splits}, new)
    assert relative_error(out[real], expected) < (2e-2 if normed else 6e-3)
    assert not out[len(lengths) :].any()
    for name in ours.views:
        a, b = ours.views[name].float(), theirs.views[name].float()
        assert relative_error(a, b) < 5e-3, name
    again = torch.full(q.shape, float("nan"), dtype=q.dtype, device=DEVICE)
    decode.decode_attention(turned_rows(turned, total), again, ours, batch, total, max(lengths), 0.2, None, {"splits": splits})
    assert relative_error(again[real], expected) < (2e-2 if normed else 6e-3)
    assert not again[len(lengths) :].any()


def turned_rows(turned: torch.Tensor, total: int) -> torch.Tensor:
    """Queries of the real rows, then NaN."""
    out = turned.new_full((total, *turned.shape[1:]), float("nan"))
    out[: len(turned)] = turned
    return out


@over("lengths", [[5, 64, 33], [5, 1, 7, 64, 20, 3]])
def test_single_tokens_in_one_launch_or_two(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Many requests, whose programs come in waves, take two; the results do not tell."""
    spans = [batches.Span([5], n - 1, range(4 * i, 4 * i + 4)) for i, n in enumerate(lengths)]
    batch, count = batches.build(spans, 16, DEVICE), 4 * len(lengths)
    qkv = torch.randn(len(lengths), 8, 64, device=DEVICE).bfloat16()
    angles = torch.rand(64, 32, device=DEVICE) * 7
    cos_sin, old = torch.cat([angles.cos(), angles.sin()], 1), torch.randn(2, count * 16, 2, 64, device=DEVICE).bfloat16()
    found = []
    for wave in (0, 3):
        monkeypatch.setattr(attention, "WAVE", wave)
        cache = KVCache([spec("fp8_e4m3", 2, 64)], count, 16, DEVICE)
        layer = layer_cache(cache.views[0], 0.04, 0.03)
        reference.write_kv(layer, torch.arange(count * 16, device=DEVICE), *old)
        out = attention.attend(*qkv.split([4, 2, 2], 1), Rope(None, cos_sin, batch.rotary_rows), layer, batch, 0.2, None)
        found.append((out, *(view.float() for view in cache.views[0].values())))
    assert all(relative_error(a, b) < 3e-3 for a, b in zip(*found, strict=True))


@over("kv, window, dim", combined(KV_DTYPES, [None, 70], [64, 80, 128]))
def test_long_prefill(kv: str, window: int | None, dim: int) -> None:
    """More than one tile of queries and of keys, a chunk that goes on, and a second request beside it."""
    rows, block_size = [(70, 150), (0, 130)], 16
    count = 14
    tables = torch.randperm(2 * count).add(1).view(2, count).tolist()
    batch = batches.build([batches.Span([5] * n, a, t) for (a, n), t in zip(rows, tables, strict=True)], block_size, DEVICE)
    cache = KVCache([spec(kv, 1, dim)], 2 * count + 1, block_size, DEVICE)
    slots = torch.arange(cache.num_blocks * block_size, device=DEVICE)
    k, v = (torch.randn(len(slots), 1, dim, device=DEVICE).bfloat16() for _ in range(2))
    layer = layer_cache(cache.views[0], 0.04, 0.03)
    reference.write_kv(layer, slots, k, v)
    q = torch.randn(280, 2, dim, device=DEVICE).bfloat16()
    out = torch.full_like(q, float("nan"))
    prefill.prefill_attention(q, out, layer, batch, 0, 2, dim**-0.5, window)
    rounded = kv in ("fp8_e4m3", "fp8_e5m2")
    assert relative_error(out, reference.attention(q, layer, batch, dim**-0.5, window)) < (0.04 if rounded else 6e-3)


def test_contexts_are_laid_out_in_groups() -> None:
    """However many prompts share a long prefix, the memory that one pass takes is bounded."""
    long, limit = 60_000, attention.STAGED
    groups = list(attention._groups([1, long, long, long, 2 * limit, 5, 6], 1))
    assert groups == [(1, 3), (3, 4), (4, 5), (5, 7)]
    assert list(attention._groups([1, 1], 2)) == []


def test_a_model_of_fp32_is_not_quantized_on_the_way() -> None:
    x = torch.randn(3, 64, device=DEVICE)
    reads = [Reads(torch.float8_e4m3fn, 64)]
    for found in (elementwise.rms_norm(x, x[0], 1e-5, None, reads)[0], elementwise.silu_mul(x, reads)):
        assert found.quantized is None
        assert found.values().dtype is torch.float32


@over("cache, dtype", [("bfloat16", torch.float32), ("auto", torch.bfloat16)])
def test_attention_over_a_cache_of_another_dtype(cache: str, dtype: torch.dtype) -> None:
    """An FP32 model with a BF16 cache, and BF16 queries over an FP32 cache."""
    spans = [batches.Span([5], 9, [1, 2, 3]), batches.Span([5] * 7, 4, [4, 5, 6])]
    batch = batches.build(spans, 4, DEVICE)
    stored = torch.float32 if cache == "auto" else dtype
    views = KVCache([spec_for(cache, 2, 32, stored, torch.float8_e4m3fn, Layout.TENSOR_CORE)], 8, 4, DEVICE).views[0]
    k, v = (torch.randn(32, 2, 32, device=DEVICE) for _ in range(2))
    layer = layer_cache(views)
    reference.write_kv(layer, torch.arange(32, device=DEVICE), k, v)
    q = torch.randn(8, 4, 32, device=DEVICE).to(dtype)
    args = q, layer, batch, 0.2, None
    assert relative_error(attention.attention(*args), reference.attention(*args)) < 6e-3


@over("stages", [8, 2])
def test_prefill_s_tiles_fit(monkeypatch: pytest.MonkeyPatch, stages: int) -> None:
    """Whatever the head's size and the chip's memory; Hopper's, and half of that of a chip without its."""
    fp8, bf16 = torch.float8_e4m3fn, torch.bfloat16
    on = Platform(DEVICE, "sm_90" if stages == 8 else "gfx950", shared_memory=227 << 10)
    monkeypatch.setattr(launch, "_platform", on)
    assert on.pipeline_depth == stages
    assert prefill._tiles(128, fp8)["BN"] == (128 if stages == 8 else 32)
    for kib in (227, 99, 64):
        monkeypatch.setattr(launch, "_platform", replace(on, shared_memory=kib << 10))
        for dp in (32, 64, 128, 256):
            for dtype in (fp8, bf16):
                t = prefill._tiles(dp, dtype)
                assert dp * dtype.itemsize * (t["BM"] + t["stages"] * 2 * t["BN"]) <= kib << 10
                assert t["stages"] <= stages


@over("dtype", [torch.float32, torch.bfloat16])
@over("vocab", [1, 77, 4096, 9001])
def test_the_likeliest_token(vocab: int, dtype: torch.dtype) -> None:
    """The first of the largest; twice, since a launch leaves the workspace as the next one needs it."""
    x = torch.randn(9, vocab, dtype=dtype, device=DEVICE)
    x[1] = 0
    x[2] = -torch.inf
    x[3, vocab // 2] = x[3, vocab // 3] = 100
    x[4, vocab // 2] = torch.inf
    x[5] = -x[5].abs() - 1
    x[6, ::2], x[6, 1::2] = -0.0, 0.0
    x[7, vocab // 4] = torch.nan
    wide = torch.cat([x, x[:, :1] + 1000], 1)[:, :vocab]  # rows that are not adjacent
    for given in (x, x, wide):
        assert argmax.argmax(given).tolist() == given.float().argmax(-1).tolist()
    assert argmax.argmax(x[:0]).shape == (0,)
