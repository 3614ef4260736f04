"""The indexer's top-k: scores of all keys that a token sees, and the positions of the highest, exact and in ascending order.

Scores are FP8 products of key tiles by the queries of all heads of some tokens of a request, laid out so that the sum over
heads is within a thread. They are written to a scratch buffer [rows, longest context], which is bounded by processing some rows
at a time. Each row is divided into chunks that a CTA holds in registers. The CTA finds the chunk's threshold, the smallest
score that is kept, by searching between a score that enough others reach and one that too few reach; other CTAs then compact
the chosen positions into a list. Lists of several chunks are selected from again. Ties go to the earlier position, at each
level. Lengths are read on the device; the host's lengths are upper bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.batch import ForwardBatch, Key, to_device
from octavo.errors import OctavoError
from octavo.kvcache import IndexCache
from octavo.ops.contract import Rotation
from octavo.ops.triton.index_keys import scored_queries
from octavo.ops.triton.launch import device_units, launch, pipeline, power_of_2, release, shared_memory, wait

__all__ = ["select_keys"]

SCRATCH = 1 << 26  # scores in the scratch buffer, FP32
CHUNK = 1 << 15  # scores of a CTA that finds a threshold
SEGMENT = 1 << 11  # scores of a CTA that compacts; counts fit into 15 bits
SECANTS = 16  # secant steps for a threshold before it is bisected
LOWEST: tl.constexpr = tl.constexpr(-0x80000000)
DEPTH = 16  # K step of the FP32 product


@triton.jit
def _group(groups, starts, seq_lens, live, number, which, SINGLE: tl.constexpr):
    """(first token, number of tokens, request) of a group of tokens of one request, and how many positions the token at `which`
    sees.
    """
    if SINGLE:
        token, count, request = number, 1, number
    else:
        token, count, request = tl.load(groups + 3 * number), tl.load(groups + 3 * number + 1), tl.load(groups + 3 * number + 2)
    length = tl.load(seq_lens + request)
    sees = length - (tl.load(starts + request + 1) - token) + 1 + which
    if live is not None:
        length = tl.where(token + which < tl.load(live), length, 0)
    return token, count, request, tl.where(length > 0, sees, 0)


@triton.jit
def _index_logits(
    q, weights, keys, key_scales, tables, groups, starts, seq_lens, live, out, first, width, table_stride,
    key_block, key_token, scale_block, scale_token,
    HEADS: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DEPTH: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr, BM: tl.constexpr, TOP_K: tl.constexpr, SINGLE: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Scores of a group's tokens, in rows [number * TOKENS, ...) of out [rows, width]. Skipped if every visible position is
    chosen.
    """
    number = tl.program_id(0)
    release(PDL)
    wait(PDL)
    token, count, request, sees = _group(groups, starts, seq_lens, live, first + number, 0, SINGLE)
    most = sees + count - 1
    if (sees <= 0) | (most <= TOP_K):
        return
    column = tl.arange(0, TOKENS * HP)
    head, which = column % HP, column // HP
    column_ok = (head < HEADS) & (which < count)
    d = tl.arange(0, DP)
    q_row = (token + which) * HEADS + head
    by = tl.load(weights + q_row, mask=column_ok, other=0.0)
    q_at = q + q_row.to(tl.int64)[:, None] * D
    if key_scales is not None:
        queries = tl.load(q_at + d[None, :], mask=column_ok[:, None] & (d < D)[None, :], other=0.0)
    tiles, parts = tl.cdiv(most, BM), tl.num_programs(1)
    per_part = tl.cdiv(tiles, parts)
    begin = tl.program_id(1) * per_part
    to = out + number * TOKENS * width
    for tile in tl.range(begin, tl.minimum(begin + per_part, tiles), num_stages=STAGES):
        place = tile * BM + tl.arange(0, BM)
        seen = place < most
        block = tl.load(tables + request * table_stride + place // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        offset = place % BLOCK_SIZE
        key_at = keys + (block * key_block + offset * key_token)[:, None]
        if key_scales is not None:
            if D == DP:
                k = tl.load(key_at + d[None, :])
            else:
                k = tl.load(key_at + d[None, :], mask=(d < D)[None, :], other=0.0)
            scale = tl.load(key_scales + block * scale_block + offset * scale_token)
            acc = tl.dot(k, tl.trans(queries))
        else:
            acc = tl.zeros((BM, TOKENS * HP), tl.float32)
            for deep in tl.static_range(0, D, DEPTH):
                e = deep + tl.arange(0, DEPTH)[None, :]
                a = tl.load(key_at + e, mask=e < D, other=0.0)
                b = tl.load(q_at + e, mask=column_ok[:, None] & (e < D), other=0.0)
                acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL) * by[None, :]
        if TOKENS == 1:
            score = tl.sum(acc, 1)
            if key_scales is not None:
                score *= scale
            tl.store(to + place, score, mask=seen)
        else:
            score = tl.sum(tl.reshape(acc, (BM, TOKENS, HP)), 2)
            if key_scales is not None:
                score *= scale[:, None]
            row = tl.arange(0, TOKENS)[None, :]
            tl.store(to + row * width + place[:, None], score, mask=seen[:, None] & (row < count))


@triton.jit
def _ordered(x):
    """Integers in the order of FP32 x; both zeros are equal and NaN ranks as -infinity."""
    x = tl.where(x == x, x, float("-inf"))
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    """The inverse of _ordered."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _keys(scores, places, row, at, length, LEVEL: tl.constexpr):
    """A row's scores at `at` as ordered integers; LOWEST, below all of them, where there is no score."""
    ok = at < length
    if LEVEL > 0:
        ok &= tl.load(places + row + at, mask=ok, other=-1) >= 0
    return tl.where(ok, _ordered(tl.load(scores + row + at, mask=ok, other=0.0)), LOWEST)


@triton.jit
def _threshold(key, valid, wanted, SECANTS: tl.constexpr):
    """The largest number that at least `wanted` of the `valid` keys reach, or any number that exactly `wanted` keys reach."""
    low, high = tl.min(tl.where(key > LOWEST, key, 0x7FFFFFFF), 0), tl.max(key, 0) + 1
    reach_low = valid  # number of keys >= low
    above, under = (valid - wanted).to(tl.float32), (0 - wanted).to(tl.float32)  # errors, for the Illinois method
    step, side = 0, 0
    while (reach_low != wanted) & (low < high - 1):
        middle = (low & high) + ((low ^ high) >> 1)
        if step < SECANTS:
            a, b = _value(low), _value(high)
            guess = _ordered(a + (b - a) * (above / (above - under)))
            middle = tl.minimum(tl.maximum(guess, low + 1), high - 1)
        reach = tl.sum((key >= middle).to(tl.int32), 0)
        error = (reach - wanted).to(tl.float32)
        if reach >= wanted:
            low, reach_low, above = middle, reach, error
            under = tl.where(side > 0, under * 0.5, under)
            side = 1
        else:
            high, under = middle, error
            above = tl.where(side < 0, above * 0.5, above)
            side = -1
        step += 1
    return low


@triton.jit
def _find_least(
    scores, places, groups, starts, seq_lens, live, found, out, first, width, out_width,
    TOP_K: tl.constexpr, KP: tl.constexpr, CHUNK: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr,
    TOKENS: tl.constexpr, SINGLE: tl.constexpr, LEVEL: tl.constexpr, FINAL: tl.constexpr, SECANTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Threshold of a chunk of a row: SEGMENTS segments of scores or, from level 1 on, of lists that hold TOP_K entries per
    CHUNK of the level below.

    Stored in `found`: the smallest key that is kept, how many keys equal to it are kept, and per segment the number of greater
    and of equal keys, 16 bits each. Entries of `out` that `_list` will not write are set here. FINAL: `out` has one row per
    token.
    """
    row, part = tl.program_id(0), tl.program_id(1)
    release(PDL)
    wait(PDL)
    which = row % TOKENS
    token, count, _, length = _group(groups, starts, seq_lens, live, first + row // TOKENS, which, SINGLE)
    if which >= count:
        return
    i = tl.arange(0, KP)
    if length <= TOP_K:
        if FINAL:
            tl.store(out + (token + which).to(tl.int64) * TOP_K + i, tl.where(i < length, i, -1), mask=i < TOP_K)
        return
    for _ in tl.static_range(LEVEL):
        length = tl.cdiv(length, CHUNK) * TOP_K
    start = part * SEGMENTS * SEGMENT
    if start >= length:
        return
    at = start + tl.arange(0, SEGMENTS * SEGMENT)
    key = _keys(scores, places, row.to(tl.int64) * width, at, length, LEVEL)
    valid = tl.sum((key > LOWEST).to(tl.int32), 0)
    wanted = tl.minimum(valid, TOP_K)
    least = _threshold(key, valid, wanted, SECANTS)
    both = (key > least).to(tl.int32) + ((key == least).to(tl.int32) << 16)
    counts = tl.sum(tl.reshape(both, (SEGMENTS, SEGMENT)), 1)
    to = found + (row * tl.num_programs(1) + part).to(tl.int64) * (2 + SEGMENTS)
    tl.store(to, least)
    tl.store(to + 1, wanted - tl.sum(counts & 0xFFFF, 0))
    tl.store(to + 2 + tl.arange(0, SEGMENTS), counts)
    if not FINAL:
        unused = out + row.to(tl.int64) * out_width + part * TOP_K + i
        tl.store(unused, tl.full((KP,), -1, tl.int32), mask=(i >= wanted) & (i < TOP_K))


@triton.jit
def _list(
    scores, places, groups, starts, seq_lens, live, found, out_scores, out, first, width, out_width, parts,
    TOP_K: tl.constexpr, CHUNK: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, TOKENS: tl.constexpr,
    SINGLE: tl.constexpr, LEVEL: tl.constexpr, FINAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compact a segment's chosen positions, behind those of the segments before it."""
    row, segment = tl.program_id(0), tl.program_id(1)
    release(PDL)
    wait(PDL)
    which = row % TOKENS
    token, count, _, length = _group(groups, starts, seq_lens, live, first + row // TOKENS, which, SINGLE)
    if (which >= count) | (length <= TOP_K):
        return
    for _ in tl.static_range(LEVEL):
        length = tl.cdiv(length, CHUNK) * TOP_K
    if segment * SEGMENT >= length:
        return
    part, of_part = segment // SEGMENTS, segment % SEGMENTS
    given = found + (row * parts + part).to(tl.int64) * (2 + SEGMENTS)
    least, missing = tl.load(given), tl.load(given + 1)
    i = tl.arange(0, SEGMENTS)
    before = tl.where(i < of_part, tl.load(given + 2 + i), 0)
    higher, alike = tl.sum(before & 0xFFFF, 0), tl.sum(before >> 16, 0)
    at = segment * SEGMENT + tl.arange(0, SEGMENT)
    key = _keys(scores, places, row.to(tl.int64) * width, at, length, LEVEL)
    over, same = (key > least).to(tl.int32), (key == least).to(tl.int32)
    ranks = tl.cumsum(over + (same << 16), 0)
    equal = alike + (ranks >> 16)
    chosen = (over != 0) | ((same != 0) & (equal <= missing))
    rank = higher + (ranks & 0xFFFF) + tl.minimum(equal, missing) - 1
    if LEVEL > 0:
        at = tl.load(places + row.to(tl.int64) * width + at, mask=chosen, other=0)
    if FINAL:
        tl.store(out + (token + which).to(tl.int64) * TOP_K + rank, at, mask=chosen)
    else:
        to = row.to(tl.int64) * out_width + part * TOP_K + rank
        tl.store(out_scores + to, _value(key), mask=chosen)
        tl.store(out + to, at, mask=chosen)


@dataclass(frozen=True)
class _Groups(Key["tuple[Tensor, int]"]):
    """Groups of up to `tokens` tokens of one request, for the requests from `first` on: INT32 [groups, 3] (first token, number
    of tokens, request), and the number of groups.
    """

    tokens: int
    first: int


def _groups(batch: ForwardBatch, tokens: int, first: int) -> tuple[Tensor, int]:
    found, start = [], 0
    for request, count in enumerate(batch.query_lens):
        if request >= first:
            found += [(start + i, min(tokens, count - i), request) for i in range(0, count, tokens)]
        start += count
    return to_device(found, torch.int32, batch.seq_lens.device), len(found)


def _tiles(codes: bool, hp: int, single: bool) -> dict[str, int]:
    """Tokens of a CTA, keys of a tile, warps, pipeline stages, and CTAs per SM."""
    if not codes:
        return {"TOKENS": 1, "BM": 32, "stages": 1, "warps": 4, "share": 8}
    if single:
        return {"TOKENS": 1, "BM": 128, "stages": 4, "warps": 4, "share": 8}
    large = shared_memory() > 128 << 10
    return {"TOKENS": max(1, (256 if large else 128) // hp), "BM": 64 if large else 128, "stages": 3, "warps": 4, "share": 4}


def _select_warps(size: int) -> int:
    return min(16, max(4, size // 512))


def select_keys(
    q: Tensor, weights: Tensor, rotation: Rotation, cache: IndexCache, batch: ForwardBatch, top_k: int,
    config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    if 2 * top_k > CHUNK:
        raise OctavoError(
            f"The indexer is to choose {top_k} keys a token, and the kernels of this device choose {CHUNK // 2} at most; "
            "set a smaller index_topk in config.json."
        )
    out = torch.empty(len(q), top_k, dtype=torch.int32, device=q.device)
    if not len(q):
        return out
    queries, by = scored_queries(q, weights, rotation, cache)
    requests = len(batch.query_lens)
    decodes = next((i for i, n in enumerate(batch.query_lens) if n != 1), requests)
    for first, stop in ((0, decodes), (decodes, requests)):
        if first < stop:
            _choose(queries, by, cache, batch, out, first, stop, config or {})
    return out


def _choose(
    q: Tensor, by: Tensor, cache: IndexCache, batch: ForwardBatch, out: Tensor, first: int, stop: int, config: dict[str, int]
) -> None:
    """Compute the rows of `out` for requests [first, stop): the one-token requests at the front, or all requests after them."""
    heads, dim = q.shape[1:]
    top_k = out.shape[1]
    hp, single = power_of_2(heads, 16), first == 0 and max(batch.query_lens[:stop]) == 1
    c = _tiles(cache.scale is not None, hp, single) | config
    tokens = c["TOKENS"]
    groups, count = (None, stop) if single else batch.cache.get(_Groups(tokens, first), lambda: _groups(batch, tokens, first))
    longest = max(batch.context_lens[first:stop])
    width = -(-longest // 16) * 16
    at_a_time = max(1, SCRATCH // (width * tokens))
    room = min(at_a_time, count) * tokens * (width if longest > top_k else 0)
    scores = torch.empty(room, dtype=torch.float32, device=q.device)
    live = (groups, batch.query_start_loc, batch.seq_lens, batch.live)
    scale_strides = (0, 0) if cache.scale is None else cache.scale.stride()[:2]
    fixed: dict[str, Any] = dict(TOKENS=tokens, TOP_K=top_k, SINGLE=single)
    for begin in range(0, count, at_a_time):
        number = min(at_a_time, count - begin)
        if longest > top_k:
            parts = min(triton.cdiv(longest, c["BM"]), max(1, triton.cdiv(c["share"] * device_units(), number)))
            launch(_index_logits, (number, parts),
                q, by, cache.k, cache.scale, batch.block_tables, *live, scores, begin, width, batch.block_tables.stride(0),
                *cache.k.stride()[:2], *scale_strides,
                HEADS=heads, HP=hp, D=dim, DP=power_of_2(dim, 32), DEPTH=DEPTH, BLOCK_SIZE=cache.k.shape[1], BM=c["BM"],
                STAGES=pipeline(c["stages"]), num_warps=c["warps"], **fixed,
            )  # fmt: skip
        _highest(scores, live, out, begin, number * tokens, width, longest, fixed)


def _highest(
    scores: Tensor, live: tuple[Any, ...], out: Tensor, first: int, rows: int, width: int, longest: int, fixed: dict[str, Any]
) -> None:
    """Positions of the top_k of each of `rows` rows of at most `longest` scores, chunk by chunk and level by level."""
    top_k = out.shape[1]
    places: Tensor | None = None
    level = 0

    def room(width: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(rows, width, dtype=dtype, device=out.device)

    while True:
        parts = triton.cdiv(longest, CHUNK)
        final = parts == 1
        size = power_of_2(longest, 128) if final else CHUNK
        segment = min(size, SEGMENT)
        shape = dict(CHUNK=CHUNK, SEGMENTS=size // segment, SEGMENT=segment, LEVEL=level, FINAL=final, **fixed)
        to, found, out_width = out if final else room(parts * top_k), room(parts * (2 + size // segment)), parts * top_k
        launch(_find_least, (rows, parts),
            scores, places, *live, found, to, first, width, out_width,
            KP=power_of_2(top_k), SECANTS=SECANTS, num_warps=_select_warps(size), **shape,
        )  # fmt: skip
        to_scores = None if final else room(out_width, torch.float32)
        if longest > top_k:
            launch(_list, (rows, parts * (size // segment)),
                scores, places, *live, found, to_scores, to, first, width, out_width, parts, num_warps=4, **shape,
            )  # fmt: skip
        if to_scores is None:
            return
        scores, places, width, longest, level = to_scores, to, out_width, out_width, level + 1
