"""Between the QKV product and attention, in one pass: head norms, rotary embedding, and the write into the paged cache."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kvcache import Views
from octavo.ops.contract import HeadNorms
from octavo.ops.reference import SCALE_FLOOR
from octavo.ops.triton.launch import cache_strides, overlap, power_of_2, release, round_to, to_fp8, wait
from octavo.platform import FP8_MAX

__all__ = ["rope_write_kv"]

TILES = ((32, 1, 8, 2), (512, 2, 8, 4), (1 << 31, 16, 4, 8))  # up to so many tokens: tokens and heads of a program, its warps


@triton.jit
def _store_cache(
    x, ok, cache, scales, base, head, head_stride, offset, token_stride, dim_stride, scale_at, layer_scale, d,
    D: tl.constexpr, FP8: tl.constexpr, PER_HEAD: tl.constexpr, BY_DIM: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """x [tokens, heads, DP] at the tokens' places."""
    x = tl.where(tl.abs(x) < float("inf"), x, 0.0)  # NaN too: the cache holds finite values only
    if FP8:
        if PER_HEAD:
            s = tl.maximum(tl.div_rn(tl.max(tl.abs(x), 2), LIMIT), FLOOR)
            tl.store(scales + scale_at[:, None] + head[None, :], s, mask=ok[:, None])
            x = x / s[:, :, None]
        else:
            x = x / layer_scale
        x = to_fp8(x, LIMIT, cache.dtype.element_ty)
    x = x.to(cache.dtype.element_ty)
    place = base + offset * token_stride
    if BY_DIM:  # turned, so that neighbouring threads write neighbouring tokens
        at = place[None, None, :] + (head * head_stride)[:, None, None] + (d * dim_stride)[None, :, None]
        tl.store(cache + at, tl.trans(x, 1, 2, 0), mask=ok[None, None, :] & (d < D)[None, :, None])
    else:
        at = place[:, None, None] + (head * head_stride)[None, :, None] + (d * dim_stride)[None, None, :]
        tl.store(cache + at, x, mask=ok[:, None, None] & (d < D)[None, None, :])


@triton.jit(do_not_specialize=["tokens"])
def _rope_write_kv(
    q, k, v, q_out, k_cache, v_cache, k_scales, v_scales, q_norm, k_norm, cos_sin, positions, slots,
    tokens, eps, k_scale, v_scale, q_stride, k_stride, v_stride, block_stride, k_token_stride, v_token_stride, v_head_stride,
    v_dim_stride, scale_block_stride, scale_token_stride,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr, FP8: tl.constexpr,
    PER_HEAD: tl.constexpr, BY_DIM: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * HEADS  # of queries, then keys, then values; a program has one kind
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    row = token.to(tl.int64)[:, None, None]
    d = tl.arange(0, DP)
    ok = token < tokens
    inside = ok[:, None, None] & (d < D)[None, None, :]
    wait(PDL)
    slot = tl.load(slots + token, mask=ok, other=0).to(tl.int64)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    scale_at = block * scale_block_stride + offset * scale_token_stride
    if first >= Q_HEADS + KV_HEADS:
        head = first - Q_HEADS - KV_HEADS + tl.arange(0, HEADS)
        x = tl.load(v + row * v_stride + (head * D)[None, :, None] + d[None, None, :], mask=inside, other=0.0).to(tl.float32)
        release(PDL)
        _store_cache(
            x, ok, v_cache, v_scales, block * block_stride, head, v_head_stride, offset, v_token_stride, v_dim_stride, scale_at,
            v_scale, d, D, FP8, PER_HEAD, BY_DIM, LIMIT, FLOOR,
        )  # fmt: skip
    else:
        is_q = first < Q_HEADS
        head = first + tl.arange(0, HEADS)
        source, norm = q + row * q_stride, q_norm
        if not is_q:
            head -= Q_HEADS
            source, norm = k + row * k_stride, k_norm
        half: tl.constexpr = R // 2
        partner = tl.where(d < half, d + half, tl.where(d < R, d - half, d))
        source += (head * D)[None, :, None]
        x = tl.load(source + d[None, None, :], mask=inside, other=0.0).to(tl.float32)
        y = tl.load(source + partner[None, None, :], mask=inside, other=0.0).to(tl.float32)
        release(PDL)
        dtype: tl.constexpr = q.dtype.element_ty
        if NORM:
            factor = tl.rsqrt(tl.sum(x * x, 2) / D + eps)[:, :, None]
            gain = tl.load(norm + d, mask=d < D, other=0.0).to(tl.float32)[None, None, :]
            gain_of_y = tl.load(norm + partner, mask=d < D, other=0.0).to(tl.float32)[None, None, :]
            x = round_to(round_to(x * factor, dtype) * gain, dtype)
            y = round_to(round_to(y * factor, dtype) * gain_of_y, dtype)
        position = tl.load(positions + token, mask=ok, other=0)[:, None]
        angle = tl.where(d < half, d, d - half)[None, :]
        turned = ok[:, None] & (d < R)[None, :]
        cos = tl.load(cos_sin + position * R + angle, mask=turned, other=1.0)
        sin = tl.load(cos_sin + position * R + half + angle, mask=turned, other=0.0)
        sin = tl.where((d < half)[None, :], -sin, sin)
        x = round_to(x * cos[:, None, :] + y * sin[:, None, :], dtype)
        if is_q:
            tl.store(q_out + row * Q_HEADS * D + (head * D)[None, :, None] + d[None, None, :], x.to(dtype), mask=inside)
        else:
            _store_cache(
                x, ok, k_cache, k_scales, block * block_stride, head, D, offset, k_token_stride, 1, scale_at,
                k_scale, d, D, FP8, PER_HEAD, False, LIMIT, FLOOR,
            )  # fmt: skip


def rope_write_kv(
    q: Tensor, k: Tensor, v: Tensor, norms: HeadNorms | None, cos_sin: Tensor, positions: Tensor,
    views: Views, slots: Tensor, k_scale: float, v_scale: float,
) -> Tensor:  # fmt: skip
    tokens, q_heads, dim = q.shape
    kv_heads = k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    k_cache, v_cache, scales = views["k"], views["v"], views.get("k_scale")
    per_program, heads, warps = next(rest for most, *rest in TILES if tokens <= most)
    heads = math.gcd(heads, q_heads, kv_heads)
    _rope_write_kv[((q_heads + 2 * kv_heads) // heads, triton.cdiv(tokens, per_program))](
        q, k, v, out, k_cache, v_cache, views.get("k_scale"), views.get("v_scale"),
        norms.q if norms else None, norms.k if norms else None, cos_sin, positions, slots,
        tokens, norms.eps if norms else 0.0, k_scale, v_scale, q.stride(0), k.stride(0), v.stride(0), *cache_strides(views),
        Q_HEADS=q_heads, KV_HEADS=kv_heads, D=dim, DP=power_of_2(dim), R=cos_sin.shape[1], BLOCK_SIZE=k_cache.shape[1],
        TOKENS=per_program, HEADS=heads, NORM=norms is not None, FP8=k_cache.dtype in FP8_MAX, PER_HEAD=scales is not None,
        BY_DIM=v_cache.stride(3) != 1, LIMIT=FP8_MAX.get(k_cache.dtype, 1.0), FLOOR=SCALE_FLOOR, num_warps=warps, **overlap(),
    )  # fmt: skip
    return out
