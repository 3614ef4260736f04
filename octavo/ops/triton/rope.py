"""Between the QKV product and attention, in one pass: head norms, rotary embedding, and the write into the paged cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kvcache import Views
from octavo.ops.contract import HeadNorms
from octavo.ops.reference import SCALE_FLOOR
from octavo.ops.triton.launch import overlap, power_of_2, release, round_to, to_fp8, wait
from octavo.platform import FP8_MAX

__all__ = ["rope_write_kv"]

HEADS = 8  # of one token that a program takes


@triton.jit
def _store_cache(
    x, row_mask, mask, cache, scales, address, scale_address, layer_scale,
    FP8: tl.constexpr, PER_HEAD: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    x = tl.where(tl.abs(x) < float("inf"), x, 0.0)  # NaN too: the cache holds finite values only
    if FP8:
        if PER_HEAD:
            s = tl.maximum(tl.div_rn(tl.max(tl.abs(x), 1), LIMIT), FLOOR)
            tl.store(scales + scale_address, s, mask=row_mask)
            x = x / s[:, None]
        else:
            x = x / layer_scale
        tl.store(cache + address, to_fp8(x, LIMIT, cache.dtype.element_ty), mask=mask)
    else:
        tl.store(cache + address, x.to(cache.dtype.element_ty), mask=mask)


@triton.jit
def _rope_write_kv(
    q, k, v, q_out, k_cache, v_cache, k_scales, v_scales, q_norm, k_norm, cos_sin, positions, slots,
    eps, k_scale, v_scale, qs, ks, vs, block_stride, token_stride, scale_block_stride, scale_token_stride,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr, FP8: tl.constexpr, PER_HEAD: tl.constexpr,
    LIMIT: tl.constexpr, FLOOR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)  # queries, then keys, then values
    d = tl.arange(0, DP)
    is_q, is_v = head < Q_HEADS, head >= Q_HEADS + KV_HEADS
    is_k = (head >= Q_HEADS) & (head < Q_HEADS + KV_HEADS)
    kv_head = tl.where(is_v, head - Q_HEADS - KV_HEADS, head - Q_HEADS)
    known = head < Q_HEADS + 2 * KV_HEADS
    half: tl.constexpr = R // 2
    partner = tl.where(d < half, d + half, tl.where(d < R, d - half, d))
    wait(PDL)
    position = tl.load(positions + token)
    slot = tl.load(slots + token).to(tl.int64)
    mine, other = d[None, :], partner[None, :]
    inside = d[None, :] < D
    from_q, from_k, from_v = is_q[:, None] & inside, is_k[:, None] & inside, (is_v & known)[:, None] & inside
    q_at, k_at, v_at = q + token * qs + head[:, None] * D, k + token * ks + kv_head[:, None] * D, v + token * vs
    x = tl.load(q_at + mine, mask=from_q, other=0.0).to(tl.float32)
    x += tl.load(k_at + mine, mask=from_k, other=0.0).to(tl.float32)
    x += tl.load(v_at + kv_head[:, None] * D + mine, mask=from_v, other=0.0).to(tl.float32)
    y = tl.load(q_at + other, mask=from_q, other=0.0).to(tl.float32)
    y += tl.load(k_at + other, mask=from_k, other=0.0).to(tl.float32)
    release(PDL)
    dtype: tl.constexpr = q.dtype.element_ty
    if NORM:
        factor = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        w = tl.load(q_norm + mine, mask=from_q, other=0.0).to(tl.float32)
        w += tl.load(k_norm + mine, mask=from_k, other=0.0).to(tl.float32)
        u = tl.load(q_norm + other, mask=from_q, other=0.0).to(tl.float32)
        u += tl.load(k_norm + other, mask=from_k, other=0.0).to(tl.float32)
        x = tl.where(is_v[:, None], x, round_to(round_to(x * factor, dtype) * w, dtype))
        y = round_to(round_to(y * factor, dtype) * u, dtype)
    angle = tl.where(d < half, d, d - half)
    turned = d < R
    cos = tl.load(cos_sin + position * R + angle, mask=turned, other=1.0)
    sin = tl.load(cos_sin + position * R + half + angle, mask=turned, other=0.0)
    sin = tl.where(d < half, -sin, sin)
    x = tl.where(is_v[:, None], x, round_to(x * cos[None, :] + y * sin[None, :], dtype))
    tl.store(q_out + (token * Q_HEADS + head[:, None]) * D + mine, x.to(dtype), mask=from_q)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    address = block * block_stride + offset * token_stride + kv_head[:, None] * D + mine
    scale_address = block * scale_block_stride + offset * scale_token_stride + kv_head
    _store_cache(x, is_k, from_k, k_cache, k_scales, address, scale_address, k_scale, FP8, PER_HEAD, LIMIT, FLOOR)
    _store_cache(x, is_v & known, from_v, v_cache, v_scales, address, scale_address, v_scale, FP8, PER_HEAD, LIMIT, FLOOR)


def rope_write_kv(
    q: Tensor, k: Tensor, v: Tensor, norms: HeadNorms | None, cos_sin: Tensor, positions: Tensor,
    views: Views, slots: Tensor, k_scale: float, v_scale: float,
) -> Tensor:  # fmt: skip
    tokens, q_heads, dim = q.shape
    kv_heads = k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    fp8 = views["k"].dtype if views["k"].dtype in FP8_MAX else None
    scales = views.get("k_scale")
    heads = min(HEADS, power_of_2(q_heads + 2 * kv_heads))
    grid = (tokens, triton.cdiv(q_heads + 2 * kv_heads, heads))
    _rope_write_kv[grid](
        q, k, v, out, views["k"], views["v"], views.get("k_scale", cos_sin), views.get("v_scale", cos_sin),
        norms.q if norms else cos_sin, norms.k if norms else cos_sin, cos_sin, positions, slots,
        norms.eps if norms else 0.0, k_scale, v_scale, q.stride(0), k.stride(0), v.stride(0),
        views["k"].stride(0), views["k"].stride(1), scales.stride(0) if scales is not None else 0,
        scales.stride(1) if scales is not None else 0,
        Q_HEADS=q_heads, KV_HEADS=kv_heads, D=dim, DP=power_of_2(dim), R=cos_sin.shape[1],
        BLOCK_SIZE=views["k"].shape[1], HEADS=heads, NORM=norms is not None, FP8=fp8 is not None,
        PER_HEAD=scales is not None, LIMIT=FP8_MAX[fp8] if fp8 else 1.0, FLOOR=SCALE_FLOOR, num_warps=4, **overlap(),
    )  # fmt: skip
    return out
