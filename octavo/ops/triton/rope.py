"""Head norms, rotary embedding and the write into the paged cache, between the QKV projection and attention, in one pass."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kvcache import LayerCache
from octavo.ops.contract import Rope
from octavo.ops.reference import SCALE_FLOOR
from octavo.ops.triton.launch import cache_strides, head_strides, launch, power_of_2, round_to, scale_of, to_fp8, wait
from octavo.platform import FP8_MAX

__all__ = ["finite", "norm_rotate", "rope_write_kv", "store_codes", "write_new"]

TILES = ((512, 1, 4, 1), (1 << 31, 16, 2, 4))  # (up to this many tokens, tokens of a CTA, heads of a CTA, warps)


@triton.jit
def finite(x):
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)  # NaN too: the cache holds finite values only


@triton.jit
def store_codes(x, ok, cache, at, by, LIMIT: tl.constexpr):
    """Store x / by at the addresses `at`, as FP8 codes or in the cache's dtype."""
    dtype: tl.constexpr = cache.dtype.element_ty
    if dtype.primitive_bitwidth == 8:
        x = to_fp8(tl.div_rn(x, by), LIMIT, dtype)
    tl.store(cache + at, x.to(dtype), mask=ok)


@triton.jit
def _store_scales(most, ok, scales, at, head, head_stride, LIMIT: tl.constexpr, FLOOR: tl.constexpr):
    """Compute and store the scales of tokens and heads with amax `most` [tokens, heads]."""
    s = scale_of(most, LIMIT, FLOOR)
    tl.store(scales + at[:, None] + (head * head_stride)[None, :], s, mask=ok[:, None])
    return s


@triton.jit
def _head_scales(scale, head, STRIDE: tl.constexpr):
    """The layer's scale, or per-head scales [1, heads, 1]."""
    if STRIDE:
        by = tl.load(scale + head)[None, :, None]
    else:
        by = tl.load(scale)
    return by


@triton.jit
def _store_values(
    x, ok, cache, place, head_stride, dim_stride, head, d, by, D: tl.constexpr, TOKENS: tl.constexpr, BY_DIM: tl.constexpr,
    LIMIT: tl.constexpr,
):  # fmt: skip
    """Store x [tokens, heads, DP] at the tokens' slots. BY_DIM: x is transposed, so that neighbouring threads write
    neighbouring tokens.
    """
    if BY_DIM:
        x = tl.trans(x, 1, 2, 0)
        rows = (head * head_stride)[:, None, None] + (d * dim_stride)[None, :, None]
        inside = (d < D)[None, :, None] & ok[None, None, :]
        start = tl.min(place, 0)
        token = tl.arange(0, TOKENS)
        apart = tl.sum(((place != start + token) | (ok == 0)).to(tl.int32), 0)
        if apart == 0 and start % 16 == 0:  # consecutive slots of one block: vectorized over tokens
            store_codes(x, inside, cache, rows + (tl.multiple_of(start, 16) + token)[None, None, :], by, LIMIT)
        else:
            store_codes(x, inside, cache, rows + place[None, None, :], by, LIMIT)
    else:
        at = place[:, None, None] + (head * head_stride)[None, :, None] + (d * dim_stride)[None, None, :]
        store_codes(x, ok[:, None, None] & (d < D)[None, None, :], cache, at, by, LIMIT)


@triton.jit
def _normed(x, factor, norm, d, n: tl.constexpr, dtype: tl.constexpr):
    """Part of each head's dimensions (d < n), times the head's RMS factor and the norm's weight."""
    gain = tl.load(norm + d, mask=d < n, other=0.0).to(tl.float32)[None, None, :]
    return round_to(round_to(x * factor, dtype) * gain, dtype)


@triton.jit
def norm_rotate(source, ok, norm, eps, cos_sin, d, D: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr):
    """Heads [DP, N] of a token, loaded at source [1, N], normed and rotated. `cos_sin` is the token's row; d [DP] are
    dimensions.
    """
    half: tl.constexpr = R // 2
    dtype: tl.constexpr = source.dtype.element_ty
    first = d < half
    other = tl.where(first, d + half, tl.where(d < R, d - half, d))
    x = tl.load(source + d[:, None], mask=ok, other=0.0).to(tl.float32)
    y = tl.load(source + other[:, None], mask=ok, other=0.0).to(tl.float32)
    if NORM:
        factor = tl.rsqrt(tl.sum(x * x, 0) / D + eps)[None, :]
        gain = tl.load(norm + d, mask=d < D, other=0.0).to(tl.float32)[:, None]
        other_gain = tl.load(norm + other, mask=d < D, other=0.0).to(tl.float32)[:, None]
        x = round_to(round_to(x * factor, dtype) * gain, dtype)
        y = round_to(round_to(y * factor, dtype) * other_gain, dtype)
    angle = tl.where(first, d, d - half)
    cos = tl.load(cos_sin + angle, mask=d < R, other=1.0)
    sin = tl.load(cos_sin + half + angle, mask=d < R, other=0.0)
    return round_to(x * cos[:, None] + y * tl.where(first, -sin, sin)[:, None], dtype)


@triton.jit
def write_new(x, ok, cache, at, by, scale_at, PER_HEAD: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr):
    """Store one head [DP, 1] of a token to the cache at `at`, with the layer's scale, or a scale of its own stored at
    `scale_at`.
    """
    x = finite(x)
    if PER_HEAD:
        by = scale_of(tl.max(tl.abs(x)), LIMIT, FLOOR)
        tl.store(scale_at, by)
    store_codes(x, ok, cache, at, by, LIMIT)


@triton.jit(do_not_specialize=["tokens"])
def _rope_write_kv(
    q, k, v, q_out, k_cache, v_cache, k_scales, v_scales, q_norm, k_norm, cos_sin, rotary_rows, slots,
    tokens, eps, k_scale, v_scale, q_stride, k_stride, v_stride, block_stride, k_token_stride, v_token_stride, v_head_stride,
    v_dim_stride, scale_block_stride, scale_token_stride, scale_head_stride,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr, PER_HEAD: tl.constexpr,
    BY_DIM: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A head's rotated dimensions are two halves [tokens, heads, HALF]; dimensions behind R, if any, are a third part."""
    first = tl.program_id(0) * HEADS  # heads of queries, then keys, then values; a CTA has one kind
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    row = token.to(tl.int64)[:, None, None]
    ok = token < tokens
    wait(PDL)  # without `release`: attention's CTAs, started early, would be spread unevenly over SMs (7% at 16 requests)
    slot = tl.load(slots + token, mask=ok, other=0).to(tl.int64)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    scale_at = block * scale_block_stride + offset * scale_token_stride
    BY_LAYER: tl.constexpr = k_cache.dtype.element_ty.primitive_bitwidth == 8 and not PER_HEAD
    if first >= Q_HEADS + KV_HEADS:
        head = first - Q_HEADS - KV_HEADS + tl.arange(0, HEADS)
        d = tl.arange(0, DP)
        inside = ok[:, None, None] & (d < D)[None, None, :]
        x = tl.load(v + row * v_stride + (head * D)[None, :, None] + d[None, None, :], mask=inside, other=0.0).to(tl.float32)
        x = finite(x)
        if PER_HEAD:
            by = _store_scales(tl.max(tl.abs(x), 2), ok, v_scales, scale_at, head, scale_head_stride, LIMIT, FLOOR)[:, :, None]
        elif BY_LAYER:
            by = _head_scales(v_scale, head, V_STRIDE)
        else:
            by = 1.0
        if BY_DIM and (PER_HEAD or (BY_LAYER and V_STRIDE)):
            by = tl.trans(by, 1, 2, 0)
        place = block * block_stride + offset * v_token_stride
        _store_values(x, ok, v_cache, place, v_head_stride, v_dim_stride, head, d, by, D, TOKENS, BY_DIM, LIMIT)
        return
    is_q = first < Q_HEADS
    head = first + tl.arange(0, HEADS)
    source, norm = q + row * q_stride, q_norm
    if not is_q:
        head -= Q_HEADS
        source, norm = k + row * k_stride, k_norm
    half: tl.constexpr = R // 2
    rest: tl.constexpr = D - R
    dtype: tl.constexpr = q.dtype.element_ty
    d = tl.arange(0, HALF)
    e = tl.arange(0, DP)  # dimensions behind R
    inside = ok[:, None, None] & (d < half)[None, None, :]
    behind = ok[:, None, None] & (e < rest)[None, None, :]
    source += (head * D)[None, :, None]
    x = tl.load(source + d[None, None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(source + half + d[None, None, :], mask=inside, other=0.0).to(tl.float32)
    if rest:
        z = tl.load(source + R + e[None, None, :], mask=behind, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(x * x, 2) + tl.sum(y * y, 2)
        if rest:
            squares += tl.sum(z * z, 2)
        factor = tl.rsqrt(squares / D + eps)[:, :, None]
        x, y = _normed(x, factor, norm, d, half, dtype), _normed(y, factor, norm + half, d, half, dtype)
        if rest:
            z = _normed(z, factor, norm + R, e, rest, dtype)
    angle = tl.load(rotary_rows + token, mask=ok, other=0)[:, None] * R + d[None, :]
    pair_ok = ok[:, None] & (d < half)[None, :]
    cos = tl.load(cos_sin + angle, mask=pair_ok, other=1.0)[:, None, :]
    sin = tl.load(cos_sin + half + angle, mask=pair_ok, other=0.0)[:, None, :]
    x, y = round_to(x * cos - y * sin, dtype), round_to(y * cos + x * sin, dtype)
    if is_q:
        to = q_out + row * Q_HEADS * D + (head * D)[None, :, None]
        tl.store(to + d[None, None, :], x.to(dtype), mask=inside)
        tl.store(to + half + d[None, None, :], y.to(dtype), mask=inside)
        if rest:
            tl.store(to + R + e[None, None, :], z.to(dtype), mask=behind)
    else:
        x, y = finite(x), finite(y)
        most = tl.maximum(tl.max(tl.abs(x), 2), tl.max(tl.abs(y), 2))
        if rest:
            z = finite(z)
            most = tl.maximum(most, tl.max(tl.abs(z), 2))
        if PER_HEAD:
            by = _store_scales(most, ok, k_scales, scale_at, head, scale_head_stride, LIMIT, FLOOR)[:, :, None]
        elif BY_LAYER:
            by = _head_scales(k_scale, head, K_STRIDE)
        else:
            by = 1.0
        at = (block * block_stride + offset * k_token_stride)[:, None, None] + (head * D)[None, :, None]
        store_codes(x, inside, k_cache, at + d[None, None, :], by, LIMIT)
        store_codes(y, inside, k_cache, at + half + d[None, None, :], by, LIMIT)
        if rest:
            store_codes(z, behind, k_cache, at + R + e[None, None, :], by, LIMIT)


def rope_write_kv(q: Tensor, k: Tensor, v: Tensor, rope: Rope, cache: LayerCache, slots: Tensor) -> Tensor:
    tokens, q_heads, dim = q.shape
    kv_heads, (norms, cos_sin, rows), views = k.shape[1], rope, cache.views
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    rotated = cos_sin.shape[1]
    k_cache, v_cache, scales = views["k"], views["v"], views.get("k_scale")
    per_cta, heads, warps = next(rest for most, *rest in TILES if tokens <= most)
    heads = math.gcd(heads, q_heads, kv_heads)
    launch(_rope_write_kv, ((q_heads + 2 * kv_heads) // heads, triton.cdiv(tokens, per_cta)),
        q, k, v, out, k_cache, v_cache, views.get("k_scale"), views.get("v_scale"),
        norms.q if norms else None, norms.k if norms else None, cos_sin, rows, slots, tokens, norms.eps if norms else 0.0,
        cache.k_scale, cache.v_scale, q.stride(0), k.stride(0), v.stride(0), *cache_strides(views),
        Q_HEADS=q_heads, KV_HEADS=kv_heads, D=dim, DP=power_of_2(dim), R=rotated, HALF=power_of_2(rotated // 2),
        BLOCK_SIZE=k_cache.shape[1], TOKENS=per_cta, HEADS=heads, NORM=norms is not None, PER_HEAD=scales is not None,
        BY_DIM=v_cache.stride(3) != 1, **head_strides(cache), LIMIT=FP8_MAX.get(k_cache.dtype, 1.0), FLOOR=SCALE_FLOOR,
        num_warps=warps,
    )  # fmt: skip
    return out
