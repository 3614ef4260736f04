"""Prefill attention: the context is staged once, head by head, from its blocks; then flash attention runs on it.

Over an FP8 cache both products are FP8. Queries have a scale per row and head. Probabilities are quantized in the threads that
hold them: the accumulator's register layout differs from an FP8 operand's, so the values' tokens are staged in the matching
order instead. The FP8 tensor core's sum over a tile of keys, which has about 14 bits, is accumulated in FP32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.batch import ForwardBatch, Key, to_device
from octavo.kvcache import LayerCache
from octavo.ops.triton.decode import LOG2E
from octavo.ops.triton.launch import (
    cache_strides,
    codes,
    head_strides,
    launch,
    pipeline,
    power_of_2,
    registers,
    release,
    shared_memory,
    tiled,
    to_fp8,
    wait,
)
from octavo.platform import FP8_MAX

__all__ = ["prefill_attention"]

ALIGN = 128  # staged contexts are aligned to this many tokens


@triton.jit
def _operand_order(x, M: tl.constexpr, N: tl.constexpr):
    """Permute each 16 columns of x [M, N] from the accumulator's register layout to that of an FP8 operand.

    In a group of four threads, thread t holds columns 2t, 2t+1, 2t+8, 2t+9 of the accumulator and 4t to 4t+3 of the operand
    (PTX ISA, register fragments of wgmma). Any order is right if both factors have it.
    """
    return tl.reshape(tl.permute(tl.reshape(x, (M, N // 16, 2, 4, 2)), (0, 1, 3, 2, 4)), (M, N))


@triton.jit
def _stage_kv(
    k, v, k_scales, v_scales, k_out, v_out, tables, chunks, table_width, block_stride, k_token_stride, v_token_stride,
    v_head_stride, v_dim_stride, scale_block_stride, scale_token_stride, scale_head_stride, length,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, PER_HEAD: tl.constexpr,
    BY_DIM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Stage keys as [heads, length, DP] and values likewise, or FP8 values as [heads, DP, length]. BY_DIM: a block's tokens are
    contiguous.
    """
    chunk, kv_head = tl.program_id(0), tl.program_id(1)
    request, start, target = tl.load(chunks + chunk * 3), tl.load(chunks + chunk * 3 + 1), tl.load(chunks + chunk * 3 + 2)
    d = tl.arange(0, DP)
    at = start + tl.arange(0, TILE)
    run: tl.constexpr = min(BLOCK_SIZE & -BLOCK_SIZE, 16)
    wait(PDL)
    index = at // BLOCK_SIZE
    block = tl.load(tables + request.to(tl.int64) * table_width + index, mask=index < table_width, other=0).to(tl.int64)
    base, offset = block * block_stride, at % BLOCK_SIZE
    to = kv_head * length.to(tl.int64) * DP
    onto = (target + tl.arange(0, TILE)).to(tl.int64)
    place = block * scale_block_stride + offset * scale_token_stride + kv_head * scale_head_stride
    keys = tl.load(k + (base + offset * k_token_stride + kv_head * D)[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
    if PER_HEAD:
        keys = keys.to(tl.float32) * tl.load(k_scales + place)[:, None]
    tl.store(k_out + to + onto[:, None] * DP + d[None, :], keys.to(k_out.dtype.element_ty))
    v_slot = base + offset * v_token_stride + kv_head * v_head_stride
    if BY_DIM:
        v_slot = tl.max_contiguous(tl.multiple_of(v_slot, run), run)
        values = tl.load(v + v_slot[None, :] + d[:, None] * v_dim_stride, mask=(d < D)[:, None], other=0.0)
        if PER_HEAD:
            values = tl.trans(values.to(tl.float32) * tl.load(v_scales + place)[None, :])
    else:
        values = tl.load(v + v_slot[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
    if v_out.dtype.element_ty.primitive_bitwidth == 8:
        row = (kv_head * DP + d).to(tl.int64)
        tl.store(v_out + row[:, None] * length + onto[None, :], _operand_order(values, DP, TILE))
    else:
        tl.store(v_out + to + onto[:, None] * DP + d[None, :], values.to(v_out.dtype.element_ty))
    release(PDL)


@triton.jit
def _attend_tiles(
    acc, total, peak, query, k, v, k_row, v_row, staged, first, last, position, factor, window,
    BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key tiles [first, last)."""
    FP8: tl.constexpr = query.dtype.primitive_bitwidth == 8
    for tile in tl.range(first, last, num_stages=STAGES):
        score = tl.dot(query, k.load([k_row + tile * BN, 0]).T, input_precision="ieee")
        if MASKED:
            at = tile * BN + tl.arange(0, BN)
            seen = at[None, :] <= position[:, None]
            if WINDOW:
                seen = seen & (at[None, :] > position[:, None] - window)
            score = tl.where(seen, score, -1e30)
        higher = tl.maximum(peak, tl.max(score, 1) * factor)
        lift: tl.constexpr = 7.0 if FP8 else 0.0  # p up to 2**7: few values underflow, none overflows
        p = tl.exp2(score * factor[:, None] - (higher - lift)[:, None])
        if WINDOW:
            p = tl.where(seen, p, 0.0)
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(p, 1)
        peak = higher
        acc = acc * shrink[:, None]
        if FP8:
            values = v.load([v_row, staged + tile * BN]).T
            acc += tl.dot(_operand_order(p.to(query.dtype), BM, BN), values)
        else:
            values = v.load([k_row + tile * BN, 0])
            acc = tl.dot(p.to(query.dtype), values, acc, input_precision="ieee")
    return acc, total, peak


@triton.jit
def _prefill_attention(
    q, k, v, out, tiles, qk_scale, k_scale, v_scale, length,
    Q_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WINDOW: tl.constexpr, CODE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, LIMIT: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """k and v: tensor descriptors of the layouts that `_stage_kv` writes, in tiles [BN, DP], for FP8 values [DP, BN]."""
    which, head = tl.program_id(0), tl.program_id(1)
    first_row, rows = tl.load(tiles + which * 4), tl.load(tiles + which * 4 + 1)  # in q; number of rows
    start, staged = tl.load(tiles + which * 4 + 2), tl.load(tiles + which * 4 + 3)  # position of the first row, of its context
    m = tl.arange(0, BM)
    d = tl.arange(0, DP)
    q_at = ((first_row + m).to(tl.int64)[:, None] * Q_HEADS + head) * D + d[None, :]
    ok = (m < rows)[:, None] & (d < D)[None, :]
    position = start + m
    k_row, v_row = head // GROUP * length + staged, head // GROUP * DP
    wait(PDL)
    query = tl.load(q + q_at, mask=ok, other=0.0)
    if CODE.primitive_bitwidth == 8:
        wide = query.to(tl.float32)
        q_scale = tl.maximum(tl.max(tl.abs(wide), 1) / LIMIT, 1e-12)
        query = to_fp8(wide / q_scale[:, None], LIMIT, CODE)
        factor = q_scale * (qk_scale * tl.load(k_scale + head // GROUP * K_STRIDE))
    else:
        factor = tl.full((BM,), 1.0, tl.float32) * qk_scale
    acc = tl.zeros((BM, DP), tl.float32)
    peak = tl.full((BM,), -1e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    last = tl.cdiv(start + rows, BN)
    if WINDOW:
        first = tl.maximum(start - WINDOW + 1, 0) // BN
        acc, total, peak = _attend_tiles(
            acc, total, peak, query, k, v, k_row, v_row, staged, first, last, position, factor, WINDOW,
            BM, BN, True, True, STAGES,
        )  # fmt: skip
    else:
        whole = (start + 1) // BN
        acc, total, peak = _attend_tiles(
            acc, total, peak, query, k, v, k_row, v_row, staged, 0, whole, position, factor, 0, BM, BN, False, False, STAGES
        )
        acc, total, peak = _attend_tiles(
            acc, total, peak, query, k, v, k_row, v_row, staged, whole, last, position, factor, 0,
            BM, BN, True, False, STAGES,
        )  # fmt: skip
    release(PDL)
    if CODE.primitive_bitwidth == 8:
        y = acc * (tl.load(v_scale + head // GROUP * V_STRIDE) / total)[:, None]
    else:
        y = acc * (1.0 / total)[:, None]
    tl.store(out + q_at, y.to(out.dtype.element_ty), mask=ok)


@dataclass
class _Plan:
    """A step's prefills as tables for the kernels: computed once, used by every layer."""

    chunks: Tensor  # int32 [n, 3]: request, first position, staged position
    tiles: Tensor  # int32 [n, 4]: first row in q, rows, position of the first, start of the staged context; longest first
    length: int  # staged positions


@dataclass(frozen=True)
class _PlanKey(Key[_Plan]):
    first: int
    stop: int
    bm: int


def _plan(batch: ForwardBatch, first: int, stop: int, bm: int) -> _Plan:
    return batch.cache.get(_PlanKey(first, stop, bm), lambda: _make_plan(batch, first, stop, bm))


def _make_plan(batch: ForwardBatch, first: int, stop: int, bm: int) -> _Plan:
    chunks, tiles, staged = [], [], 0
    row = sum(batch.query_lens[:first])
    for request in range(first, stop):
        query, context = batch.query_lens[request], batch.context_lens[request]
        chunks += [(request, at, staged + at) for at in range(0, context, ALIGN)]
        tiles += [(row + at, min(bm, query - at), context - query + at, staged) for at in range(0, query, bm)]
        staged += -(-context // ALIGN) * ALIGN
        row += query
    tiles.sort(key=lambda t: -t[2])

    device = batch.input_ids.device
    return _Plan(to_device(chunks, torch.int32, device), to_device(tiles, torch.int32, device), staged)


# (queries and keys of a tile, warps, pipeline stages, registers per thread), fastest first, as measured on an H200.
_Tiles = tuple[tuple[int, int, int, int, int], ...]
_DEEP: _Tiles = (
    (64, 128, 4, 2, 168), (64, 64, 4, 3, 168), (64, 64, 4, 2, 168), (64, 64, 8, 2, 255), (64, 64, 8, 1, 255),
    (32, 32, 4, 1, 255),
)  # fmt: skip
_SHALLOW: _Tiles = (128, 32, 8, 2, 255), (32, 32, 4, 2, 255), (32, 32, 4, 1, 255)  # no spills when compiled for AMD GPUs
SUMS = 64 * 32  # FP32 accumulators that a warp's threads can hold without spilling


def _tiles(dp: int, dtype: torch.dtype) -> dict[str, int]:
    """The first tile sizes that fit into shared memory. FP32, for small models, uses the smallest tile, being short of
    registers.
    """

    def fits(bm: int, bn: int, warps: int, stages: int, _: int) -> bool:
        held = dp * dtype.itemsize * (bm + 2 * stages * bn)
        return stages <= pipeline(stages) and held <= shared_memory() and bm * dp <= SUMS * warps

    tried = _SHALLOW if pipeline(3) < 3 else _DEEP if dtype.itemsize == 1 else _DEEP[1:]
    tried = tried[-1:] if dtype.itemsize > 2 else tried
    chosen = next((t for t in tried if fits(*t)), tried[-1])
    return dict(zip(("BM", "BN", "warps", "stages", "registers"), chosen, strict=True))


def prefill_attention(
    q: Tensor, out: Tensor, cache: LayerCache, batch: ForwardBatch, first: int, stop: int, scale: float, window: int | None,
    config: dict[str, int] | None = None,
) -> None:  # fmt: skip
    """Compute the rows of q and out [T, H, D] that belong to requests [first, stop)."""
    heads, dim = q.shape[1:]
    views = cache.views
    k, v = views["k"], views["v"]
    kv_heads, scales = k.shape[2], views.get("k_scale")
    by_dim = k.dtype in FP8_MAX
    fp8 = by_dim and scales is None  # per-token-and-head scales are applied while staging, in q's dtype
    dtype, dp = k.dtype if fp8 else q.dtype, power_of_2(dim, 32)
    c = _tiles(dp, dtype) | (config or {})
    plan = _plan(batch, first, stop, c["BM"])
    k_staged, v_staged = (torch.empty(kv_heads * plan.length * dp, dtype=dtype, device=q.device) for _ in range(2))
    launch(_stage_kv, (len(plan.chunks), kv_heads),
        k, v, views.get("k_scale", q), views.get("v_scale", q), k_staged, v_staged, batch.block_tables, plan.chunks,
        batch.block_tables.stride(0), *cache_strides(views), plan.length,
        D=dim, DP=dp, BLOCK_SIZE=k.shape[1], TILE=ALIGN, PER_HEAD=scales is not None, BY_DIM=by_dim, num_warps=8,
    )  # fmt: skip
    by_row, tile = (kv_heads * plan.length, dp), (c["BN"], dp)
    by_dim_of_v, v_tile = (kv_heads * dp, plan.length), (dp, c["BN"])
    launch(_prefill_attention, (len(plan.tiles), heads),
        q, tiled(k_staged, by_row, tile), tiled(v_staged, *((by_dim_of_v, v_tile) if fp8 else (by_row, tile))), out, plan.tiles,
        scale * LOG2E, cache.k_scale, cache.v_scale, plan.length,
        Q_HEADS=heads, GROUP=heads // kv_heads, D=dim, DP=dp, BM=c["BM"], BN=c["BN"], WINDOW=window or 0, **codes(dtype),
        **head_strides(cache), STAGES=c["stages"], num_warps=c["warps"], **registers(c["registers"]),
    )  # fmt: skip
