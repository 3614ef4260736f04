"""Grouped GEMM over a stack of experts' weights, for rows sorted by expert: a CTA computes a tile of one expert's rows.

The host does not know the number of rows per expert, so the grid has as many CTAs as tiles can exist, and CTAs without a tile
return. The weight's rows are the M side of the tensor core's tile, as in `linear`: with few tokens an expert has a handful of
rows, and the product is bound by reading the weights of the experts in use.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.contract import Dispatch
from octavo.ops.triton.launch import has_packed_arithmetic, launch, pipeline, power_of_2, release, tiled, wait
from octavo.ops.triton.weight_only import widen_codes
from octavo.quant.scheme import BLOCK

__all__ = ["grouped_linear"]

PROMOTE = 128  # products accumulated in the tensor core, which keeps about 14 bits, before they are added in FP32
# Scales: none; one per channel and row of x; one per 128x128 tile and 1x128 group of x; one per channel, of codes that are
# multiplied by values.
NO_SCALES, ROWS, TILES, CHANNELS = 0, 1, 2, 3
TABLE_SLOTS = 64  # slots per CTA of _find_tiles


@triton.jit
def _find_tile(starts, slot, experts, BM: tl.constexpr, EXPERTS: tl.constexpr):
    """(expert, tile within the expert) of each slot [S, 1]; slots number the tiles of all experts. EXPERTS after the last."""
    e = tl.arange(0, EXPERTS)
    first = tl.load(starts + e, mask=e < experts, other=0)
    stop = tl.load(starts + e + 1, mask=e < experts, other=0)
    tiles = tl.cdiv(stop - first, BM)
    before = tl.cumsum(tiles, 0)[None, :] <= slot
    return tl.sum(before.to(tl.int32), 1), tl.sum(slot - tl.sum(tl.where(before, tiles[None, :], 0), 1)[:, None], 1)


@triton.jit(do_not_specialize=["slots"])
def _find_tiles(starts, table, slots, experts, SLOTS: tl.constexpr, BM: tl.constexpr, EXPERTS: tl.constexpr, PDL: tl.constexpr):
    """Precompute the tile lookup: table [2, slots] holds each slot's expert and tile."""
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    release(PDL)
    wait(PDL)
    expert, tile = _find_tile(starts, slot[:, None], experts, BM, EXPERTS)
    tl.store(table + slot, expert, mask=slot < slots)
    tl.store(table + slots + slot, tile, mask=slot < slots)


@triton.jit(do_not_specialize=["slots"])
def _grouped_linear(
    x, x_scale, w, w_tiles, w_scale, out, order, starts, table, slots, experts, n, height, width, groups,
    OF_TOKENS: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    SCALES: tl.constexpr, SCALE_ROWS: tl.constexpr, PROMOTE: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(1)
    release(PDL)
    wait(PDL)
    if table is not None:
        expert, tile = tl.load(table + slot), tl.load(table + slots + slot)
    else:
        one = tl.zeros((1, 1), tl.int32) + slot
        found, number = _find_tile(starts, one, experts, BM, EXPERTS)
        expert, tile = tl.sum(found, 0), tl.sum(number, 0)
    if expert >= experts:
        return
    channel = tl.program_id(0) * BN + tl.arange(0, BN)
    place = tl.load(starts + expert) + tile * BM + tl.arange(0, BM)
    depth = tl.arange(0, BK)
    channel_ok, place_ok = channel < n, place < tl.load(starts + expert + 1)
    row = (tl.load(order + place, mask=place_ok, other=0) // TOP_K if OF_TOKENS else place).to(tl.int64)
    x_at = x + row[:, None] * width + depth[None, :]
    w_at = w + (expert.to(tl.int64) * height + channel)[:, None] * width + depth[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(0, tl.cdiv(width, BK), num_stages=STAGES):
        deep = step * BK + depth < width
        if w_tiles is not None:
            a = w_tiles.load([expert * height + tl.program_id(0) * BN, step * BK])
        elif EVEN:
            a = tl.load(w_at + step * BK, mask=channel_ok[:, None], other=0.0)
        else:
            a = tl.load(w_at + step * BK, mask=channel_ok[:, None] & deep[None, :], other=0.0)
        if EVEN:
            b = tl.load(x_at + step * BK, mask=place_ok[:, None], other=0.0)
        else:
            b = tl.load(x_at + step * BK, mask=place_ok[:, None] & deep[None, :], other=0.0)
        if SCALES == 2:
            by_group = tl.load(x_scale + row * groups + step, mask=place_ok, other=0.0)
            if SCALE_ROWS == 1:
                by_channel = tl.load(w_scale + (expert.to(tl.int64) * n + channel) * groups + step, mask=channel_ok, other=0.0)
                acc += tl.dot(a, tl.trans(b)) * (by_channel[:, None] * by_group[None, :])
            else:  # a CTA's channels lie in one scale tile
                of_tile = expert * tl.cdiv(n, SCALE_ROWS) + tl.program_id(0) * BN // SCALE_ROWS
                acc += tl.dot(a, tl.trans(b)) * (tl.load(w_scale + of_tile * groups + step) * by_group)[None, :]
        else:
            values = widen_codes(a, ASM) if SCALES == 3 else a.to(b.dtype)
            acc = tl.dot(values, tl.trans(b), acc, max_num_imprecise_acc=PROMOTE, input_precision="ieee")
    if SCALES == 1:
        by_channel = tl.load(w_scale + expert.to(tl.int64) * n + channel, mask=channel_ok, other=0.0)
        acc = acc * by_channel[:, None] * tl.load(x_scale + row, mask=place_ok, other=0.0)[None, :]
    if SCALES == 3:
        acc = acc * tl.load(w_scale + expert.to(tl.int64) * n + channel, mask=channel_ok, other=0.0)[:, None]
    to = out + place.to(tl.int64)[None, :] * n + channel[:, None]
    tl.store(to, acc.to(out.dtype.element_ty), mask=channel_ok[:, None] & place_ok[None, :])


def _shape(rows: float, itemsize: int, blocks: bool) -> dict[str, int]:
    """Tile sizes and pipeline stages for `rows` per expert on average, measured on an H200 over Qwen3-30B-A3B's layers.

    Many rows of FP8 are accumulated in the tensor core alone, as in the dense product; per-tile scaling would spill registers
    there.
    """
    bm = 16 if rows <= 8 else 32 if rows <= 20 else 64 if rows <= 80 or blocks else 128
    bk = BLOCK if blocks else max(32, 128 // itemsize)
    if bm <= 32:
        wide = bm == 32 and blocks
        return {"BN": 128 if wide else 64, "BM": bm, "BK": bk, "warps": 4, "stages": 4, "promote": 1, "table": 0, "tma": 1}
    if blocks:
        return {"BN": 128, "BM": bm, "BK": bk, "warps": 4, "stages": 4, "promote": 1, "table": 0, "tma": 0}
    return {"BN": 128, "BM": bm, "BK": bk, "warps": 4 * min(itemsize, 2), "stages": 3, "promote": 0, "table": 1, "tma": 1}


def grouped_linear(
    x: Tensor, x_scale: Tensor | None, w: Tensor, w_scale: Tensor | None, n: int, at: Dispatch, *, of_tokens: bool,
    by_tile: bool = False, config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """Grouped GEMM: [P, n] in sorted order for x [T or P, K'] and w [E, N', K'], FP8 codes or values in a model's dtype,
    or values and codes, which are then widened to BF16.

    FP32 scales of codes: x's [rows, 1] and w's [E, n, 1]; or with `by_tile` x's per group of 128, [rows, groups], and w's per
    tile, [E, ceil(n / 128), groups], or per channel and group, [E, n, groups]. The result of codes is BF16, otherwise it has
    x's dtype. config: overrides `_shape`.
    """
    experts, height, width = w.shape
    scales = TILES if by_tile else ROWS if x_scale is not None else NO_SCALES if w_scale is None else CHANNELS
    if scales == CHANNELS:
        x = F.pad(x.bfloat16(), (0, width - x.shape[1]))
    pairs, x = len(at.order), x.contiguous()
    out = torch.empty(pairs, n, dtype=torch.bfloat16 if x_scale is not None else x.dtype, device=x.device)
    if not pairs:
        return out
    c = _shape(pairs / experts, x.dtype.itemsize, by_tile) | (config or {})
    slots = min(pairs, pairs // c["BM"] + experts)  # upper bound of the number of tiles
    table = _table(at, slots, experts, c["BM"]) if c["table"] else None
    copied = c["tma"] and width * w.dtype.itemsize % 16 == 0
    channels = by_tile and w_scale is not None and w_scale.shape[1] == n and n > 1
    launch(_grouped_linear, (triton.cdiv(n, c["BN"]), slots),
        x, x_scale, w, tiled(w, (experts * height, width), (c["BN"], c["BK"])) if copied else None, w_scale, out, at.order,
        at.starts, table, slots, experts, n, height, width, 0 if x_scale is None else x_scale.shape[1],
        OF_TOKENS=of_tokens, TOP_K=at.top_k, EXPERTS=power_of_2(experts), BN=c["BN"], BM=c["BM"], BK=c["BK"],
        SCALES=scales, SCALE_ROWS=1 if channels else BLOCK, PROMOTE=PROMOTE if c["promote"] else None,
        EVEN=width % c["BK"] == 0, ASM=has_packed_arithmetic() and w.dtype is torch.float8_e4m3fn, STAGES=pipeline(c["stages"]),
        num_warps=c["warps"],
    )  # fmt: skip
    return out


def _table(at: Dispatch, slots: int, experts: int, bm: int) -> Tensor:
    table = torch.empty(2, slots, dtype=torch.int32, device=at.starts.device)
    launch(_find_tiles, (triton.cdiv(slots, TABLE_SLOTS),),
        at.starts, table, slots, experts, SLOTS=TABLE_SLOTS, BM=bm, EXPERTS=power_of_2(experts), num_warps=4,
    )  # fmt: skip
    return table
