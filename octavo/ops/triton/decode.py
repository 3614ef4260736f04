"""Attention of single new tokens over the paged cache, where reading keys and values is all the time there is.

A program takes one request, one key head with all the query heads that share it, and one part of the context (split-KV): the
cache is read once. FP8 codes are read as such and become FP16, which holds each exactly; their scale is applied to the sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.kvcache import Views
from octavo.ops.triton.launch import device_units, overlap, power_of_2, release, wait
from octavo.platform import FP8_MAX

__all__ = ["decode_attention"]

LOG2E = 1.4426950408889634


@triton.jit
def widen(x):
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 lo, hi;
        mov.b32 {lo, hi}, $2;
        cvt.rn.f16x2.e4m3x2 $0, lo;
        cvt.rn.f16x2.e4m3x2 $1, hi;
        }""",
        "=r,=r,r", [x.to(tl.uint8, bitcast=True)], dtype=tl.float16, is_pure=True, pack=4,
    )


@triton.jit
def _decode_attention(
    q, k, v, k_scales, v_scales, tables, seq_lens, out, parts, sums,
    qk_scale, v_scale, table_width, block_stride, token_stride, scale_block_stride, scale_token_stride,
    Q_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr, PER_HEAD: tl.constexpr,
    FP8: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr, KMODE: tl.constexpr = 0, VMODE: tl.constexpr = 0,
):  # fmt: skip
    request, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    head = kv_head * GROUP + row
    wide: tl.constexpr = tl.float16 if FP8 else k.dtype.element_ty
    wait(PDL)
    length = tl.load(seq_lens + request)
    low = tl.maximum(length - WINDOW, 0) if WINDOW else 0
    first = low // TILE
    per_split = tl.cdiv(tl.cdiv(length, TILE) - first, SPLITS)
    begin, end = first + split * per_split, min(first + (split + 1) * per_split, tl.cdiv(length, TILE))
    q_at = (request.to(tl.int64) * Q_HEADS + head[:, None]) * D + d[None, :]
    row_ok = (row < GROUP)[:, None] & (d < D)[None, :]
    query = tl.load(q + q_at, mask=row_ok, other=0.0)
    if FP8:
        query = tl.clamp(query.to(tl.float32), -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    if KMODE == 2:
        q_scale = tl.max(tl.abs(query), 1) / 448.0 + 1e-20
        query = query / q_scale[:, None]
        q_hi = query.to(k.dtype.element_ty)
        q_lo = ((query - q_hi.to(tl.float32)) * 16.0).to(k.dtype.element_ty)
        qk_factor = (q_scale * qk_scale)[:, None]
    else:
        query = query.to(wide)
        qk_factor = qk_scale
    acc = tl.zeros((ROWS, DP), tl.float32)
    peak = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    d_ok = (d < D)[None, :]
    for tile in tl.range(begin, end, num_stages=STAGES):
        at = tile * TILE + tl.arange(0, TILE)
        block = tl.load(tables + request.to(tl.int64) * table_width + at // BLOCK_SIZE, mask=at < length, other=0).to(tl.int64)
        slot = block * block_stride + (at % BLOCK_SIZE) * token_stride + kv_head * D
        ok = (at < length)[:, None] & d_ok
        keys = tl.load(k + slot[:, None] + d[None, :], mask=ok, other=0.0)
        values = tl.load(v + slot[:, None] + d[None, :], mask=ok, other=0.0)
        if KMODE == 2:
            kt = tl.trans(keys)
            score = tl.dot(q_hi, kt) * qk_factor + tl.dot(q_lo, kt) * (qk_factor * 0.0625)
        elif KMODE == 1:
            score = tl.dot(query, tl.trans(widen(keys)), input_precision="ieee") * qk_factor
        else:
            score = tl.dot(query, tl.trans(keys.to(wide)), input_precision="ieee") * qk_factor
        if PER_HEAD:
            place = block * scale_block_stride + (at % BLOCK_SIZE) * scale_token_stride + kv_head
            score *= tl.load(k_scales + place, mask=at < length, other=0.0)[None, :]
        seen = (at < length) & (at >= low)
        score = tl.where(seen[None, :], score, -1e30)
        higher = tl.maximum(peak, tl.max(score, 1))
        p = tl.where(seen[None, :], tl.exp2(score - higher[:, None]), 0.0)
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(p, 1)
        peak = higher
        if PER_HEAD:
            p *= tl.load(v_scales + place, mask=at < length, other=0.0)[None, :]
        if VMODE == 1:
            acc = acc * shrink[:, None] + tl.dot(p.to(wide), widen(values), input_precision="ieee")
        else:
            acc = acc * shrink[:, None] + tl.dot(p.to(wide), values.to(wide), input_precision="ieee")
    release(PDL)
    if SPLITS == 1:
        y = acc * (v_scale / total)[:, None]
        tl.store(out + q_at, y.to(out.dtype.element_ty), mask=row_ok)
    else:
        place = (request.to(tl.int64) * Q_HEADS + head) * SPLITS + split
        tl.store(parts + place[:, None] * DP + d[None, :], acc, mask=(row < GROUP)[:, None])
        tl.store(sums + place * 2, peak, mask=row < GROUP)
        tl.store(sums + place * 2 + 1, total, mask=row < GROUP)


@triton.jit
def _merge_splits(parts, sums, out, v_scale, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr, SP: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)  # of a request
    d = tl.arange(0, DP)
    split = tl.arange(0, SP)
    wait(PDL)
    ok = split < SPLITS
    peak = tl.load(sums + (head * SPLITS + split) * 2, mask=ok, other=-1e30)
    total = tl.load(sums + (head * SPLITS + split) * 2 + 1, mask=ok, other=0.0)
    part = tl.load(parts + (head * SPLITS + split[:, None]) * DP + d[None, :], mask=ok[:, None], other=0.0)
    release(PDL)
    weight = tl.exp2(peak - tl.max(peak, 0))
    y = tl.sum(part * weight[:, None], 0) * (v_scale / tl.sum(total * weight, 0))
    tl.store(out + head * D + d, y.to(out.dtype.element_ty), mask=d < D)


def splits_for(requests: int, kv_heads: int, longest: int, tile: int) -> int:
    """Parts of a context, so that there are a few programs a multiprocessor and none has less than a tile or two."""
    programs = requests * kv_heads
    wanted = max(1, 4 * device_units() // programs)
    return min(power_of_2(wanted), 64, max(1, triton.cdiv(longest, 2 * tile)))


def decode_attention(
    q: Tensor, out: Tensor, views: Views, batch: ForwardBatch, requests: int, longest: int, scale: float, window: int | None,
    k_scale: float, v_scale: float, config: dict[str, int] | None = None,
) -> None:  # fmt: skip
    """Rows [0, requests) of q and out [T, H, D]: the first `requests` requests of the batch, which have one token each."""
    heads, dim = q.shape[1:]
    k = views["k"]
    kv_heads, group = k.shape[2], heads // k.shape[2]
    fp8 = k.dtype in FP8_MAX
    scales = views.get("k_scale")
    c = {"TILE": 64, "warps": 4, "stages": 2 if fp8 else 3} | (config or {})
    splits = c.get("splits") or splits_for(requests, kv_heads, longest, c["TILE"])
    dp = power_of_2(dim, 16)
    parts, sums = out, out  # not used
    if splits > 1:
        parts = torch.empty(requests * heads * splits * dp, dtype=torch.float32, device=q.device)
        sums = torch.empty(requests * heads * splits * 2, dtype=torch.float32, device=q.device)
    per_head = scales is not None
    _decode_attention[(requests, kv_heads, splits)](
        q, k, views["v"], views.get("k_scale", q), views.get("v_scale", q), batch.block_tables, batch.seq_lens, out, parts, sums,
        scale * LOG2E * (1.0 if per_head or not fp8 else k_scale), 1.0 if per_head or not fp8 else v_scale,
        batch.block_tables.stride(0), k.stride(0), k.stride(1), scales.stride(0) if scales is not None else 0,
        scales.stride(1) if scales is not None else 0, Q_HEADS=heads, GROUP=group, ROWS=power_of_2(group, 16), D=dim, DP=dp,
        BLOCK_SIZE=k.shape[1], TILE=c["TILE"], SPLITS=splits, WINDOW=window or 0, PER_HEAD=per_head, FP8=fp8,
        STAGES=c["stages"], num_warps=c["warps"], KMODE=c.get("K", 0), VMODE=c.get("V", 0), **overlap(),
    )  # fmt: skip
    if splits > 1:
        _merge_splits[(requests * heads,)](
            parts, sums, out, 1.0 if per_head or not fp8 else v_scale, D=dim, DP=dp, SPLITS=splits, SP=power_of_2(splits),
            num_warps=1 if splits * dp <= 1024 else 4, **overlap(),
        )  # fmt: skip
