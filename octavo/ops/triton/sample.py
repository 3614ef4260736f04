"""Sampling of one token a row with temperature, top_k, top_p and min_p, without sorting.

Weights are exp((x - max) / temperature). A row is split over CTAs, which count and sum the weights above a few thresholds
(edges). From these, a second kernel compacts the weights that may be sampled into a list, in index order. In the list one CTA
finds the smallest weight that is kept, by repeatedly subdividing the range of its bits; ties are kept in index order. It then
samples by inverse transform: the cumulative sum of the kept weights, in index order, up to u times their total.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.contract import Filters
from octavo.ops.triton.argmax import argmax
from octavo.ops.triton.launch import launch, power_of_2, release, wait

__all__ = ["sample"]

CHUNK = 2048  # values of a CTA of a row; values of the list per loop iteration
EDGES = 8  # thresholds tested at a time, which divide a range into EDGES + 1 parts
ROW_WARPS, LIST_WARPS = 8, 16
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
ONE: tl.constexpr = tl.constexpr(0x3F800000)  # the bits of 1.0, the largest weight
# Per-row parameters are scalar loads, so the alignment of their tensors need not specialize the kernel.
kernel = triton.jit(do_not_specialize_on_alignment=["temperature", "top_k", "top_p", "min_p", "u"])


@triton.jit
def _weights_of(logits, best, temperature, n, at, size, stride):
    """Weights of row n at indices `at`; 0 past the end. `best` is the index of the row's largest logit."""
    row = logits + n.to(tl.int64) * stride
    most = tl.load(row + tl.load(best + n))
    most = tl.where(most == most, most, float("inf"))
    w = tl.exp2((tl.load(row + at, mask=at < size, other=0.0) - most) * (LOG2E / tl.load(temperature + n)))
    w = tl.where(w < 1, w, 1.0)  # inf - inf gives NaN: NaN ranks as infinity
    return tl.where(at < size, w, 0.0)


@triton.jit
def _first_edge(i, min_p, EDGES: tl.constexpr):
    """Threshold i, as the bits of a weight: 2 ** -1, -3, -6, -10 and so on from i = 1; the last is min_p's threshold."""
    low = tl.maximum(min_p.to(tl.int32, bitcast=True), 0) - 1  # min_p may be -0.0
    return tl.maximum(tl.where(i == EDGES, -1, (127 - i * (i + 1) // 2) << 23), low)


@kernel
def _sample_count(
    logits, best, temperature, min_p, counts, sums, size, stride,
    FILTERED: tl.constexpr, CHUNK: tl.constexpr, EDGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Per part of a row: count and sum of the weights above each first edge; without filters the FP64 sum of all weights."""
    n, part = tl.program_id(0), tl.program_id(1)
    to = n * tl.num_programs(1) + part
    release(PDL)
    wait(PDL)
    at = part * CHUNK + tl.arange(0, CHUNK)
    w = _weights_of(logits, best, temperature, n, at, size, stride)
    if FILTERED:
        least = tl.load(min_p + n)
        for i in tl.static_range(EDGES):
            over = (w.to(tl.int32, bitcast=True) > _first_edge(EDGES - i, least, EDGES)) & (at < size)
            tl.store(counts + to * EDGES + i, tl.sum(over.to(tl.int32), 0))
            tl.store(sums + to * EDGES + i, tl.sum(tl.where(over, w, 0.0), 0))
    else:
        tl.store(sums + to, tl.sum(w.to(tl.float64), 0))


@kernel
def _sample_unfiltered(
    logits, best, temperature, u, sums, out, size, stride,
    CHUNK: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Without filters: find the part in which the cumulative sum reaches u times the total, then the index within it."""
    n, parts = tl.program_id(0), tl.cdiv(size, CHUNK)
    release(PDL)
    wait(PDL)
    q = tl.arange(0, PARTS)
    part_count = tl.load(sums + n * parts + q, mask=q < parts, other=0.0)
    ends = tl.cumsum(part_count, 0)
    target = tl.load(u + n) * tl.max(ends, 0)
    part = tl.min(tl.where((part_count > 0) & (ends > target), q, tl.max(tl.where(part_count > 0, q, 0), 0)), 0)
    at = part * CHUNK + tl.arange(0, CHUNK)
    w = _weights_of(logits, best, temperature, n, at, size, stride)
    begin = tl.max(tl.where(q < part, ends, 0.0), 0)
    tl.store(out + n, _place_over(w, begin, target, at).to(tl.int64))


@triton.jit
def _place_over(w, begin, target, at):
    """The first index in `at` at which `begin` plus the cumulative sum of the weights exceeds `target`."""
    ends = begin + tl.cumsum(w.to(tl.float64), 0)
    last = tl.max(tl.where(w > 0, at, 0), 0)  # rounding must not pass the last nonzero weight
    return tl.min(tl.where((w > 0) & (ends > target), at, last), 0)


@kernel
def _sample_compact(
    logits, best, temperature, top_k, top_p, min_p, counts, sums, weights, places, numbers, lefts, size, stride,
    CHUNK: tl.constexpr, PARTS: tl.constexpr, EDGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compact one part of a row: weights above the lower edge, below which nothing can be kept, and their indices.

    Per row: int32 `numbers` [3] = (entries of the list, the lower edge, an upper edge above which too little lies), and
    `lefts`, the sum that top_p refers to.
    """
    n, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    release(PDL)
    wait(PDL)
    k, p = tl.load(top_k + n), tl.load(top_p + n)
    edges = _first_edge(EDGES - tl.arange(0, EDGES), tl.load(min_p + n), EDGES)
    q = tl.arange(0, PARTS)
    i = (n * parts + q)[:, None] * EDGES + tl.arange(0, EDGES)[None, :]
    count = tl.load(counts + i, mask=(q < parts)[:, None], other=0)
    total = tl.sum(tl.load(sums + i, mask=(q < parts)[:, None], other=0.0), 0)
    left = tl.max(total, 0)
    over = tl.where(k < size, tl.sum(count, 0).to(tl.float32), total)
    enough = tl.where(k < size, k.to(tl.float32), tl.where(p < 1, p * left, float("inf")))
    low = tl.max(tl.where(over >= enough, edges, tl.min(edges, 0)), 0)
    part_count = tl.max(tl.where((edges == low)[None, :], count, 0), 1)
    at = part * CHUNK + tl.arange(0, CHUNK)
    w = _weights_of(logits, best, temperature, n, at, size, stride)
    keep = (w.to(tl.int32, bitcast=True) > low) & (at < size)
    to = n.to(tl.int64) * size + tl.sum(tl.where(q < part, part_count, 0), 0) + tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(weights + to, w, mask=keep)
    tl.store(places + to, at, mask=keep)
    if part == 0:
        high = tl.min(tl.where(over < enough, edges, ONE), 0)
        tl.store(numbers + 3 * n, tl.sum(part_count, 0))
        tl.store(numbers + 3 * n + 1, low)
        tl.store(numbers + 3 * n + 2, high)
        tl.store(lefts + n, tl.where(k < size, tl.max(tl.where(edges == low, total, 0.0), 0), left))


@triton.jit
def _over(row, size, edges, counted, CHUNK: tl.constexpr, EDGES: tl.constexpr):
    """Over the list's weights whose bits exceed each of `edges`: their number if `counted`, else their sum."""
    found = ()
    for _ in tl.static_range(EDGES):
        found += (tl.zeros((CHUNK,), tl.float32),)
    for start in range(0, size, CHUNK):
        at = start + tl.arange(0, CHUNK)
        w = tl.load(row + at, mask=at < size, other=0.0)
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
def _least(row, size, low, high, counted, enough, CHUNK: tl.constexpr, EDGES: tl.constexpr):
    """The smallest bits in (low, high] such that the list has less than `enough` above them. Invariant: less than `enough` lies
    above `high`.
    """
    while high - low > 1:
        edges = ()
        for i in tl.static_range(EDGES):
            edges += (low + ((high - low).to(tl.int64) * (i + 1) // (EDGES + 1)).to(tl.int32),)
        over = _over(row, size, edges, counted, CHUNK, EDGES)
        for i in tl.static_range(EDGES):
            low = tl.where(over[i] >= enough, edges[i], low)
        for i in tl.static_range(EDGES - 1, -1, -1):
            high = tl.where(over[i] < enough, edges[i], high)
    return high


@triton.jit
def _kept(row, start, size, least, kept, before, CHUNK: tl.constexpr):
    """The list's weights from `start` on, with 0 for those not kept, and the number of weights equal to `least` so far."""
    at = start + tl.arange(0, CHUNK)
    w = tl.load(row + at, mask=at < size, other=0.0)
    bits = w.to(tl.int32, bitcast=True)
    same = ((bits == least) & (at < size)).to(tl.int32)
    keep = (bits > least) | ((same == 1) & (before + tl.cumsum(same, 0) <= kept))
    return tl.where(keep, w, 0.0), before + tl.sum(same, 0)


@kernel
def _sample(
    weights, places, numbers, lefts, top_k, top_p, u, out, size,
    CHUNK: tl.constexpr, EDGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    row, places = weights + n.to(tl.int64) * size, places + n.to(tl.int64) * size
    release(PDL)
    wait(PDL)
    k, p, left = tl.load(top_k + n), tl.load(top_p + n), tl.load(lefts + n)
    entries, low, high = tl.load(numbers + 3 * n), tl.load(numbers + 3 * n + 1), tl.load(numbers + 3 * n + 2)
    least, kept = low + 1, size  # initially all weights with these bits are kept
    for phase in range(2):  # first top_k, then top_p, with the same code
        by_number = phase == 0
        if (k < entries) if by_number else (p < 1):
            enough = tl.where(by_number, k.to(tl.float32), p * left)
            highest = tl.where((k < size) & (phase == 1), ONE, high)
            found = _least(row, entries, least - 1, highest, by_number, enough, CHUNK, EDGES)
            if found > least:
                least, kept = found, size
            number = _over(row, entries, (least,), True, CHUNK, 1)[0].to(tl.int32)
            above = _over(row, entries, (least,), False, CHUNK, 1)[0]
            weight = least.to(tl.float32, bitcast=True)
            missing = (k - number) if by_number else tl.ceil((enough - above) / weight).to(tl.int32)
            kept = tl.maximum(tl.minimum(kept, missing), 1)
            left = above + kept * weight
    total, before = tl.zeros((), tl.float64), 0
    for start in range(0, entries, CHUNK):
        w, before = _kept(row, start, entries, least, kept, before, CHUNK)
        total += tl.sum(w.to(tl.float64), 0)
    target, found = tl.load(u + n) * total, tl.zeros((), tl.int32)
    start, before, end = 0, 0, tl.zeros((), tl.float64)
    while (start < entries) & (end <= target):
        w, before = _kept(row, start, entries, least, kept, before, CHUNK)
        begin = end
        end += tl.sum(w.to(tl.float64), 0)
        if end > target:
            found = _place_over(w, begin, target, start + tl.arange(0, CHUNK))
        start += CHUNK
    tl.store(out + n, tl.load(places + found).to(tl.int64))


def sample(logits: Tensor, temperature: Tensor, u: Tensor, filters: Filters | None) -> Tensor:
    rows, size = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    parts = triton.cdiv(size, CHUNK)

    def room(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    out = room(rows, dtype=torch.int64)
    if not rows:
        return out
    row, sizes = (logits, argmax(logits), temperature), (size, logits.stride(0))
    tiles, warps = dict(CHUNK=CHUNK, EDGES=EDGES), dict(num_warps=ROW_WARPS)
    if filters is None:
        sums = room(rows, parts, dtype=torch.float64)
        launch(_sample_count, (rows, parts), *row, temperature, out, sums, *sizes, FILTERED=False, **tiles, **warps)
        launch(_sample_unfiltered, (rows,), *row, u, sums, out, *sizes, CHUNK=CHUNK, PARTS=power_of_2(parts), **warps)
        return out
    counts, sums = room(rows, parts, EDGES), room(rows, parts, EDGES, dtype=torch.float32)
    weights, places = room(rows, size, dtype=torch.float32), room(rows, size)
    numbers, lefts = room(rows, 3), room(rows, dtype=torch.float32)
    launch(_sample_count, (rows, parts), *row, filters.min_p, counts, sums, *sizes, FILTERED=True, **tiles, **warps)
    launch(_sample_compact, (rows, parts),
        *row, *filters[:3], counts, sums, weights, places, numbers, lefts, *sizes, PARTS=power_of_2(parts), **tiles, **warps,
    )  # fmt: skip
    launch(_sample, (rows,), weights, places, numbers, lefts, *filters[:2], u, out, size, **tiles, num_warps=LIST_WARPS)
    return out
