"""A draw of one token a row by temperature, top_k, top_p and min_p, without sorting: one program a row.

Weights are exp((x - largest) / temperature). A first look at a row counts, or sums, the weights over a few edges, and what
is surely not drawn from is left out of the list that stays. In the list, the least weight that is kept is found by cutting the
range of its bits into parts again and again; equal ones are kept by their places, the first ones first. What is kept is then
walked through in the order of places up to u times its sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.contract import Cut
from octavo.ops.triton.launch import launch, release, wait

__all__ = ["draw"]

CHUNK = 4096  # values looked at at a time
EDGES = 8  # that are looked at at a time, which cut a range into one part more
WARPS = 16
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
ONE: tl.constexpr = tl.constexpr(0x3F800000)  # bits of 1.0, the largest weight


@triton.jit
def _weights(row, at, size, most, by, LIST: tl.constexpr):
    """Of a row of logits, or of the list that was made of it, which has weights; 0 past the end."""
    if LIST:
        return tl.load(row + at, mask=at < size, other=0.0)
    w = tl.exp2((tl.load(row + at, mask=at < size, other=0.0) - most) * by)
    w = tl.where(w == w, w, 1.0)  # infinity less infinity: so NaN is as good as infinite
    return tl.where(at < size, w, 0.0)


@triton.jit
def _over(row, size, most, by, edges, counted, LIST: tl.constexpr, CHUNK: tl.constexpr, EDGES: tl.constexpr):
    """Of the weights whose bits are over each of `edges`: how many there are if `counted`, else their sum."""
    found = ()
    for _ in tl.static_range(EDGES):
        found += (tl.zeros((CHUNK,), tl.float32),)
    for start in range(0, size, CHUNK):
        at = start + tl.arange(0, CHUNK)
        w = _weights(row, at, size, most, by, LIST)
        bits = w.to(tl.int32, bitcast=True)
        x = tl.where(counted, (at < size).to(tl.float32), w)
        more = ()
        for i in tl.static_range(EDGES):
            more += (found[i] + tl.where(bits > edges[i], x, 0.0),)
        found = more
    sums = ()
    for i in tl.static_range(EDGES):
        sums += (tl.sum(found[i], 0),)
    return sums


@triton.jit
def _between(over, edges, enough, low, high, EDGES: tl.constexpr):
    """Of rising `edges` between `low` and `high` the last with `enough` over it, and the first without."""
    for i in tl.static_range(EDGES):
        low = tl.where(over[i] >= enough, edges[i], low)
    for i in tl.static_range(EDGES - 1, -1, -1):
        high = tl.where(over[i] < enough, edges[i], high)
    return low, high


@triton.jit
def _least(row, size, low, high, counted, enough, CHUNK: tl.constexpr, EDGES: tl.constexpr):
    """The least bits in (low, high] such that what the list has over them is less than `enough`, as it is over `high`."""
    while high - low > 1:
        edges = ()
        for i in tl.static_range(EDGES):
            edges += (low + ((high - low).to(tl.int64) * (i + 1) // (EDGES + 1)).to(tl.int32),)
        over = _over(row, size, 0.0, 1.0, edges, counted, True, CHUNK, EDGES)
        low, high = _between(over, edges, enough, low, high, EDGES)
    return high


@triton.jit
def _above(row, size, least, CHUNK: tl.constexpr):
    """How many weights of the list have bits over `least`, and their sum."""
    number, total = tl.zeros((CHUNK,), tl.int32), tl.zeros((CHUNK,), tl.float32)
    for start in range(0, size, CHUNK):
        w = tl.load(row + start + tl.arange(0, CHUNK), mask=start + tl.arange(0, CHUNK) < size, other=0.0)
        over = w.to(tl.int32, bitcast=True) > least
        number += over.to(tl.int32)
        total += tl.where(over, w, 0.0)
    return tl.sum(number, 0), tl.sum(total, 0)


@triton.jit
def _listed(row, places, size, most, by, low, CHUNK: tl.constexpr):
    """The list: weights whose bits are over `low` in place of the row's first logits, where they stood in `places`; how many
    there are, and their sum."""
    count, total = 0, 0.0
    for start in range(0, size, CHUNK):
        at = start + tl.arange(0, CHUNK)
        w = _weights(row, at, size, most, by, False)
        keep = ((w.to(tl.int32, bitcast=True) > low) & (at < size)).to(tl.int32)
        found = tl.sum(keep, 0)
        if found > 0:
            to = count + tl.cumsum(keep, 0) - 1
            tl.debug_barrier()  # all are read before one is overwritten
            tl.store(row + to, w, mask=keep == 1)
            tl.store(places + to, at, mask=keep == 1)
            total += tl.sum(w * keep, 0)
        count += found
    tl.debug_barrier()
    return count, total


@triton.jit
def _drawn_from(row, start, size, most, by, least, kept, before, LIST: tl.constexpr, CHUNK: tl.constexpr):
    """Weights from `start` on, 0 where not kept, and how many of the row up to here have the bits `least`."""
    at = start + tl.arange(0, CHUNK)
    w = _weights(row, at, size, most, by, LIST)
    if LIST:
        bits = w.to(tl.int32, bitcast=True)
        same = ((bits == least) & (at < size)).to(tl.int32)
        keep = (bits > least) | ((same == 1) & (before + tl.cumsum(same, 0) <= kept))
        w = tl.where(keep, w, 0.0)
        before += tl.sum(same, 0)
    return w, before


@triton.jit
def _draw(
    logits, temperature, u, top_k, top_p, min_p, places, out, size, stride,
    CUT: tl.constexpr, CHUNK: tl.constexpr, EDGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    row = logits + n.to(tl.int64) * stride
    places += n.to(tl.int64) * size
    release(PDL)
    wait(PDL)
    by = LOG2E / tl.load(temperature + n)
    largest = tl.full((CHUNK,), -float("inf"), tl.float32)
    for start in range(0, size, CHUNK):
        at = start + tl.arange(0, CHUNK)
        largest = tl.maximum(largest, tl.load(row + at, mask=at < size, other=-float("inf")))
    most = tl.max(largest, 0)
    least, kept, entries = 0, 0, size
    if CUT:
        k, p = tl.load(top_k + n), tl.load(top_p + n)
        low, high = tl.load(min_p + n).to(tl.int32, bitcast=True) - 1, tl.full((), ONE, tl.int32)
        edges = (low,)
        for i in tl.static_range(EDGES - 1, 0, -1):  # and 2 ** -28, and so on, -10, -6, -3, -1
            edges += (tl.maximum((127 - i * (i + 1) // 2) << 23, low),)
        counted = k < size
        over = _over(row, size, most, by, edges, counted, False, CHUNK, EDGES)
        enough = k.to(tl.float32) if counted else tl.where(p < 1, p * over[0], float("inf"))
        low, high = _between(over, edges, enough, low, high, EDGES)
        entries, left = _listed(row, places, size, most, by, low, CHUNK)
        left = tl.where(counted, left, over[0])  # what top_p is a share of
        least, kept = low + 1, size  # all that have these bits
        for turn in range(2):  # top_k and then top_p, by the same code
            by_number = turn == 0
            if (k < entries) if by_number else (p < 1):
                enough = tl.where(by_number, k.to(tl.float32), p * left)
                highest = tl.where(counted & (turn == 1), ONE, high)
                found = _least(row, entries, least - 1, highest, by_number, enough, CHUNK, EDGES)
                if found > least:
                    least, kept = found, size
                number, above = _above(row, entries, least, CHUNK)
                weight = least.to(tl.float32, bitcast=True)
                missing = (k - number) if by_number else tl.ceil((enough - above) / weight).to(tl.int32)
                kept = tl.maximum(tl.minimum(kept, missing), 1)
                left = above + kept * weight
    total, before = tl.zeros((), tl.float64), 0
    for start in range(0, entries, CHUNK):
        w, before = _drawn_from(row, start, entries, most, by, least, kept, before, CUT, CHUNK)
        total += tl.sum(w, 0).to(tl.float64)
    target, found = tl.load(u + n) * total, tl.zeros((), tl.int32)
    start, before, end = 0, 0, tl.zeros((), tl.float64)
    while (start < entries) & (end <= target):
        w, before = _drawn_from(row, start, entries, most, by, least, kept, before, CUT, CHUNK)
        begin = end
        end += tl.sum(w, 0).to(tl.float64)
        if end > target:
            at = start + tl.arange(0, CHUNK)
            ends = begin + tl.cumsum(w.to(tl.float64), 0)
            last_one = tl.max(tl.where(w > 0, at, 0), 0)  # which rounding must not pass
            found = tl.minimum(tl.min(tl.where((w > 0) & (ends > target), at, entries), 0), last_one)
        start += CHUNK
    if CUT:
        found = tl.load(places + found)
    tl.store(out + n, found.to(tl.int64))


def draw(logits: Tensor, temperature: Tensor, u: Tensor, cut: Cut | None) -> Tensor:
    rows, size = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    places = torch.empty(0 if cut is None else (rows, size), dtype=torch.int32, device=logits.device)
    top_k, top_p, min_p = cut[:3] if cut is not None else (places, temperature, temperature)
    if rows:
        launch(_draw, (rows,),
            logits, temperature, u, top_k, top_p, min_p, places, out, size, logits.stride(0),
            CUT=cut is not None, CHUNK=CHUNK, EDGES=EDGES, num_warps=WARPS,
        )  # fmt: skip
    return out
