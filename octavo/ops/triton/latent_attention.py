"""Attention over MLA's latents, absorbed: all heads share one key a token, whose first part is the value (MQA of 576 and 512).

A program takes ROWS rows, each a head of a token of one request, and one part of their context (split-KV): the cache is read
once for all of them. Few rows take the matrix unit's narrow side and the context its tall one, many rows the other way round.
A second launch puts the parts together.

Over `fp8_ds_mla`, with few rows, the product of queries and latents is FP8: queries are split into a code and the code of what
it leaves over, which together keep 8 bits, as BF16 does. That of probabilities and latents is FP16, which holds a code exactly:
FP8 units sum over adjacent codes, which for values would be a dimension's of several tokens, and turning bytes takes longer
than widening them. The scale of each 128 values of a latent is multiplied into that group's part of a score and into that
group's probabilities, which FP16 holds, 16 times as large, for groups whose largest value is between 1e-4 (scales are not
smaller) and 900,000. The rotated part of a key is BF16. With many rows latents are widened to BF16, exactly, and used twice.
"""

# ruff: noqa: RUF005 (the compiler adds tuples, and does not unpack them)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.batch import ForwardBatch, Key, to_device
from octavo.kvcache import LatentCache
from octavo.ops.triton.decode import LOG2E
from octavo.ops.triton.launch import codes, device_units, inline_ptx, launch, pipeline, power_of_2, release, wait

__all__ = ["latent_attention"]

LIFT = tl.constexpr(16.0)  # times a scale and a probability


@triton.jit
def _scores(tokens, rows, total, ROWS_FIRST: tl.constexpr):
    """The products of tokens [T, K] and rows [R, K] added to a total: [R, T] if ROWS_FIRST, else [T, R]."""
    if ROWS_FIRST:
        total = tl.dot(rows, tl.trans(tokens), total, input_precision="ieee")
    else:
        total = tl.dot(tokens, tl.trans(rows), total, input_precision="ieee")
    return total


@triton.jit
def _weighed(p, values, total, ROWS_FIRST: tl.constexpr):
    """p, as `_scores` lays it out, times the values [T, K], added to a total: [R, K] if ROWS_FIRST, else [K, R]."""
    if ROWS_FIRST:
        total = tl.dot(p, values, total, input_precision="ieee")
    else:
        total = tl.dot(tl.trans(values), p, total, input_precision="ieee")
    return total


@triton.jit
def _two_codes(x, N: tl.constexpr, CODE: tl.constexpr):
    """Of x [M, N] each value's code and that of what it leaves over, side by side: [M, 2N].

    Rounded after the reshape, though it is done twice: see octavo.ops.triton.decode."""
    high = x.to(CODE).to(tl.float32)
    return tl.reshape(tl.join(high, x - high), (x.shape[0], 2 * N)).to(CODE)


@triton.jit
def _one_sum(x, M: tl.constexpr, N: tl.constexpr):
    """What the two codes gave, [M, 2N], added up."""
    high, low = tl.split(tl.reshape(x, (M, N, 2)))
    return high + low


@triton.jit
def _wide(x, ASM: tl.constexpr):
    """Codes as FP16. ASM: by instructions that the compiler must leave where they are: it would turn codes into columns first,
    byte by byte, and then widen them."""
    if ASM:
        x = tl.inline_asm_elementwise(
            "{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }",
            "=r,=r,r", [x], dtype=tl.float16, is_pure=False, pack=4,
        )  # fmt: skip
    else:
        x = x.to(tl.float16)
    return x


@triton.jit
def _along(x, AXIS: tl.constexpr):
    """A vector as a matrix that spreads along AXIS."""
    if AXIS == 0:
        spread = x[None, :]
    else:
        spread = x[:, None]
    return spread


@triton.jit
def _latent_attention(
    q, latent, rope, scales, tables, seq_lens, starts, tiles, chosen, owners, positions, out, parts, sums,
    qk_scale, table_width, top_k, rows_in_all,
    HEADS: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, LATENT_STRIDES: tl.constexpr, ROPE_STRIDES: tl.constexpr, SCALE_STRIDES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, TILED: tl.constexpr, CHOSEN: tl.constexpr,
    OWNED: tl.constexpr, SPLIT: tl.constexpr, ROWS_FIRST: tl.constexpr, CODE: tl.constexpr, LIMIT: tl.constexpr,
    ROPE_CODE: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """TILED: programs take rows as `tiles` says, several tokens' of a request; else rows of one token. CHOSEN: of the places in
    `chosen`; OWNED: a token's request is in `owners`, else it is its number."""
    CODES: tl.constexpr = CODE.primitive_bitwidth == 8
    FP8: tl.constexpr = CODES and not ROWS_FIRST
    WIDE: tl.constexpr = ROPE_CODE if CODES else CODE  # of queries and latents that are not multiplied as codes
    TOKENS: tl.constexpr = 1 if ROWS_FIRST else 0  # the axis of a score's tokens; the other is its row's
    HELD: tl.constexpr = 1 - TOKENS
    split, splits = tl.program_id(1), tl.num_programs(1)
    row = tl.arange(0, ROWS)
    release(PDL)
    wait(PDL)
    if TILED:
        tile_at = tiles + tl.program_id(2) * 3
        request, first, count = tl.load(tile_at), tl.load(tile_at + 1), tl.load(tile_at + 2)
        behind = tl.load(seq_lens + request) - tl.load(starts + request + 1) + 1
        length = behind + (first + row) // HEADS
        longest = behind + (first + count - 1) // HEADS
    else:
        token = tl.program_id(2)
        first = token * HEADS + tl.program_id(0) * ROWS
        count = tl.minimum(HEADS - tl.program_id(0) * ROWS, ROWS)
        request = token
        if OWNED:
            request = tl.load(owners + token)
        if CHOSEN:
            longest = tl.minimum(tl.load(positions + token).to(tl.int32) + 1, top_k)
        else:
            longest = tl.load(seq_lens + request)  # 0: the row pads a graph; there is no tile to read then
        length = tl.zeros((ROWS,), tl.int32) + longest
    per_split = tl.cdiv(tl.cdiv(longest, TILE), splits)
    begin, end = split * per_split, tl.minimum((split + 1) * per_split, tl.cdiv(longest, TILE))

    table = tables + request.to(tl.int64) * table_width
    chosen_row = chosen + token.to(tl.int64) * top_k if CHOSEN else None
    d, r = tl.arange(0, CHUNK), tl.arange(0, DP)
    q_row = q + (first + row).to(tl.int64)[:, None] * (RANK + D)
    held = (row < count)[:, None]
    turned = tl.load(q_row + RANK + r[None, :], mask=held & (r < D)[None, :], other=0.0)
    factor = tl.zeros((ROWS,), tl.float32) + qk_scale
    if FP8:
        most = tl.zeros((ROWS,), tl.float32) + 1e-12
        for c in tl.static_range(CHUNKS):
            x = tl.load(q_row + c * CHUNK + d[None, :], mask=held & (c * CHUNK + d < RANK)[None, :], other=0.0)
            most = tl.maximum(most, tl.max(tl.abs(x.to(tl.float32)), 1))
        by_row = most / LIMIT
        factor *= by_row
        turned = turned.to(tl.float32) / by_row[:, None]
        tl.debug_barrier()  # queries are loaded once more below: all at a time do not fit into registers
    queries, acc = (), ()
    for c in tl.static_range(CHUNKS):
        x = tl.load(q_row + c * CHUNK + d[None, :], mask=held & (c * CHUNK + d < RANK)[None, :], other=0.0)
        if FP8:
            x = x.to(tl.float32) / by_row[:, None]
            queries = queries + (tl.trans(_two_codes(tl.trans(x), ROWS, CODE)),)
        else:
            queries = queries + (x.to(WIDE),)
        if ROWS_FIRST:
            acc = acc + (tl.zeros((ROWS, CHUNK), tl.float32),)
        else:
            acc = acc + (tl.zeros((CHUNK, ROWS), tl.float32),)
    turned = turned.to(ROPE_CODE)

    SHAPE_0: tl.constexpr = ROWS if ROWS_FIRST else TILE
    SHAPE_1: tl.constexpr = TILE if ROWS_FIRST else ROWS
    peak = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((SHAPE_0, SHAPE_1), tl.float32)
    t = tl.arange(0, TILE)
    for tile in tl.range(begin, end, num_stages=STAGES):
        # No mask over tokens: what lies past the context is another's, or the scratch block, and finite; its weight is 0.
        place = tile * TILE + t
        inside = place < longest
        if CHOSEN:
            place = tl.load(chosen_row + place, mask=inside, other=-1)
            inside = place >= 0
            place = tl.maximum(place, 0)
        seen = _along(inside, HELD)
        if TILED:
            seen = _along(place, HELD) < _along(length, TOKENS)
        index = place // BLOCK_SIZE
        block = tl.load(table + index, mask=index < table_width, other=0).to(tl.int64)
        offset = place % BLOCK_SIZE
        base = block * LATENT_STRIDES[0] + offset * LATENT_STRIDES[1]
        rope_at = rope + (block * ROPE_STRIDES[0] + offset * ROPE_STRIDES[1])[:, None] + r[None, :]
        if DP == D:
            rotated = tl.load(rope_at)
        else:
            rotated = tl.load(rope_at, mask=(r < D)[None, :], other=0.0)
        score = _scores(rotated.to(ROPE_CODE), turned, tl.zeros((SHAPE_0, SHAPE_1), tl.float32), ROWS_FIRST)
        keys, by_token = (), ()
        for c in tl.static_range(CHUNKS):
            at = latent + base[:, None] + c * CHUNK + d[None, :]
            if RANK % CHUNK == 0:
                key = tl.load(at)
            else:
                key = tl.load(at, mask=(c * CHUNK + d < RANK)[None, :], other=0.0)
            if CODES:
                by = tl.load(scales + block * SCALE_STRIDES[0] + offset * SCALE_STRIDES[1] + c)
            if FP8:
                by_token = by_token + (by,)
                score += _one_sum(tl.dot(key, tl.trans(queries[c])), TILE, ROWS) * by[:, None]
            else:
                key = (key.to(tl.float32) * by[:, None]).to(WIDE) if CODES else key.to(WIDE)
                score = _scores(key, queries[c], score, ROWS_FIRST)
            keys = keys + (key,)
        score = tl.where(seen, score * _along(factor, TOKENS), -1e30)
        higher = tl.maximum(peak, tl.max(score, TOKENS))
        p = tl.where(seen, tl.exp2(score - _along(higher, TOKENS)), 0.0)
        shrink = _along(tl.exp2(peak - higher), TOKENS)
        total = total * shrink + p
        peak = higher
        moved = ()
        for c in tl.static_range(CHUNKS):
            if FP8:
                weights = (p * _along(by_token[c] * LIFT, HELD)).to(tl.float16)
                moved = moved + (_weighed(weights, _wide(keys[c], ASM), acc[c] * shrink, ROWS_FIRST),)
            else:
                moved = moved + (_weighed(p.to(WIDE), keys[c], acc[c] * shrink, ROWS_FIRST),)
        acc = moved

    sum_of_p = tl.sum(total, TOKENS) * (LIFT if FP8 else 1.0)
    if SPLIT:
        at = split * rows_in_all + first + row
        tl.store(sums + at, peak, mask=row < count)
        tl.store(sums + splits * rows_in_all + at, sum_of_p, mask=row < count)
        if begin < end:  # what is left unwritten is not read
            to = parts + at.to(tl.int64)[:, None] * RANK + d[None, :]
            for c in tl.static_range(CHUNKS):
                y = acc[c] if ROWS_FIRST else tl.trans(acc[c])
                tl.store(to + c * CHUNK, y, mask=held & (c * CHUNK + d < RANK)[None, :])
    else:
        whole = _along(1.0 / tl.where(sum_of_p > 0, sum_of_p, 1.0), TOKENS)
        to = out + (first + row).to(tl.int64)[:, None] * RANK + d[None, :]
        for c in tl.static_range(CHUNKS):
            y = acc[c] * whole if ROWS_FIRST else tl.trans(acc[c] * whole)
            tl.store(to + c * CHUNK, y.to(out.dtype.element_ty), mask=held & (c * CHUNK + d < RANK)[None, :])


@triton.jit
def _merge(
    parts, sums, out, rows_in_all, splits,
    RANK: tl.constexpr, RP: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A row of out from its parts, those that saw nothing left out."""
    row = tl.program_id(0)
    d, s, g = tl.arange(0, RP), tl.arange(0, SPLITS), tl.arange(0, GROUP)
    release(PDL)
    wait(PDL)
    total = tl.load(sums + (splits + s) * rows_in_all + row, mask=s < splits, other=0.0)
    peak = tl.where(total > 0, tl.load(sums + s * rows_in_all + row, mask=s < splits, other=-1e30), -1e30)
    top = tl.max(peak, 0)
    sum_of_p = tl.sum(total * tl.exp2(peak - top), 0)
    acc = tl.zeros((RP,), tl.float32)
    for start in range(0, splits, GROUP):
        part = start + g
        there = tl.load(sums + (splits + part) * rows_in_all + row, mask=part < splits, other=0.0) > 0
        by = tl.exp2(tl.load(sums + part * rows_in_all + row, mask=there, other=-1e30) - top)
        at = parts + (part * rows_in_all + row).to(tl.int64)[:, None] * RANK + d[None, :]
        y = tl.load(at, mask=there[:, None] & (d < RANK)[None, :], other=0.0)
        acc += tl.sum(y * by[:, None], 0)
    y = acc / tl.where(sum_of_p > 0, sum_of_p, 1.0)
    tl.store(out + row.to(tl.int64) * RANK + d, y.to(out.dtype.element_ty), mask=d < RANK)


@dataclass(frozen=True)
class _TilesKey(Key[Tensor]):
    heads: int
    rows: int


@dataclass(frozen=True)
class _OwnersKey(Key[Tensor]):
    """Each token's request."""


def _row_tiles(batch: ForwardBatch, heads: int, rows: int) -> Tensor:
    """INT32 [n, 3]: request, first row of q and how many, of the tiles that the rows of each request are taken in; those with
    the longest contexts first."""

    def make() -> Tensor:
        tiles, start = [], 0
        for request, (count, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
            own = range(0, count * heads, rows)
            tiles += [(context - count + at // heads, request, start + at, min(rows, count * heads - at)) for at in own]
            start += count * heads
        tiles.sort(reverse=True)
        return to_device([tile[1:] for tile in tiles], torch.int32, batch.seq_lens.device)

    return batch.cache.get(_TilesKey(heads, rows), make)


def _owners(batch: ForwardBatch) -> Tensor:
    def make() -> Tensor:
        return to_device([i for i, n in enumerate(batch.query_lens) for _ in range(n)], torch.int32, batch.seq_lens.device)

    return batch.cache.get(_OwnersKey(), make)


def _shape(rows: int, item: int) -> dict[str, int]:
    """For so many rows that share a context: rows, tokens and a latent's values at a time, warps, stages, whether rows come
    first, and programs that share a multiprocessor. Measured on an H200."""
    if pipeline(3) < 3 or item > 2:
        return dict(ROWS=16, TILE=32, chunk=128, warps=4, stages=1, first=0, sharing=1)
    if rows <= 16:
        return dict(ROWS=16, TILE=64, chunk=128, warps=4, stages=2, first=0, sharing=2 if item == 1 else 1)
    return dict(ROWS=64, TILE=64, chunk=256 if item == 2 else 128, warps=8, stages=2, first=1, sharing=1)


MOST_SPLITS = 64


def splits_for(programs: int, longest: int, tile: int, sharing: int = 1) -> int:
    """Parts of a context, so that the programs fill whole waves of the device, and none has less than two tiles."""
    units = sharing * device_units()
    most = max(1, min(MOST_SPLITS, longest // (2 * tile), 2 * units // programs))
    waves = [-(-programs * splits // units) / splits for splits in range(1, most + 1)]  # time, in that of a whole context
    best = min(waves)
    return next(i for i, time in enumerate(waves, 1) if time <= 1.03 * best)


def latent_attention(
    q: Tensor, cache: LatentCache, batch: ForwardBatch, scale: float, chosen: Tensor | None = None,
    config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    tokens, heads = q.shape[:2]
    rank, rope = cache.latent.shape[-1], cache.rope.shape[-1]
    out = torch.empty(tokens, heads, rank, dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    q, kind = q.contiguous(), cache.latent.dtype
    single = len(batch.query_lens) == tokens
    tiled = chosen is None and not single
    c = _shape(max(batch.query_lens) * heads if tiled else heads, kind.itemsize) | (config or {})
    chunk = min(power_of_2(rank, 16), c["chunk"])
    tiles = _row_tiles(batch, heads, c["ROWS"]) if tiled else None
    grid = (1, len(tiles)) if tiles is not None else (-(-heads // c["ROWS"]), tokens)
    longest = max(batch.context_lens)
    if chosen is not None:
        chosen = chosen.contiguous()
        longest = min(longest, chosen.shape[1])
    splits = c.get("splits") or splits_for(grid[0] * grid[1], longest, c["TILE"], c["sharing"])
    split = splits > 1
    parts = torch.empty(splits * tokens * heads * rank if split else 1, dtype=torch.float32, device=q.device)
    sums = torch.empty(2 * splits * tokens * heads if split else 1, dtype=torch.float32, device=q.device)
    launch(_latent_attention, (grid[0], splits, grid[1]),
        q, cache.latent, cache.rope, cache.scale, batch.block_tables, batch.seq_lens, batch.query_start_loc, tiles, chosen,
        None if single else _owners(batch) if chosen is not None else None, batch.positions, out, parts, sums,
        scale * LOG2E, batch.block_tables.stride(0), 0 if chosen is None else chosen.shape[1], tokens * heads,
        HEADS=heads, ROWS=c["ROWS"], RANK=rank, CHUNK=chunk, CHUNKS=-(-rank // chunk), D=rope, DP=power_of_2(rope, 16),
        LATENT_STRIDES=cache.latent.stride()[:2], ROPE_STRIDES=cache.rope.stride()[:2],
        SCALE_STRIDES=cache.scale.stride()[:2] if cache.scale is not None else (0, 0),
        BLOCK_SIZE=cache.latent.shape[1], TILE=c["TILE"], TILED=tiled,
        CHOSEN=chosen is not None, OWNED=chosen is not None and not single, SPLIT=split, ROWS_FIRST=bool(c["first"]),
        **codes(kind), ROPE_CODE=codes(cache.rope.dtype)["CODE"], ASM=inline_ptx(), STAGES=pipeline(c["stages"]),
        num_warps=c["warps"],
    )  # fmt: skip
    if split:
        launch(_merge, (tokens * heads,),
            parts, sums, out, tokens * heads, splits,
            RANK=rank, RP=power_of_2(rank), SPLITS=power_of_2(splits), GROUP=8, num_warps=4,
        )  # fmt: skip
    return out
