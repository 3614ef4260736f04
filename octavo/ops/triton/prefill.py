"""Attention of many new tokens. The context is first laid out once, head by head, from its blocks; then flash attention.

Over an FP8 cache both products are FP8: queries are quantized a scale a row and head, probabilities as codes of p * 256. The
values are laid out transposed, which is how an FP8 matrix unit wants its second operand. Sums over the context are taken in
FP32, a tile of keys at a time, since the matrix unit itself keeps about 14 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.kvcache import Views
from octavo.ops.triton.decode import LOG2E
from octavo.ops.triton.launch import overlap, power_of_2, release, to_fp8, wait
from octavo.platform import FP8_MAX

__all__ = ["prefill_attention"]

ALIGN = 128  # the staged contexts begin at multiples of this


@triton.jit
def _stage_kv(
    k, v, k_scales, v_scales, k_out, v_out, tables, chunks, table_width, block_stride, token_stride,
    scale_block_stride, scale_token_stride, length,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, PER_HEAD: tl.constexpr,
    TRANSPOSE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    chunk, kv_head = tl.program_id(0), tl.program_id(1)
    request, start, context, target = (
        tl.load(chunks + chunk * 4),
        tl.load(chunks + chunk * 4 + 1),
        tl.load(chunks + chunk * 4 + 2),
        tl.load(chunks + chunk * 4 + 3),
    )
    d = tl.arange(0, DP)
    at = start + tl.arange(0, TILE)
    wait(PDL)
    block = tl.load(tables + request.to(tl.int64) * table_width + at // BLOCK_SIZE, mask=at < context, other=0).to(tl.int64)
    slot = block * block_stride + (at % BLOCK_SIZE) * token_stride + kv_head * D
    ok = (at < context)[:, None] & (d < D)[None, :]
    keys = tl.load(k + slot[:, None] + d[None, :], mask=ok, other=0.0)
    values = tl.load(v + slot[:, None] + d[None, :], mask=ok, other=0.0)
    release(PDL)
    if PER_HEAD:
        place = block * scale_block_stride + (at % BLOCK_SIZE) * scale_token_stride + kv_head
        keys = keys.to(tl.float32) * tl.load(k_scales + place, mask=at < context, other=0.0)[:, None]
        values = values.to(tl.float32) * tl.load(v_scales + place, mask=at < context, other=0.0)[:, None]
    to = (target + tl.arange(0, TILE)).to(tl.int64)
    tl.store(k_out + (kv_head * length.to(tl.int64) + to)[:, None] * DP + d[None, :], keys.to(k_out.dtype.element_ty))
    if TRANSPOSE:
        flipped = tl.trans(values.to(v_out.dtype.element_ty))
        tl.store(v_out + (kv_head * DP + d)[:, None].to(tl.int64) * length + to[None, :], flipped)
    else:
        tl.store(v_out + (kv_head * length.to(tl.int64) + to)[:, None] * DP + d[None, :], values.to(v_out.dtype.element_ty))


@triton.jit
def _attend_tiles(
    acc, total, peak, query, k_at, v_at, first, last, position, factor, steps, window,
    BN: tl.constexpr, MASKED: tl.constexpr, V_T: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key tiles [first, last)."""
    for tile in tl.range(first, last, num_stages=STAGES):
        keys = tl.load(k_at + tile * steps[0])
        score = tl.dot(query, keys, input_precision="ieee")
        if MASKED:
            at = tile * BN + tl.arange(0, BN)
            seen = at[None, :] <= position[:, None]
            if WINDOW:
                seen = seen & (at[None, :] > position[:, None] - window)
            score = tl.where(seen, score, -1e30)
        higher = tl.maximum(peak, tl.max(score, 1) * factor)
        p = tl.exp2(score * factor[:, None] - (higher - SHIFT)[:, None])
        if WINDOW:
            p = tl.where(seen, p, 0.0)
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(p, 1)
        peak = higher
        values = tl.load(v_at + tile * steps[1])
        acc = acc * shrink[:, None]
        if V_T:
            acc += tl.dot(p.to(values.dtype), tl.trans(values))
        else:
            acc = tl.dot(p.to(values.dtype), values, acc, input_precision="ieee")
    return acc, total, peak


@triton.jit
def _prefill_attention(
    q, k, v, out, tiles, qk_scale, v_scale, length,
    Q_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WINDOW: tl.constexpr, FP8: tl.constexpr, LIMIT: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
    V_T: tl.constexpr = True,
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
    SHIFT: tl.constexpr = 8.0 if V_T else 0.0
    if FP8:
        wide = query.to(tl.float32)
        q_scale = tl.maximum(tl.max(tl.abs(wide), 1) / LIMIT, 1e-12)
        query = to_fp8(wide / q_scale[:, None], LIMIT, k.dtype.element_ty)
        factor = q_scale * qk_scale
    else:
        factor = tl.full((BM,), 1.0, tl.float32) * qk_scale
    if V_T:
        v_at = v + (base * DP + staged) + d[:, None] * length.to(tl.int64) + n[None, :]
        steps = (BN * DP, BN)
    else:
        v_at = v + (base + staged + n)[:, None] * DP + d[None, :]
        steps = (BN * DP, BN * DP)
    k_at = k + (base + staged + n)[None, :] * DP + d[:, None]
    acc = tl.zeros((BM, DP), tl.float32)
    peak = tl.full((BM,), -1e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    last = tl.cdiv(start + rows, BN)
    if WINDOW:
        first = tl.maximum(start - WINDOW + 1, 0) // BN
        acc, total, peak = _attend_tiles(
            acc, total, peak, query, k_at, v_at, first, last, position, factor, steps, WINDOW,
            BN, True, V_T, True, STAGES, SHIFT,
        )  # fmt: skip
    else:
        whole = (start + 1) // BN
        acc, total, peak = _attend_tiles(
            acc, total, peak, query, k_at, v_at, 0, whole, position, factor, steps, 0, BN, False, V_T, False, STAGES, SHIFT
        )
        acc, total, peak = _attend_tiles(
            acc, total, peak, query, k_at, v_at, whole, last, position, factor, steps, 0, BN, True, V_T, False, STAGES, SHIFT
        )
    release(PDL)
    y = acc * (v_scale / total)[:, None]
    tl.store(out + q_at, y.to(out.dtype.element_ty), mask=ok)


@dataclass
class _Plan:
    """A step's prefills as the kernels see them: worked out once, used by every layer."""

    chunks: Tensor  # int32 [n, 4]: request, first position, context, where it is staged
    tiles: Tensor  # int32 [n, 4]: first row in q, rows, position of the first, where the context is staged; the longest first
    length: int  # staged positions


def _plan(batch: ForwardBatch, first: int, bm: int) -> _Plan:
    key = f"prefill {first} {bm}"
    if (found := batch.cache.get(key)) is not None:
        assert isinstance(found, _Plan)
        return found
    chunks, tiles, staged = [], [], 0
    row = sum(batch.query_lens[:first])
    for request in range(first, len(batch.query_lens)):
        query, context = batch.query_lens[request], batch.context_lens[request]
        chunks += [(request, at, context, staged + at) for at in range(0, context, ALIGN)]
        tiles += [(row + at, min(bm, query - at), context - query + at, staged) for at in range(0, query, bm)]
        staged += -(-context // ALIGN) * ALIGN
        row += query
    tiles.sort(key=lambda t: -t[2])

    def table(rows: list[tuple[int, ...]]) -> Tensor:
        return torch.from_numpy(np.array(rows, dtype=np.int32)).to(batch.input_ids.device, non_blocking=True)

    made = batch.cache[key] = _Plan(table(chunks), table(tiles), staged)
    return made


def prefill_attention(
    q: Tensor, out: Tensor, views: Views, batch: ForwardBatch, first: int, scale: float, window: int | None,
    k_scale: float, v_scale: float, config: dict[str, int] | None = None,
) -> None:  # fmt: skip
    """The rows of q and out [T, H, D] that belong to the requests from `first` on."""
    heads, dim = q.shape[1:]
    k = views["k"]
    kv_heads, scales = k.shape[2], views.get("k_scale")
    fp8 = k.dtype in FP8_MAX and scales is None  # a scale a token has no place in an FP8 product over tokens
    staged_dtype = k.dtype if fp8 else q.dtype if k.dtype in FP8_MAX else k.dtype
    wide = staged_dtype is torch.float32
    c = {"BM": 32 if wide else 128, "BN": 32 if wide else 128 if fp8 else 64, "warps": 4 if wide else 8, "stages": 2} | (
        config or {}
    )
    plan, dp = _plan(batch, first, c["BM"]), power_of_2(dim, 32 if fp8 else 16)
    mixed = c.get("mixed", 0)
    k_staged = torch.empty(kv_heads * plan.length * dp, dtype=staged_dtype, device=q.device)
    v_staged = torch.empty(kv_heads * plan.length * dp, dtype=torch.bfloat16 if mixed else staged_dtype, device=q.device)
    _stage_kv[(len(plan.chunks), kv_heads)](
        k, views["v"], views.get("k_scale", q), views.get("v_scale", q), k_staged, v_staged, batch.block_tables, plan.chunks,
        batch.block_tables.stride(0), k.stride(0), k.stride(1), scales.stride(0) if scales is not None else 0,
        scales.stride(1) if scales is not None else 0, plan.length, D=dim, DP=dp, BLOCK_SIZE=k.shape[1], TILE=ALIGN,
        PER_HEAD=scales is not None, TRANSPOSE=fp8 and not mixed, num_warps=4, **overlap(),
    )  # fmt: skip
    limit = 448.0 if not fp8 else FP8_MAX[k.dtype]
    _prefill_attention[(len(plan.tiles), heads)](
        q, k_staged, v_staged, out, plan.tiles, scale * LOG2E * (k_scale if fp8 else 1.0), v_scale if fp8 else 1.0, plan.length,
        Q_HEADS=heads, GROUP=heads // kv_heads, D=dim, DP=dp, BM=c["BM"], BN=c["BN"], WINDOW=window or 0, FP8=fp8,
        LIMIT=limit, STAGES=c["stages"], num_warps=c["warps"], V_T=fp8 and not mixed, **overlap(),
    )  # fmt: skip
