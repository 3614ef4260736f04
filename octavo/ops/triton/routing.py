"""Expert routing: scores and top-k, sorting of (token, expert) pairs by expert, and the weighted sum of the experts' outputs.

No op synchronizes with the host, and each takes one launch in a decode step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.ops import ahead
from octavo.ops.contract import Dispatch, Routed, Router
from octavo.ops.triton.launch import device_units, launch, pipeline, power_of_2, release, wait

__all__ = ["combine", "dispatch", "route"]

LOWEST = -(1 << 31)
MAX_TILES = 1 << 14  # tiles of tokens whose K is split over CTAs
MAX_SPLITS = 8
STAGE_BYTES = 1 << 15  # bytes of the router's weight per pipeline stage
FEW, MANY = 16, 64  # tokens of a CTA
CHUNK = 512  # pairs of a CTA that sorts
NO_PADDING, LIVE, LENGTHS = 0, 1, 2  # source of the mask of tokens that pad a graph


@triton.jit
def _ordered(x):
    """An integer in the order of FP32 x (not NaN); both zeros are equal."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _outside(order, top, ROWS: tl.constexpr, PARTS: tl.constexpr, MEMBERS: tl.constexpr, groups, members, LOWEST: tl.constexpr):
    """Mask of order [ROWS, PARTS * MEMBERS]: outside the `top` groups with the largest sum of their two best."""
    by_group = tl.reshape(order, (ROWS, PARTS, MEMBERS))
    best = tl.max(by_group, 2)
    if members > 1:
        first = tl.argmax(by_group, 2)
        member = tl.arange(0, MEMBERS)[None, None, :]
        best += tl.max(tl.where(member == first[:, :, None], -float("inf"), by_group), 2)
    group = tl.arange(0, PARTS)[None, :]
    keys = tl.where(group < groups, _ordered(best), LOWEST)
    inside = tl.zeros((ROWS, PARTS), tl.int32)
    for _ in range(top):
        winner = group == tl.argmax(keys, 1)[:, None]
        inside = tl.where(winner, 1, inside)
        keys = tl.where(winner, LOWEST, keys)
    return tl.reshape(tl.broadcast_to(inside[:, :, None], (ROWS, PARTS, MEMBERS)), (ROWS, PARTS * MEMBERS)) == 0


@triton.jit(do_not_specialize=["tokens"])
def _route(
    x, w, bias, padding, experts, weights, parts, counters, tokens, count, width, stride, per_split, scale,
    TOP_K: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    PARTS: tl.constexpr, MEMBERS: tl.constexpr, KP: tl.constexpr, PADDING: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, LOWEST: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Logits of BM tokens with K split over CTAs. The last CTA to finish adds the partial sums in a fixed order and chooses
    experts.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    e, depth = tl.arange(0, BE), tl.arange(0, BK)
    token = tile * BM + tl.arange(0, BM)
    acc = tl.zeros((BE, BM), tl.float32)
    release(PDL)
    wait(PDL)
    for step in tl.range(split * per_split, min((split + 1) * per_split, tl.cdiv(width, BK)), num_stages=STAGES):
        at = step * BK + depth
        a = tl.load(w + e[:, None] * width + at[None, :], mask=(e < count)[:, None] & (at < width)[None, :], other=0.0)
        b = tl.load(
            x + token.to(tl.int64)[:, None] * stride + at[None, :],
            mask=(token < tokens)[:, None] & (at < width)[None, :],
            other=0.0,
        )
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    partials = parts + tile.to(tl.int64) * SPLIT * BM * BE
    tl.store(partials + split * BM * BE + tl.arange(0, BM)[None, :] * BE + e[:, None], acc)
    tl.debug_barrier()  # all threads' partial sums are written before the CTA counts itself or reads them
    if SPLIT > 1:
        if tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") != SPLIT - 1:
            return
        tl.store(counters + tile, 0)  # reset for the next launch
    members = count // GROUPS
    column = tl.arange(0, PARTS * MEMBERS)  # groups, each padded to a power of 2
    group, member = column // MEMBERS, column % MEMBERS
    valid = ((group < GROUPS) & (member < members))[None, :]
    number = group * members + member
    correction = (
        tl.load(bias + number, mask=(group < GROUPS) & (member < members), other=0.0)[None, :] if bias is not None else 0.0
    )
    rank = tl.arange(0, KP)[None, :]
    for start in range(0, BM, ROWS):
        row = start + tl.arange(0, ROWS)
        logits = tl.zeros((ROWS, PARTS * MEMBERS), tl.float32)
        for part in tl.static_range(SPLIT):
            logits += tl.load(
                partials + part * BM * BE + row[:, None] * BE + number[None, :], mask=valid, other=0.0, cache_modifier=".cg"
            )
        if SIGMOID:
            scores = 1.0 / (1.0 + tl.exp(-logits))
        else:
            logits = tl.where(valid, logits, -float("inf"))
            scores = tl.exp(logits - tl.max(logits, 1)[:, None])
            scores = scores / tl.sum(scores, 1)[:, None]
        order = scores + correction
        order = tl.where(valid & (order == order), order, -float("inf"))
        if GROUPS > 1:
            outside = _outside(order, TOP_GROUPS, ROWS, PARTS, MEMBERS, GROUPS, members, LOWEST)
            order = tl.where(outside, -float("inf"), order)
        keys = tl.where(valid, _ordered(order), LOWEST)
        chosen, given = tl.zeros((ROWS, KP), tl.int32), tl.zeros((ROWS, KP), tl.float32)
        for i in range(TOP_K):
            winner = column[None, :] == tl.argmax(keys, 1)[:, None]
            keys = tl.where(winner, LOWEST, keys)
            chosen = tl.where(rank == i, tl.sum(tl.where(winner, number[None, :], 0), 1)[:, None], chosen)
            given = tl.where(rank == i, tl.sum(tl.where(winner, scores, 0.0), 1)[:, None], given)
        if NORMALIZE:
            given = given / (tl.sum(given, 1)[:, None] + 1e-20)
        at = tile * BM + row
        inside = at < tokens
        if PADDING != 0:
            is_token = at < tl.load(padding) if PADDING == 1 else tl.load(padding + at, mask=inside, other=0) > 0
            chosen = tl.where(is_token[:, None], chosen, -1)
            given = tl.where(is_token[:, None], given, 0.0)
        to = at.to(tl.int64)[:, None] * TOP_K + rank
        tl.store(experts + to, chosen, mask=inside[:, None] & (rank < TOP_K))
        tl.store(weights + to, given * scale, mask=inside[:, None] & (rank < TOP_K))


_counters: dict[torch.device, Tensor] = {}


def _counts(device: torch.device) -> Tensor:
    """Zeroed counters, which every launch resets to zero."""
    if device not in _counters:
        _counters[device] = torch.zeros(MAX_TILES, dtype=torch.int32, device=device)
    return _counters[device]


def _padding(batch: ForwardBatch) -> tuple[int, Tensor | None]:
    """(kind of padding information, its tensor), as in `reference.padding`."""
    if batch.live is not None:
        return LIVE, batch.live
    return (LENGTHS, batch.seq_lens) if len(batch.seq_lens) == batch.num_tokens else (NO_PADDING, None)


def _route_shape(tokens: int, experts: int, width: int, itemsize: int) -> dict[str, int]:
    """Tile sizes and split: about one CTA per SM, since each reads its part of the weight from L2."""
    be = power_of_2(experts, 64)
    bm = MANY if tokens >= MANY * device_units() // 4 and be <= 128 else FEW
    bk = max(16, min(128, STAGE_BYTES // (be * itemsize)))
    tiles, steps = triton.cdiv(tokens, bm), triton.cdiv(width, bk)
    split = 1
    while 2 * split <= min(MAX_SPLITS, steps) and 2 * split * tiles <= device_units():
        split *= 2
    return {"BE": be, "BM": bm, "BK": bk, "split": split, "warps": 4 if be <= 128 else 8, "stages": 3}


def _route_shapes(experts: int, width: int, itemsize: int) -> list[dict[str, int]]:
    """Every shape that some number of tokens has: steps that mix prompts and decodes may have any."""
    tiles = [device_units() // (1 << i) for i in range(MAX_SPLITS.bit_length())]
    tokens = [bm * n for bm in (FEW, MANY) for n in (*tiles, tiles[1] + 1)]
    shapes = (_route_shape(n, experts, width, itemsize) for n in tokens)
    return list({tuple(shape.values()): shape for shape in shapes}.values())


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, router: Router, batch: ForwardBatch, config: dict[str, int] | None = None
) -> Routed:
    if x.dtype != weight.dtype:
        x, weight = x.float(), weight.float()
    x, weight = x if x.stride(-1) == 1 else x.contiguous(), weight.contiguous()
    (tokens, width), count = x.shape, len(weight)
    experts = torch.empty(tokens, router.top_k, dtype=torch.int32, device=x.device)
    weights = torch.empty(tokens, router.top_k, dtype=torch.float32, device=x.device)
    if not tokens:
        return Routed(experts, weights)
    members, padding = power_of_2(count // router.groups), _padding(batch)
    columns, shape = power_of_2(router.groups) * members, _route_shape(tokens, count, width, x.dtype.itemsize) | (config or {})
    for c in [shape, *(_route_shapes(count, width, x.dtype.itemsize) if ahead.is_on() else ())]:
        tiles = triton.cdiv(tokens, c["BM"])
        assert c["split"] == 1 or tiles <= MAX_TILES
        parts = torch.empty(tiles * c["split"] * c["BM"] * c["BE"], dtype=torch.float32, device=x.device)
        launch(_route, (tiles, c["split"]),
            x, weight, bias, padding[1], experts, weights, parts, _counts(x.device), tokens, count, width, x.stride(0),
            triton.cdiv(triton.cdiv(width, c["BK"]), c["split"]), router.scale,
            TOP_K=router.top_k, SIGMOID=router.sigmoid, NORMALIZE=router.normalize, GROUPS=router.groups,
            TOP_GROUPS=router.top_groups, PARTS=columns // members, MEMBERS=members, KP=power_of_2(router.top_k),
            PADDING=padding[0], BE=c["BE"], BM=c["BM"], BK=c["BK"], SPLIT=c["split"],
            ROWS=max(1, min(c["BM"], 2048 // columns)), LOWEST=LOWEST, STAGES=pipeline(c["stages"]), num_warps=c["warps"],
        )  # fmt: skip
    return Routed(experts, weights)


@triton.jit(do_not_specialize=["pairs"])
def _count_pairs(experts, counts, pairs, count, CHUNK: tl.constexpr, BINS: tl.constexpr, PDL: tl.constexpr):
    """Histogram of a chunk's pairs by expert; pairs without an expert are counted last."""
    chunk = tl.program_id(0)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    release(PDL)
    wait(PDL)
    to = tl.load(experts + at, mask=at < pairs, other=0)
    found = tl.histogram(tl.where(to < 0, count, to), BINS, mask=at < pairs)
    tl.store(counts + chunk * BINS + tl.arange(0, BINS), found)


@triton.jit(do_not_specialize=["pairs", "chunks"])
def _place_pairs(
    experts, counts, cursors, order, place, starts, pairs, count, chunks,
    CHUNK: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr, ONE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Scatter a chunk's pairs: behind those of smaller experts, and of the same expert in earlier chunks.

    The order of pairs within a chunk and expert is not deterministic.
    """
    chunk = tl.program_id(0)
    at, bins = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, BINS)
    release(PDL)
    wait(PDL)
    to = tl.load(experts + at, mask=at < pairs, other=0)
    to = tl.where(to < 0, count, to)
    if ONE:
        total = tl.histogram(to, BINS, mask=at < pairs)
        before = tl.zeros_like(total)
    else:
        total, before = tl.zeros((BINS,), tl.int32), tl.zeros((BINS,), tl.int32)
        for first in range(0, chunks, ROWS):
            row = first + tl.arange(0, ROWS)
            found = tl.load(counts + row[:, None] * BINS + bins[None, :], mask=(row < chunks)[:, None], other=0)
            total += tl.sum(found, 0)
            before += tl.sum(tl.where((row < chunk)[:, None], found, 0), 0)
    begin = tl.cumsum(total, 0) - total
    if chunk == 0:
        tl.store(starts + bins, begin, mask=bins <= count)
    tl.store(cursors + chunk * BINS + bins, begin + before)
    tl.debug_barrier()  # all cursors are initialized before a pair increments one
    found = tl.atomic_add(cursors + chunk * BINS + to, 1, mask=at < pairs, sem="relaxed")
    tl.store(place + at, found, mask=at < pairs)
    tl.store(order + found, at, mask=at < pairs)


def dispatch(experts: Tensor, count: int, chunk: int = CHUNK) -> Dispatch:
    pairs, device = experts.numel(), experts.device
    if not pairs:
        none = torch.empty(0, dtype=torch.int32, device=device)
        return Dispatch(none, none, torch.zeros(count + 1, dtype=torch.int32, device=device), experts.shape[1])
    order, place = (torch.empty(pairs, dtype=torch.int32, device=device) for _ in range(2))
    starts = torch.empty(count + 1, dtype=torch.int32, device=device)
    chunk, bins = min(chunk, power_of_2(pairs, 128)), power_of_2(count + 1)
    chunks = triton.cdiv(pairs, chunk)
    counts, cursors = (torch.empty(chunks, bins, dtype=torch.int32, device=device) for _ in range(2))
    experts, warps = experts.contiguous(), 4 if chunk < 1024 else 8
    if chunks > 1:
        launch(_count_pairs, (chunks,), experts, counts, pairs, count, CHUNK=chunk, BINS=bins, num_warps=warps)
    launch(_place_pairs, (chunks,),
        experts, counts, cursors, order, place, starts, pairs, count, chunks, CHUNK=chunk, BINS=bins,
        ROWS=max(1, min(32, 8192 // bins)), ONE=chunks == 1, num_warps=warps,
    )  # fmt: skip
    return Dispatch(order, place, starts, experts.shape[1])


@triton.jit
def _combine(
    y, experts, weights, place, out, size, stride,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < size
    total = tl.zeros((BLOCK,), tl.float32)
    release(PDL)
    wait(PDL)
    for i in range(TOP_K):
        woken = tl.load(experts + token * TOP_K + i) >= 0
        row = tl.load(place + token * TOP_K + i).to(tl.int64)
        value = tl.load(y + row * stride + cols, mask=inside & woken, other=0.0).to(tl.float32)
        total += tl.where(woken, value * tl.load(weights + token * TOP_K + i), 0.0)
    tl.store(out + token * size + cols, total.to(out.dtype.element_ty), mask=inside)


def combine(y: Tensor, routed: Routed, at: Dispatch) -> Tensor:
    tokens, size = len(routed.experts), y.shape[1]
    out = torch.empty(tokens, size, dtype=y.dtype, device=y.device)
    if tokens:
        block = min(1024, power_of_2(size, 128))
        launch(_combine, (tokens, triton.cdiv(size, block)),
            y, routed.experts, routed.weights, at.place, out, size, y.stride(0), TOP_K=at.top_k, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out
