"""MLA prefill over keys and values expanded from latents: flash attention with 192-dimensional keys and 128-dimensional values.

The contexts of several requests, or a part of a long one, are staged as dense latents. The library's GEMM expands them to keys
and values. Queries are rotated as they are loaded. The expansion at a time is bounded in tokens and, where accumulators of many
queries are kept between the parts of a context, also in heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.batch import ForwardBatch, Key, to_device
from octavo.kvcache import LATENT_GROUP, LatentCache
from octavo.ops.contract import Rotation
from octavo.ops.triton.decode import LOG2E
from octavo.ops.triton.launch import launch, pipeline, power_of_2, release, shared_memory, wait
from octavo.platform import FP8_MAX

__all__ = ["expanded_attention"]

ALIGN = 128  # staged contexts are aligned to this many tokens
EXPANDED_BYTES = 256 << 20  # bytes of expanded keys and values at a time
SUMS_BYTES = 128 << 20  # bytes of FP32 accumulators of queries whose context is processed in parts


@triton.jit
def _lay_out(
    latent, rope, scales, out, rope_out, tables, chunks, table_width,
    RANK: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr,
    LATENT_STRIDES: tl.constexpr, ROPE_STRIDES: tl.constexpr, SCALE_STRIDES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr, CODES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Stage latents as [length, RANK] and rope keys as [length, D], dequantized. Behind a context's end the data is finite but
    undefined.
    """
    chunk = chunks + tl.program_id(0) * 3
    request, start, target = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    d, r = tl.arange(0, RP), tl.arange(0, DP)
    wait(PDL)
    index = (start + t) // BLOCK_SIZE
    block = tl.load(tables + request.to(tl.int64) * table_width + index, mask=index < table_width, other=0).to(tl.int64)
    offset = (start + t) % BLOCK_SIZE
    ok = (d < RANK)[None, :]
    at = latent + (block * LATENT_STRIDES[0] + offset * LATENT_STRIDES[1])[:, None] + d[None, :]
    x = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    if CODES:
        by = scales + (block * SCALE_STRIDES[0] + offset * SCALE_STRIDES[1])[:, None] + (d // GROUP)[None, :]
        x *= tl.load(by, mask=ok, other=0.0)
    onto = (target + t).to(tl.int64)[:, None]
    tl.store(out + onto * RANK + d[None, :], x.to(out.dtype.element_ty), mask=ok)
    at = rope + (block * ROPE_STRIDES[0] + offset * ROPE_STRIDES[1])[:, None] + r[None, :]
    key = tl.load(at, mask=(r < D)[None, :], other=0.0)
    tl.store(rope_out + onto * D + r[None, :], key.to(rope_out.dtype.element_ty), mask=(r < D)[None, :])
    release(PDL)


@triton.jit
def _attend_tiles(
    acc, total, peak, query, q_rope, k, rope, v, first, last, seen_to, qk_scale,
    N: tl.constexpr, NP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    BN: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key tiles [first, last); seen_to: number of keys that each row may see."""
    d, r, e, n = tl.arange(0, NP), tl.arange(0, DP), tl.arange(0, VP), tl.arange(0, BN)
    for tile in tl.range(first, last, num_stages=STAGES):
        at = (tile * BN + n).to(tl.int64)
        if NP == N and DP == D and VP == V:
            key, k_rope = tl.load(k + at[:, None] * N + d[None, :]), tl.load(rope + at[:, None] * D + r[None, :])
            value = tl.load(v + at[:, None] * V + e[None, :])
        else:
            key = tl.load(k + at[:, None] * N + d[None, :], mask=(d < N)[None, :], other=0.0)
            k_rope = tl.load(rope + at[:, None] * D + r[None, :], mask=(r < D)[None, :], other=0.0)
            value = tl.load(v + at[:, None] * V + e[None, :], mask=(e < V)[None, :], other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee")
        score = tl.dot(q_rope, tl.trans(k_rope), score, input_precision="ieee") * qk_scale
        if MASKED:
            seen = at[None, :] < seen_to[:, None]
            score = tl.where(seen, score, -1e30)
        higher = tl.maximum(peak, tl.max(score, 1))
        p = tl.exp2(score - higher[:, None])
        if MASKED:
            p = tl.where(seen, p, 0.0)  # a row may see nothing of this part
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(p, 1)
        peak = higher
        acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
    return acc, total, peak


@triton.jit
def _expanded_attention(
    q, k, rope, v, out, sums, cos_sin, rotary_rows, tiles, qk_scale, length, first_head,
    HEADS: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, V: tl.constexpr,
    VP: tl.constexpr, INTERLEAVED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """k [heads, length, N] and v [heads, length, V] are of the heads from first_head on; rope [length, D].

    sums: FP32 [rows, heads, V + 2], the accumulator, maximum and total over a row's earlier parts, for contexts processed in
    parts.
    """
    tile = tiles + tl.program_id(0) * 8
    row, count, start, at = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    keys, kept, begun, ends = tl.load(tile + 4), tl.load(tile + 5), tl.load(tile + 6), tl.load(tile + 7)
    part_head = tl.program_id(1)
    head = first_head + part_head
    m, d, r, e = tl.arange(0, BM), tl.arange(0, NP), tl.arange(0, DP), tl.arange(0, VP)
    ok = (m < count)[:, None]
    wait(PDL)
    q_row = q + ((row + m).to(tl.int64) * HEADS + head)[:, None] * (N + D)
    query = tl.load(q_row + d[None, :], mask=ok & (d < N)[None, :], other=0.0)
    half: tl.constexpr = D // 2
    if INTERLEAVED:
        other, angle, negative = r ^ 1, r // 2, r % 2 == 0
    else:
        other, angle, negative = tl.where(r < half, r + half, r - half), r % half, r < half
    inside = ok & (r < D)[None, :]
    x = tl.load(q_row + N + r[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(q_row + N + other[None, :], mask=inside, other=0.0).to(tl.float32)
    angles = cos_sin + tl.load(rotary_rows + row + m, mask=m < count, other=0)[:, None] * D + angle[None, :]
    cos = tl.load(angles, mask=inside, other=1.0)
    sin = tl.load(angles + half, mask=inside, other=0.0)
    q_rope = (x * cos + tl.where(negative[None, :], -y, y) * sin).to(query.dtype)

    acc = tl.zeros((BM, VP), tl.float32)
    peak = tl.full((BM,), -1e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    by_row = sums + ((kept + m).to(tl.int64) * tl.num_programs(1) + part_head) * (V + 2)
    if begun:
        acc = tl.load(by_row[:, None] + e[None, :], mask=ok & (e < V)[None, :], other=0.0)
        peak = tl.load(by_row + V, mask=m < count, other=-1e30)
        total = tl.load(by_row + V + 1, mask=m < count, other=0.0)
    place = part_head.to(tl.int64) * length + at
    k, v, rope = k + place * N, v + place * V, rope + at.to(tl.int64) * D
    seen_to = tl.minimum(start + m + 1, keys)
    last = tl.cdiv(tl.minimum(start + count, keys), BN)
    whole = tl.minimum((start + 1) // BN, keys // BN)
    whole = tl.maximum(whole, 0)
    acc, total, peak = _attend_tiles(
        acc, total, peak, query, q_rope, k, rope, v, 0, whole, seen_to, qk_scale, N, NP, D, DP, V, VP, BN, False, STAGES
    )
    acc, total, peak = _attend_tiles(
        acc, total, peak, query, q_rope, k, rope, v, whole, last, seen_to, qk_scale, N, NP, D, DP, V, VP, BN, True, STAGES
    )
    release(PDL)
    if ends:
        mean = acc / tl.where(total > 0, total, 1.0)[:, None]
        to = out + ((row + m).to(tl.int64) * HEADS + head)[:, None] * V + e[None, :]
        tl.store(to, mean.to(out.dtype.element_ty), mask=ok & (e < V)[None, :])
    else:
        tl.store(by_row[:, None] + e[None, :], acc, mask=ok & (e < V)[None, :])
        tl.store(by_row + V, peak, mask=m < count)
        tl.store(by_row + V + 1, total, mask=m < count)


@dataclass
class _Part:
    """The work of one expansion, as int32 tables.

    chunks [n, 3]: request, first position, staged position. tiles of queries [n, 8]: first row in q, rows, position of the
    first row among the keys, start of the keys, number of keys, first row of the accumulators, whether accumulators exist
    already, and whether this part ends the context.
    """

    chunks: Tensor
    tiles: Tensor
    length: int


@dataclass(frozen=True)
class _PartsKey(Key[list[_Part]]):
    most: int
    bm: int


def _parts(batch: ForwardBatch, most: int, bm: int) -> list[_Part]:
    """The batch's contexts in parts of `most` tokens; a longer context is split into parts of its own."""

    def make() -> list[_Part]:
        device = batch.seq_lens.device
        return [
            _Part(to_device(chunks, torch.int32, device), to_device(tiles, torch.int32, device), length)
            for chunks, tiles, length in _plan(batch.query_lens, batch.context_lens, most, bm)
        ]

    return batch.cache.get(_PartsKey(most, bm), make)


Rows = list[tuple[int, ...]]


def _plan(query_lens: list[int], context_lens: list[int], most: int, bm: int) -> Iterator[tuple[Rows, Rows, int]]:
    chunks: Rows = []
    tiles: Rows = []
    length, row = 0, 0
    for request, (query, context) in enumerate(zip(query_lens, context_lens, strict=True)):
        if chunks and length + context > most:
            yield chunks, sorted(tiles, key=lambda t: -t[2]), length
            chunks, tiles, length = [], [], 0
        for begin in range(0, context, most):
            end = min(context, begin + most)
            chunks += [(request, at, length + at - begin) for at in range(begin, end, ALIGN)]
            for at in range(0, query, bm):
                place = context - query + at - begin
                tiles.append((row + at, min(bm, query - at), place, length, end - begin, at, begin > 0, end == context))
            length += -(-(end - begin) // ALIGN) * ALIGN
            if end < context:
                yield chunks, sorted(tiles, key=lambda t: -t[2]), length
                chunks, tiles, length = [], [], 0
        row += query
    if chunks:
        yield chunks, sorted(tiles, key=lambda t: -t[2]), length


# (queries and keys of a tile, warps, pipeline stages), fastest first.
_DEEP = (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 1)
_SHALLOW = (128, 32, 8, 1), (64, 32, 4, 1), (32, 32, 4, 1)


def _tiles(width: int, item: int) -> dict[str, int]:
    """The first tile sizes that fit into shared memory; `width` is the width of a key plus that of a value."""
    tried = _SHALLOW if pipeline(3) < 3 else _DEEP
    tried = tried[-1:] if item > 2 else tried
    fits = (t for t in tried if width * item * (t[0] + t[1] * t[3]) <= shared_memory())
    return dict(zip(("BM", "BN", "warps", "stages"), next(fits, tried[-1]), strict=True))


def expanded_attention(
    q: Tensor, up_k: Tensor, up_v: Tensor, rotation: Rotation, cache: LatentCache, batch: ForwardBatch, scale: float,
    config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    tokens, heads = q.shape[:2]
    nope, rank, v_dim = up_k.shape[1], up_k.shape[2], up_v.shape[2]
    rope, device, dtype = q.shape[2] - nope, q.device, q.dtype
    out = torch.empty(tokens, heads, v_dim, dtype=dtype, device=device)
    if not tokens:
        return out
    q = q.contiguous()
    sizes = dict(NP=power_of_2(nope, 16), DP=power_of_2(rope, 16), VP=power_of_2(v_dim, 16))
    c = _tiles(sum(sizes.values()), dtype.itemsize) | (config or {})
    at_a_time = heads
    while at_a_time % 2 == 0 and max(batch.query_lens) * at_a_time * (v_dim + 2) * 4 > SUMS_BYTES:
        at_a_time //= 2
    most = c.get("most") or max(ALIGN, EXPANDED_BYTES // (at_a_time * (nope + v_dim) * dtype.itemsize) // ALIGN * ALIGN)
    parts = _parts(batch, most, c["BM"])
    kept = any(context > most for context in batch.context_lens)
    sums = torch.empty(max(batch.query_lens) * at_a_time * (v_dim + 2) if kept else 1, dtype=torch.float32, device=device)
    for first in range(0, heads, at_a_time):
        some = slice(first, min(first + at_a_time, heads))
        for part in parts:
            latent = torch.empty(part.length, rank, dtype=dtype, device=device)
            key = torch.empty(part.length, rope, dtype=dtype, device=device)
            launch(_lay_out, (len(part.chunks), 4),
                cache.latent, cache.rope, cache.scale, latent, key, batch.block_tables, part.chunks,
                batch.block_tables.stride(0),
                RANK=rank, RP=power_of_2(rank), D=rope, DP=sizes["DP"], GROUP=LATENT_GROUP,
                LATENT_STRIDES=cache.latent.stride()[:2], ROPE_STRIDES=cache.rope.stride()[:2],
                SCALE_STRIDES=cache.scale.stride()[:2] if cache.scale is not None else (0, 0),
                BLOCK_SIZE=cache.latent.shape[1], TOKENS=ALIGN // 4, CODES=cache.latent.dtype in FP8_MAX, num_warps=8,
            )  # fmt: skip
            wide = latent.expand(some.stop - first, -1, -1)
            k, v = torch.bmm(wide, up_k[some].mT.to(dtype)), torch.bmm(wide, up_v[some].to(dtype))
            launch(_expanded_attention, (len(part.tiles), some.stop - first),
                q, k, key, v, out, sums, rotation.cos_sin, rotation.rows, part.tiles, scale * LOG2E, part.length, first,
                HEADS=heads, N=nope, D=rope, V=v_dim, **sizes, INTERLEAVED=rotation.interleaved, BM=c["BM"], BN=c["BN"],
                STAGES=pipeline(c["stages"]), num_warps=c["warps"],
            )  # fmt: skip
    return out
