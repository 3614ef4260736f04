"""Decode attention: one new token per request over the paged cache, bound by reading keys and values.

A CTA computes one request, one KV head with all its query heads (GQA), and one part of the context (split-KV), so the cache is
read once. The context is the M side of the tensor core's tile and the query heads the narrow N side, so keys and values are
multiplied as stored. Over FP8 codes the other operand must be FP8 too: queries and probabilities are split into a code and the
code of the residual, which together keep 8 bits like BF16. The two are adjacent columns of one product, so 8 heads fill the
minimum of 16 columns.

Given the QKV projection's output, the kernel also does the work of `rope_write_kv`: every CTA rotates its queries, and the CTA
whose part of the context ends with the new token first writes that token's key and value to the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.kvcache import LayerCache
from octavo.ops.contract import Rope
from octavo.ops.reference import SCALE_FLOOR
from octavo.ops.triton.launch import (
    cache_strides,
    codes,
    device_units,
    head_strides,
    launch,
    pipeline,
    power_of_2,
    release,
    shared_memory,
    wait,
)
from octavo.ops.triton.rope import norm_rotate, write_new
from octavo.platform import FP8_MAX

__all__ = ["SHARING", "New", "decode_attention", "decode_variant"]

LOG2E = 1.4426950408889634
MAX_COUNTERS = 1 << 14


@triton.jit
def _product(a, b, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr, CODE: tl.constexpr):
    """a [M, K] times FP32 b [K, N], converted to CODE; for FP8, each value's code and the code of its residual are adjacent
    columns.
    """
    if CODE.primitive_bitwidth == 8:
        high = b.to(CODE).to(tl.float32)
        # Rounded after the reshape, although this rounds `high` twice: the compiler turns a reshape right before a product into
        # a layout of shared memory, which on sm_90 it either rejects or gets wrong (seen in Triton 3.6).
        both = tl.reshape(tl.join(high, (b - high) * 16.0), (K, 2 * N)).to(CODE)
        high_y, low_y = tl.split(tl.reshape(tl.dot(a, both), (M, N, 2)))  # adjacent columns are held by one thread
        return high_y + low_y * 0.0625
    return tl.dot(a, b.to(CODE), input_precision="ieee")


@triton.jit
def _decode_attention(
    q, k, v, k_scales, v_scales, tables, seq_lens, out, parts, sums, counters,
    new_k, new_v, q_norm, k_norm, cos_sin, rotary_rows, slots, eps, q_stride, kv_stride,
    qk_scale, k_scale, v_scale, table_width, block_stride, k_token_stride, v_token_stride, v_head_stride, v_dim_stride,
    scale_block_stride, scale_token_stride, scale_head_stride,
    Q_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr, PER_HEAD: tl.constexpr,
    CODE: tl.constexpr, LIMIT: tl.constexpr, NEW: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr, KV_LIMIT: tl.constexpr,
    K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, FLOOR: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    kv_head, split, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(1)
    FP8: tl.constexpr = CODE.primitive_bitwidth == 8
    row = tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    head = kv_head * GROUP + row
    release(PDL)
    wait(PDL)
    length = tl.load(seq_lens + request)  # 0 for a row that pads a graph: no tiles are read
    k_by, v_by = 1.0, 1.0
    if FP8:
        if not PER_HEAD:
            k_by, v_by = tl.load(k_scale + kv_head * K_STRIDE), tl.load(v_scale + kv_head * V_STRIDE)
    low = tl.maximum(length - WINDOW, 0) if WINDOW else 0
    first = low // TILE
    per_split = tl.cdiv(tl.cdiv(length, TILE) - first, splits)
    begin, end = first + split * per_split, min(first + (split + 1) * per_split, tl.cdiv(length, TILE))
    q_at = (request.to(tl.int64) * Q_HEADS + head[None, :]) * D + d[:, None]
    q_ok = (row < GROUP)[None, :] & (d < D)[:, None]
    if NEW:
        token = request.to(tl.int64)
        angles = cos_sin + tl.load(rotary_rows + request) * R
        query = norm_rotate(q + token * q_stride + (head * D)[None, :], q_ok, q_norm, eps, angles, d, D, R, NORM)
        if (end > begin) & (end == tl.cdiv(length, TILE)):
            ok = (d < D)[:, None] & (tl.arange(0, 1) == 0)[None, :]
            slot = tl.load(slots + request).to(tl.int64)
            block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
            base = block * block_stride
            place = block * scale_block_stride + offset * scale_token_stride + kv_head * scale_head_stride
            source = token * kv_stride + kv_head * D + tl.arange(0, 1)[None, :]
            at = base + offset * k_token_stride + kv_head * D + d[:, None]
            key = norm_rotate(new_k + source, ok, k_norm, eps, angles, d, D, R, NORM)
            write_new(key, ok, k, at, k_by, k_scales + place, PER_HEAD, KV_LIMIT, FLOOR)
            at = base + offset * v_token_stride + kv_head * v_head_stride + d[:, None] * v_dim_stride
            value = tl.load(new_v + source + d[:, None], mask=ok, other=0.0).to(tl.float32)
            write_new(value, ok, v, at, v_by, v_scales + place, PER_HEAD, KV_LIMIT, FLOOR)
        tl.debug_barrier()  # the new key and value are read below by other threads
    else:
        query = tl.load(q + q_at, mask=q_ok, other=0.0).to(tl.float32)
    factor = tl.full((ROWS,), 1.0, tl.float32) * (qk_scale * k_by)
    if FP8:
        q_scale = tl.maximum(tl.max(tl.abs(query), 0) / (LIMIT * 0.5), 1e-12)  # headroom for 16 times the residual
        factor *= q_scale
        query = query / q_scale[None, :]
    acc = tl.zeros((DP, ROWS), tl.float32)
    peak = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((TILE, ROWS), tl.float32)
    run: tl.constexpr = min(BLOCK_SIZE & -BLOCK_SIZE, 16)
    for tile in tl.range(begin, end, num_stages=STAGES):
        at = tile * TILE + tl.arange(0, TILE)
        index = at // BLOCK_SIZE
        # No mask over tokens: memory past the context is another request's or the scratch block, and finite; its weight is 0.
        block = tl.load(tables + request.to(tl.int64) * table_width + index, mask=index < table_width, other=0).to(tl.int64)
        base, offset = block * block_stride, at % BLOCK_SIZE
        k_at = (base + offset * k_token_stride + kv_head * D)[:, None] + d[None, :]
        v_slot = base + offset * v_token_stride + kv_head * v_head_stride
        if FP8:  # a block's tokens are contiguous in the values
            v_slot = tl.max_contiguous(tl.multiple_of(v_slot, run), run)
        v_at = v_slot[None, :] + d[:, None] * v_dim_stride
        if DP == D:
            keys, values = tl.load(k + k_at), tl.load(v + v_at)
        else:
            keys = tl.load(k + k_at, mask=(d < D)[None, :], other=0.0)
            values = tl.load(v + v_at, mask=(d < D)[:, None], other=0.0)
        score = _product(keys, query, TILE, DP, ROWS, CODE) * factor[None, :]
        seen = (at < length) & (at >= low)
        place = block * scale_block_stride + offset * scale_token_stride + kv_head * scale_head_stride
        if PER_HEAD:
            score *= tl.load(k_scales + place)[:, None]
        score = tl.where(seen[:, None], score, -1e30)
        higher = tl.maximum(peak, tl.max(score, 0))
        p = tl.exp2(score - higher[None, :])
        shrink = tl.exp2(peak - higher)
        total = total * shrink[None, :] + p
        peak = higher
        gain = 1.0
        if PER_HEAD:  # the tile's largest scale is factored out, so that p keeps the codes' range
            by_token = tl.where(seen, tl.load(v_scales + place), 0.0)
            gain = tl.maximum(tl.max(by_token, 0), 1e-30)
            p *= (by_token / gain)[:, None]
        if FP8:
            acc = acc * shrink[None, :] + _product(values, p * 128.0, DP, TILE, ROWS, CODE) * (gain / 128.0)
        else:
            acc = acc * shrink[None, :] + _product(values, p, DP, TILE, ROWS, CODE)
    sum_of_p = tl.sum(total, 0)
    if SPLIT:  # the last CTA of a head to finish merges the parts, in a fixed order
        one = (request * tl.num_programs(0) + kv_head) * splits
        place = d[:, None] * ROWS + row[None, :]
        tl.store(parts + (one + split) * DP * ROWS + place, acc)
        tl.store(sums + (one + split) * 2 * ROWS + row, peak)
        tl.store(sums + (one + split) * 2 * ROWS + ROWS + row, sum_of_p)
        tl.debug_barrier()  # all threads' partial sums are written before the CTA counts itself
        counter = counters + request * tl.num_programs(0) + kv_head
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") != splits - 1:
            return
        tl.store(counter, 0)  # reset for the next launch
        acc = tl.zeros((DP, ROWS), tl.float32)
        peak = tl.full((ROWS,), -1e30, tl.float32)
        sum_of_p = tl.zeros((ROWS,), tl.float32)
        for part in range(splits):
            part_peak = tl.load(sums + (one + part) * 2 * ROWS + row, cache_modifier=".cg")
            part_sum = tl.load(sums + (one + part) * 2 * ROWS + ROWS + row, cache_modifier=".cg")
            higher = tl.maximum(peak, part_peak)
            old, new = tl.exp2(peak - higher), tl.exp2(part_peak - higher)
            sum_of_p = sum_of_p * old + part_sum * new
            acc = acc * old[None, :] + tl.load(parts + (one + part) * DP * ROWS + place, cache_modifier=".cg") * new[None, :]
            peak = higher
    sum_of_p = tl.where(length > 0, sum_of_p, 1.0)
    tl.store(out + q_at, (acc * (v_by / sum_of_p)[None, :]).to(out.dtype.element_ty), mask=q_ok)


_counters: dict[torch.device, Tensor] = {}


def _workspace(device: torch.device, ctas: int, rows: int, dp: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split-KV workspace: partial sums, their maxima and totals, and zeroed counters, which every launch resets to zero."""
    if device not in _counters:
        _counters[device] = torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device)
    assert ctas <= 2 * MAX_COUNTERS, "a context is split only if there are few CTAs"
    parts = torch.empty(ctas * rows * dp, dtype=torch.float32, device=device)
    return parts, torch.empty(ctas * rows * 2, dtype=torch.float32, device=device), _counters[device]


SHARING = {128: 3, 64: 4}  # CTAs resident per SM, by tile size; twice as many where a key has up to HALF bytes
HALF = 64  # an FP8 cache's heads of 64 dimensions; BF16's, of 128 bytes, are slower with more CTAs


def _resident(tile: int, width: int) -> int:
    """CTAs that are resident at once. width: bytes of a token's key."""
    return SHARING[tile] * (1 + (width <= HALF)) * device_units()


def _tile(requests: int, kv_heads: int, width: int) -> int:
    """Context tokens per tile: 64 where that many CTAs are just resident at once, or where there are many waves of them."""
    ctas, large, small = requests * kv_heads, _resident(128, width), _resident(64, width)
    return 128 if ctas <= large or small < ctas <= 2 * small else 64


def splits_for(requests: int, kv_heads: int, width: int, longest: int, tile: int) -> int:
    """Number of splits of a context, so that all CTAs are resident at once and none has less than about two tiles."""
    wanted = max(1, _resident(tile, width) // (requests * kv_heads))
    return min(wanted, 64, -(-longest // (2 * tile)))


def decode_variant(requests: int, kv_heads: int, width: int, longest: int) -> int:
    """The numbers of splits for both tile sizes, which determine the launch."""
    few, more = (splits_for(requests, kv_heads, width, longest, tile) for tile in SHARING)
    return few << 8 | more


class New(NamedTuple):
    """A step's new tokens: keys and values [T, H', D] not yet in the cache, the rotary embedding and norms, and the slots."""

    k: Tensor
    v: Tensor
    rope: Rope
    slots: Tensor


def decode_attention(
    q: Tensor, out: Tensor, cache: LayerCache, batch: ForwardBatch, requests: int, longest: int, scale: float,
    window: int | None, config: dict[str, int] | None = None, new: New | None = None,
) -> None:  # fmt: skip
    """Compute rows [0, requests) of q and out [T, H, D]: the batch's first `requests` requests, which have one token each.

    With `new`, q is not rotated yet. The row of a request without a context becomes zeros.
    """
    heads, dim = q.shape[1:]
    views = cache.views
    k, v = views["k"], views["v"]
    kv_heads, group = k.shape[2], heads // k.shape[2]
    fp8 = k.dtype in FP8_MAX
    scales = views.get("k_scale")
    dp, width = power_of_2(dim, 32), dim * k.element_size()
    large = 4 * 128 * dp * k.element_size() > shared_memory() // 2  # two stages of keys and values, two CTAs per SM
    c = {"TILE": 64 if large else _tile(requests, kv_heads, width), "warps": 4, "stages": 2} | (config or {})
    splits = c.get("splits") or splits_for(requests, kv_heads, width, longest, c["TILE"])
    rows = power_of_2(group, 8 if fp8 else 16)
    parts, sums, counters = _workspace(q.device, requests * kv_heads * splits, rows, dp) if splits > 1 else (out, out, out)
    launch(_decode_attention, (kv_heads, splits, requests),
        q, k, v, views.get("k_scale", q), views.get("v_scale", q), batch.block_tables, batch.seq_lens, out,
        parts, sums, counters, *_new_arguments(q, new), scale * LOG2E, cache.k_scale, cache.v_scale,
        batch.block_tables.stride(0), *cache_strides(views),
        Q_HEADS=heads, GROUP=group, ROWS=rows, D=dim, DP=dp, BLOCK_SIZE=k.shape[1],
        TILE=c["TILE"], SPLIT=splits > 1, WINDOW=window or 0, PER_HEAD=scales is not None, **codes(k.dtype),
        NEW=new is not None, R=new.rope.cos_sin.shape[1] if new else 0, NORM=new is not None and new.rope.norms is not None,
        KV_LIMIT=FP8_MAX.get(k.dtype, 1.0), **head_strides(cache), FLOOR=SCALE_FLOOR,
        STAGES=pipeline(c["stages"]), num_warps=c["warps"],
    )  # fmt: skip


def _new_arguments(q: Tensor, new: New | None) -> tuple[Tensor | float | None, ...]:
    if new is None:
        return *(None,) * 7, 0.0, 0, 0
    assert new.k.stride(0) == new.v.stride(0)
    norms, cos_sin, rows = new.rope
    gains, eps = ((norms.q, norms.k), norms.eps) if norms else ((None, None), 0.0)
    return new.k, new.v, *gains, cos_sin, rows, new.slots, eps, q.stride(0), new.k.stride(0)
