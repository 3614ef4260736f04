"""MLA's absorbed attention over latents: all heads share one key per token, whose first part is also the value (MQA with 576
and 512).

A CTA computes ROWS rows, each one head of one token of a request, over one part of the context (split-KV), so the cache is read
once for all of them. With few rows the context is the M side of the tensor core's tile and the rows the narrow N side; with
many rows it is the other way round. A second launch merges the parts.

Over `fp8_ds_mla` with few rows, the product of queries and latents is FP8: queries are split into a code and the code of the
residual, which together keep 8 bits like BF16. The product of probabilities and latents is FP16, which represents a code
exactly: FP8 tensor cores sum over adjacent codes, which for values would be one dimension of several tokens, and transposing
bytes takes longer than widening them. The scale of each 128 values of a latent multiplies that group's part of a score and that
group's probabilities. FP16 holds these, times 16, for groups with an amax between 1e-4 (scales are not smaller) and 900,000.
The rope part of a key is BF16. With many rows, latents are widened to BF16, exactly, and used twice.
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

LIFT = tl.constexpr(16.0)  # factor on a scale times a probability, to fit FP16


@triton.jit
def _scores(tokens, rows, total, ROWS_FIRST: tl.constexpr):
    """total + the products of tokens [T, K] and rows [R, K]: [R, T] if ROWS_FIRST, else [T, R]."""
    if ROWS_FIRST:
        total = tl.dot(rows, tl.trans(tokens), total, input_precision="ieee")
    else:
        total = tl.dot(tokens, tl.trans(rows), total, input_precision="ieee")
    return total


@triton.jit
def _weighed(p, values, total, ROWS_FIRST: tl.constexpr):
    """total + p (in the layout of `_scores`) times the values [T, K]: [R, K] if ROWS_FIRST, else [K, R]."""
    if ROWS_FIRST:
        total = tl.dot(p, values, total, input_precision="ieee")
    else:
        total = tl.dot(tl.trans(values), p, total, input_precision="ieee")
    return total


@triton.jit
def _two_codes(x, N: tl.constexpr, CODE: tl.constexpr):
    """Each value's code and the code of its residual as adjacent columns: x [M, N] -> [M, 2N].

    Rounded after the reshape, although this rounds `high` twice: see octavo.ops.triton.decode.
    """
    high = x.to(CODE).to(tl.float32)
    return tl.reshape(tl.join(high, x - high), (x.shape[0], 2 * N)).to(CODE)


@triton.jit
def _one_sum(x, M: tl.constexpr, N: tl.constexpr):
    """Sum of the two codes' results: [M, 2N] -> [M, N]."""
    high, low = tl.split(tl.reshape(x, (M, N, 2)))
    return high + low


@triton.jit
def _wide(x, ASM: tl.constexpr):
    """Codes widened to FP16. ASM: in volatile inline PTX, which the compiler does not move. Otherwise it would transpose the
    codes first, byte by byte, and then widen them.
    """
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
    """A vector broadcast along AXIS of a matrix."""
    if AXIS == 0:
        spread = x[None, :]
    else:
        spread = x[:, None]
    return spread


@triton.jit
def _latent_attention(
    q, latent, rope, scales, tables, seq_lens, starts, tiles, chosen, token_requests, positions, out, parts, sums,
    qk_scale, table_width, top_k, rows_in_all,
    HEADS: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, LATENT_STRIDES: tl.constexpr, ROPE_STRIDES: tl.constexpr, SCALE_STRIDES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, TILED: tl.constexpr, CHOSEN: tl.constexpr,
    MULTI_TOKEN: tl.constexpr, SPLIT: tl.constexpr, ROWS_FIRST: tl.constexpr, CODE: tl.constexpr, LIMIT: tl.constexpr,
    ROPE_CODE: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """TILED: CTAs take rows by `tiles`, across tokens of a request; otherwise rows of one token. CHOSEN: attend to the
    positions in `chosen` only. MULTI_TOKEN: a token's request is in `token_requests`; otherwise it is the token's index.
    """
    CODES: tl.constexpr = CODE.primitive_bitwidth == 8
    FP8: tl.constexpr = CODES and not ROWS_FIRST
    WIDE: tl.constexpr = ROPE_CODE if CODES else CODE  # dtype of queries and latents that are not multiplied as codes
    TOKEN_AXIS: tl.constexpr = 1 if ROWS_FIRST else 0  # the axis of tokens in a score; the other axis is rows
    ROW_AXIS: tl.constexpr = 1 - TOKEN_AXIS
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
        if MULTI_TOKEN:
            request = tl.load(token_requests + token)
        if CHOSEN:
            longest = tl.minimum(tl.load(positions + token).to(tl.int32) + 1, top_k)
        else:
            longest = tl.load(seq_lens + request)  # 0 for a row that pads a graph: no tiles are read
        length = tl.zeros((ROWS,), tl.int32) + longest
    per_split = tl.cdiv(tl.cdiv(longest, TILE), splits)
    begin, end = split * per_split, tl.minimum((split + 1) * per_split, tl.cdiv(longest, TILE))

    table = tables + request.to(tl.int64) * table_width
    chosen_row = chosen + token.to(tl.int64) * top_k if CHOSEN else None
    d, r = tl.arange(0, CHUNK), tl.arange(0, DP)
    q_row = q + (first + row).to(tl.int64)[:, None] * (RANK + D)
    row_ok = (row < count)[:, None]
    q_rope = tl.load(q_row + RANK + r[None, :], mask=row_ok & (r < D)[None, :], other=0.0)
    factor = tl.zeros((ROWS,), tl.float32) + qk_scale
    if FP8:
        most = tl.zeros((ROWS,), tl.float32) + 1e-12
        for c in tl.static_range(CHUNKS):
            x = tl.load(q_row + c * CHUNK + d[None, :], mask=row_ok & (c * CHUNK + d < RANK)[None, :], other=0.0)
            most = tl.maximum(most, tl.max(tl.abs(x.to(tl.float32)), 1))
        by_row = most / LIMIT
        factor *= by_row
        q_rope = q_rope.to(tl.float32) / by_row[:, None]
        tl.debug_barrier()  # queries are loaded again below: registers cannot hold all of them at a time
    queries, acc = (), ()
    for c in tl.static_range(CHUNKS):
        x = tl.load(q_row + c * CHUNK + d[None, :], mask=row_ok & (c * CHUNK + d < RANK)[None, :], other=0.0)
        if FP8:
            x = x.to(tl.float32) / by_row[:, None]
            queries = queries + (tl.trans(_two_codes(tl.trans(x), ROWS, CODE)),)
        else:
            queries = queries + (x.to(WIDE),)
        if ROWS_FIRST:
            acc = acc + (tl.zeros((ROWS, CHUNK), tl.float32),)
        else:
            acc = acc + (tl.zeros((CHUNK, ROWS), tl.float32),)
    q_rope = q_rope.to(ROPE_CODE)

    SHAPE_0: tl.constexpr = ROWS if ROWS_FIRST else TILE
    SHAPE_1: tl.constexpr = TILE if ROWS_FIRST else ROWS
    peak = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((SHAPE_0, SHAPE_1), tl.float32)
    t = tl.arange(0, TILE)
    for tile in tl.range(begin, end, num_stages=STAGES):
        # No mask over tokens: memory past the context is another request's or the scratch block, and finite; its weight is 0.
        place = tile * TILE + t
        inside = place < longest
        if CHOSEN:
            place = tl.load(chosen_row + place, mask=inside, other=-1)
            inside = place >= 0
            place = tl.maximum(place, 0)
        seen = _along(inside, ROW_AXIS)
        if TILED:
            seen = _along(place, ROW_AXIS) < _along(length, TOKEN_AXIS)
        index = place // BLOCK_SIZE
        block = tl.load(table + index, mask=index < table_width, other=0).to(tl.int64)
        offset = place % BLOCK_SIZE
        base = block * LATENT_STRIDES[0] + offset * LATENT_STRIDES[1]
        rope_at = rope + (block * ROPE_STRIDES[0] + offset * ROPE_STRIDES[1])[:, None] + r[None, :]
        if DP == D:
            k_rope = tl.load(rope_at)
        else:
            k_rope = tl.load(rope_at, mask=(r < D)[None, :], other=0.0)
        score = _scores(k_rope.to(ROPE_CODE), q_rope, tl.zeros((SHAPE_0, SHAPE_1), tl.float32), ROWS_FIRST)
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
        score = tl.where(seen, score * _along(factor, TOKEN_AXIS), -1e30)
        higher = tl.maximum(peak, tl.max(score, TOKEN_AXIS))
        p = tl.where(seen, tl.exp2(score - _along(higher, TOKEN_AXIS)), 0.0)
        shrink = _along(tl.exp2(peak - higher), TOKEN_AXIS)
        total = total * shrink + p
        peak = higher
        moved = ()
        for c in tl.static_range(CHUNKS):
            if FP8:
                weights = (p * _along(by_token[c] * LIFT, ROW_AXIS)).to(tl.float16)
                moved = moved + (_weighed(weights, _wide(keys[c], ASM), acc[c] * shrink, ROWS_FIRST),)
            else:
                moved = moved + (_weighed(p.to(WIDE), keys[c], acc[c] * shrink, ROWS_FIRST),)
        acc = moved

    sum_of_p = tl.sum(total, TOKEN_AXIS) * (LIFT if FP8 else 1.0)
    if SPLIT:
        at = split * rows_in_all + first + row
        tl.store(sums + at, peak, mask=row < count)
        tl.store(sums + splits * rows_in_all + at, sum_of_p, mask=row < count)
        if begin < end:  # partial sums of an empty part are not read
            to = parts + at.to(tl.int64)[:, None] * RANK + d[None, :]
            for c in tl.static_range(CHUNKS):
                y = acc[c] if ROWS_FIRST else tl.trans(acc[c])
                tl.store(to + c * CHUNK, y, mask=row_ok & (c * CHUNK + d < RANK)[None, :])
    else:
        whole = _along(1.0 / tl.where(sum_of_p > 0, sum_of_p, 1.0), TOKEN_AXIS)
        to = out + (first + row).to(tl.int64)[:, None] * RANK + d[None, :]
        for c in tl.static_range(CHUNKS):
            y = acc[c] * whole if ROWS_FIRST else tl.trans(acc[c] * whole)
            tl.store(to + c * CHUNK, y.to(out.dtype.element_ty), mask=row_ok & (c * CHUNK + d < RANK)[None, :])


@triton.jit
def _merge(
    parts, sums, out, rows_in_all, splits,
    RANK: tl.constexpr, RP: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one row of out; parts with no visible position are skipped."""
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
class _TokenRequestsKey(Key[Tensor]):
    """Each token's request."""


def _row_tiles(batch: ForwardBatch, heads: int, rows: int) -> Tensor:
    """INT32 [n, 3] (request, first row of q, rows): tiles of each request's rows, sorted by context, longest first."""

    def make() -> Tensor:
        tiles, start = [], 0
        for request, (count, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
            row_starts = range(0, count * heads, rows)
            tiles += [(context - count + at // heads, request, start + at, min(rows, count * heads - at)) for at in row_starts]
            start += count * heads
        tiles.sort(reverse=True)
        return to_device([tile[1:] for tile in tiles], torch.int32, batch.seq_lens.device)

    return batch.cache.get(_TilesKey(heads, rows), make)


def _token_requests(batch: ForwardBatch) -> Tensor:
    def make() -> Tensor:
        return to_device([i for i, n in enumerate(batch.query_lens) for _ in range(n)], torch.int32, batch.seq_lens.device)

    return batch.cache.get(_TokenRequestsKey(), make)


def _shape(rows: int, item: int) -> dict[str, int]:
    """Configuration for `rows` rows that share a context: rows, tokens and latent values per step, warps, stages, whether rows
    come first, and CTAs per SM. Measured on an H200.
    """
    if pipeline(3) < 3 or item > 2:
        return dict(ROWS=16, TILE=32, chunk=128, warps=4, stages=1, first=0, sharing=1)
    if rows <= 16:
        return dict(ROWS=16, TILE=64, chunk=128, warps=4, stages=2, first=0, sharing=2 if item == 1 else 1)
    return dict(ROWS=64, TILE=64, chunk=256 if item == 2 else 128, warps=8, stages=2, first=1, sharing=1)


MAX_SPLITS = 64


def splits_for(ctas: int, longest: int, tile: int, sharing: int = 1) -> int:
    """Number of splits of a context, so that the CTAs fill whole waves of the device and none has less than two tiles."""
    units = sharing * device_units()
    most = max(1, min(MAX_SPLITS, longest // (2 * tile), 2 * units // ctas))
    waves = [-(-ctas * splits // units) / splits for splits in range(1, most + 1)]  # time in units of a whole context
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
        None if single else _token_requests(batch) if chosen is not None else None, batch.positions, out, parts, sums,
        scale * LOG2E, batch.block_tables.stride(0), 0 if chosen is None else chosen.shape[1], tokens * heads,
        HEADS=heads, ROWS=c["ROWS"], RANK=rank, CHUNK=chunk, CHUNKS=-(-rank // chunk), D=rope, DP=power_of_2(rope, 16),
        LATENT_STRIDES=cache.latent.stride()[:2], ROPE_STRIDES=cache.rope.stride()[:2],
        SCALE_STRIDES=cache.scale.stride()[:2] if cache.scale is not None else (0, 0),
        BLOCK_SIZE=cache.latent.shape[1], TILE=c["TILE"], TILED=tiled,
        CHOSEN=chosen is not None, MULTI_TOKEN=chosen is not None and not single, SPLIT=split, ROWS_FIRST=bool(c["first"]),
        **codes(kind), ROPE_CODE=codes(cache.rope.dtype)["CODE"], ASM=inline_ptx(), STAGES=pipeline(c["stages"]),
        num_warps=c["warps"],
    )  # fmt: skip
    if split:
        launch(_merge, (tokens * heads,),
            parts, sums, out, tokens * heads, splits,
            RANK=rank, RP=power_of_2(rank), SPLITS=power_of_2(splits), GROUP=8, num_warps=4,
        )  # fmt: skip
    return out
