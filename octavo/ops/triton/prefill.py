"""Attention of many new tokens. The context is first laid out once, head by head, from its blocks; then flash attention.

Over an FP8 cache queries are quantized, a scale a row and head, and multiplied with the keys' codes as FP8; the values' codes
become BF16, which holds them exactly, where the context is laid out. Probabilities as FP8 were tried: slower, because their
codes must first change places between threads, and less accurate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.batch import ForwardBatch, to_device
from octavo.kvcache import Views
from octavo.ops.triton.decode import LOG2E
from octavo.ops.triton.launch import cache_strides, overlap, pipeline, power_of_2, release, shared_memory, to_fp8, wait
from octavo.platform import FP8_MAX

__all__ = ["prefill_attention"]

ALIGN = 128  # the staged contexts begin at multiples of this


@triton.jit
def _stage_kv(
    k, v, k_scales, v_scales, k_out, v_out, tables, chunks, table_width, block_stride, k_token_stride, v_token_stride,
    v_head_stride, v_dim_stride, scale_block_stride, scale_token_stride, length,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, PER_HEAD: tl.constexpr,
    BY_DIM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Keys and values to [heads, length, DP]; BY_DIM, the values of a block's tokens are adjacent."""
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
    place = block * scale_block_stride + offset * scale_token_stride + kv_head
    keys = tl.load(k + (base + offset * k_token_stride + kv_head * D)[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
    if PER_HEAD:
        keys = keys.to(tl.float32) * tl.load(k_scales + place)[:, None]
    tl.store(k_out + to + onto[:, None] * DP + d[None, :], keys.to(k_out.dtype.element_ty))
    v_slot = base + offset * v_token_stride + kv_head * v_head_stride
    if BY_DIM:
        v_slot = tl.max_contiguous(tl.multiple_of(v_slot, run), run)
        values = tl.load(v + v_slot[None, :] + d[:, None] * v_dim_stride, mask=(d < D)[:, None], other=0.0).to(tl.float32)
        if PER_HEAD:
            values *= tl.load(v_scales + place)[None, :]
        values = tl.trans(values)
    else:
        values = tl.load(v + v_slot[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
    tl.store(v_out + to + onto[:, None] * DP + d[None, :], values.to(v_out.dtype.element_ty))
    release(PDL)


@triton.jit
def _attend_tiles(
    acc, total, peak, query, k_at, v_at, first, last, position, factor, step, window,
    BN: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key tiles [first, last)."""
    for tile in tl.range(first, last, num_stages=STAGES):
        keys = tl.load(k_at + tile * step)
        score = tl.dot(query, keys, input_precision="ieee")
        if MASKED:
            at = tile * BN + tl.arange(0, BN)
            seen = at[None, :] <= position[:, None]
            if WINDOW:
                seen = seen & (at[None, :] > position[:, None] - window)
            score = tl.where(seen, score, -1e30)
        higher = tl.maximum(peak, tl.max(score, 1) * factor)
        p = tl.exp2(score * factor[:, None] - higher[:, None])
        if WINDOW:
            p = tl.where(seen, p, 0.0)
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(p, 1)
        peak = higher
        values = tl.load(v_at + tile * step)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision="ieee")
    return acc, total, peak


@triton.jit
def _prefill_attention(
    q, k, v, out, tiles, qk_scale, v_scale, length,
    Q_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WINDOW: tl.constexpr, FP8: tl.constexpr, LIMIT: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    which, head = tl.program_id(0), tl.program_id(1)
    first_row, rows = tl.load(tiles + which * 4), tl.load(tiles + which * 4 + 1)  # in q, and how many
    start, staged = tl.load(tiles + which * 4 + 2), tl.load(tiles + which * 4 + 3)  # of the first, and of its context's layout
    m = tl.arange(0, BM)
    d = tl.arange(0, DP)
    n = tl.arange(0, BN)
    q_at = ((first_row + m).to(tl.int64)[:, None] * Q_HEADS + head) * D + d[None, :]
    ok = (m < rows)[:, None] & (d < D)[None, :]
    position = start + m
    base = (head // GROUP) * length.to(tl.int64)
    wait(PDL)
    query = tl.load(q + q_at, mask=ok, other=0.0)
    if FP8:
        wide = query.to(tl.float32)
        q_scale = tl.maximum(tl.max(tl.abs(wide), 1) / LIMIT, 1e-12)
        query = to_fp8(wide / q_scale[:, None], LIMIT, k.dtype.element_ty)
        factor = q_scale * qk_scale
    else:
        factor = tl.full((BM,), 1.0, tl.float32) * qk_scale
    v_at = v + (base + staged + n)[:, None] * DP + d[None, :]
    k_at = k + (base + staged + n)[None, :] * DP + d[:, None]
    acc = tl.zeros((BM, DP), tl.float32)
    peak = tl.full((BM,), -1e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    last = tl.cdiv(start + rows, BN)
    if WINDOW:
        first = tl.maximum(start - WINDOW + 1, 0) // BN
        acc, total, peak = _attend_tiles(
            acc, total, peak, query, k_at, v_at, first, last, position, factor, BN * DP, WINDOW,
            BN, True, True, STAGES,
        )  # fmt: skip
    else:
        whole = (start + 1) // BN
        acc, total, peak = _attend_tiles(
            acc, total, peak, query, k_at, v_at, 0, whole, position, factor, BN * DP, 0, BN, False, False, STAGES
        )
        acc, total, peak = _attend_tiles(
            acc, total, peak, query, k_at, v_at, whole, last, position, factor, BN * DP, 0, BN, True, False, STAGES
        )
    release(PDL)
    y = acc * (v_scale / total)[:, None]
    tl.store(out + q_at, y.to(out.dtype.element_ty), mask=ok)


@dataclass
class _Plan:
    """A step's prefills as the kernels see them: worked out once, used by every layer."""

    chunks: Tensor  # int32 [n, 3]: request, first position, where it is staged
    tiles: Tensor  # int32 [n, 4]: first row in q, rows, position of the first, where the context is staged; the longest first
    length: int  # staged positions


def _plan(batch: ForwardBatch, first: int, stop: int, bm: int) -> _Plan:
    key = f"prefill {first} {bm}"
    if (found := batch.cache.get(key)) is not None:
        assert isinstance(found, _Plan)
        return found
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
    made = batch.cache[key] = _Plan(to_device(chunks, torch.int32, device), to_device(tiles, torch.int32, device), staged)
    return made


# Queries and keys of a tile, warps, stages of the pipeline: the fastest first, as measured on an H200.
_TILES = ((128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 1), (64, 64, 8, 2), (64, 64, 8, 1), (32, 32, 4, 1))
SUMS = 64 * 32  # FP32 sums that the threads of a warp can hold without spilling


def _tiles(dp: int, k_dtype: torch.dtype, v_dtype: torch.dtype) -> dict[str, int]:
    """The first tiles that fit into a multiprocessor's memory; FP32 is for small models and short of registers."""
    a_key, both = k_dtype.itemsize, k_dtype.itemsize + v_dtype.itemsize

    def fits(bm: int, bn: int, warps: int, stages: int) -> bool:
        held = dp * (bm * a_key + stages * bn * both)
        return stages <= pipeline(stages) and held <= shared_memory() and bm * dp <= SUMS * warps

    tried = _TILES[-1:] if v_dtype.itemsize > 2 else _TILES[a_key > 1 :]
    bm, bn, warps, stages = next((t for t in tried if fits(*t)), _TILES[-1])
    return {"BM": bm, "BN": bn, "warps": warps, "stages": stages}


def prefill_attention(
    q: Tensor, out: Tensor, views: Views, batch: ForwardBatch, first: int, stop: int, scale: float, window: int | None,
    k_scale: float, v_scale: float, config: dict[str, int] | None = None,
) -> None:  # fmt: skip
    """The rows of q and out [T, H, D] that belong to the requests [first, stop)."""
    heads, dim = q.shape[1:]
    k, v = views["k"], views["v"]
    kv_heads, scales = k.shape[2], views.get("k_scale")
    by_dim = k.dtype in FP8_MAX
    fp8 = by_dim and scales is None  # a scale a token and head is applied where the context is laid out, in q's dtype
    k_dtype, v_dtype, dp = k.dtype if fp8 else q.dtype, q.dtype, power_of_2(dim, 32)
    c = _tiles(dp, k_dtype, v_dtype) | (config or {})
    plan = _plan(batch, first, stop, c["BM"])
    k_staged = torch.empty(kv_heads * plan.length * dp, dtype=k_dtype, device=q.device)
    v_staged = torch.empty(kv_heads * plan.length * dp, dtype=v_dtype, device=q.device)
    _stage_kv[(len(plan.chunks), kv_heads)](
        k, v, views.get("k_scale", q), views.get("v_scale", q), k_staged, v_staged, batch.block_tables, plan.chunks,
        batch.block_tables.stride(0), *cache_strides(views), plan.length,
        D=dim, DP=dp, BLOCK_SIZE=k.shape[1], TILE=ALIGN, PER_HEAD=scales is not None, BY_DIM=by_dim, num_warps=8, **overlap(),
    )  # fmt: skip
    _prefill_attention[(len(plan.tiles), heads)](
        q, k_staged, v_staged, out, plan.tiles, scale * LOG2E * (k_scale if fp8 else 1.0), v_scale if fp8 else 1.0, plan.length,
        Q_HEADS=heads, GROUP=heads // kv_heads, D=dim, DP=dp, BM=c["BM"], BN=c["BN"], WINDOW=window or 0, FP8=fp8,
        LIMIT=FP8_MAX.get(k.dtype, 1.0), STAGES=c["stages"], num_warps=c["warps"], **overlap(),
    )  # fmt: skip
