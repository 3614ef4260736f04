"""Attention within segments (the images of a vision tower): flash attention over any lengths in one launch.

Heads of such towers have 72 dimensions, and matrix instructions take powers of two, so a head is cut into 64 and 16 columns
rather than padded to 128. The 8 columns beyond it are the next head's: queries are zero there, and of the result they are not
stored.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.ops import reference
from octavo.ops.contract import Segments
from octavo.ops.triton.launch import launch, pipeline, power_of_2, release, wait

__all__ = ["captures_segments", "segment_attention"]

GROUP = 128  # segments that a CTA looks at together
TILES = {"BM": 128, "BN": 64, "num_warps": 4}
STAGES = 3


@triton.jit(do_not_specialize=["segments"])
def _segment_attention(
    q, k, k_rest, v, v_rest, out, starts, segments, qk_scale, q_stride,
    GROUP: tl.constexpr, H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A CTA has BM queries of a head. k and v: descriptors of their first D0 columns; *_rest: of the D1 behind them, if any.

    Each CTA finds its tile of a segment itself, so that launches depend on the numbers of tokens and segments alone.
    """
    release(PDL)
    wait(PDL)
    tile, head = tl.program_id(0), tl.program_id(1)
    seen, start, stop, first = 0, 0, 0, 0
    for group in range(0, segments, GROUP):
        part = group + tl.arange(0, GROUP)
        begin = tl.load(starts + part, mask=part < segments, other=0)
        end = tl.load(starts + part + 1, mask=part < segments, other=0)
        tiles = (end - begin + BM - 1) // BM
        before = seen + tl.cumsum(tiles, 0) - tiles
        mine = (before <= tile) & (tile < before + tiles)
        start += tl.sum(tl.where(mine, begin, 0), 0)
        stop += tl.sum(tl.where(mine, end, 0), 0)
        first += tl.sum(tl.where(mine, begin + (tile - before) * BM, 0), 0)
        seen += tl.sum(tiles, 0)
    if first < stop:
        row = (first + tl.arange(0, BM)).to(tl.int64)
        inside = (row < stop)[:, None]
        d = tl.arange(0, D0)
        source = q + row[:, None] * q_stride + head * D
        q0 = tl.load(source + d[None, :], mask=inside & (d < D)[None, :], other=0.0)
        most = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, D0], tl.float32)
        if D1:
            e = D0 + tl.arange(0, D1)
            q1 = tl.load(source + e[None, :], mask=inside & (e < D)[None, :], other=0.0)
            rest = tl.zeros([BM, D1], tl.float32)
        for n in tl.range(start, stop, BN, num_stages=STAGES):
            s = tl.dot(q0, k.load([n, head * D]).T)
            if D1:
                s = tl.dot(q1, k_rest.load([n, head * D + D0]).T, s)
            if n + BN > stop:
                s = tl.where((n + tl.arange(0, BN) < stop)[None, :], s, float("-inf"))
            new = tl.maximum(most, tl.max(s, 1) * qk_scale)
            p = tl.exp2(s * qk_scale - new[:, None])
            decay = tl.exp2(most - new)
            total = total * decay + tl.sum(p, 1)
            most = new
            p = p.to(q.dtype.element_ty)
            acc = tl.dot(p, v.load([n, head * D]), acc * decay[:, None])
            if D1:
                rest = tl.dot(p, v_rest.load([n, head * D + D0]), rest * decay[:, None])
        to = out + row[:, None] * (H * D) + head * D
        tl.store(to + d[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=inside & (d < D)[None, :])
        if D1:
            tl.store(to + e[None, :], (rest / total[:, None]).to(out.dtype.element_ty), mask=inside & (e < D)[None, :])


def widths(dim: int) -> tuple[int, int]:
    """The columns of a head in two parts, each a power of two or, the second, none."""
    whole = max(16, 1 << (dim.bit_length() - 1))
    return whole, power_of_2(dim - whole, 16) if dim > whole else 0


def captures_segments(dtype: torch.dtype, head_dim: int) -> bool:
    return dtype is torch.bfloat16 and head_dim % 8 == 0


def segment_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    (tokens, heads, dim), count = q.shape, len(segments.starts) - 1
    aligned = all(x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 and x.stride()[1:] == (dim, 1) for x in (k, v))
    if not captures_segments(q.dtype, dim) or q.stride()[1:] != (dim, 1) or not aligned or not tokens:
        return reference.segment_attention(q, k, v, segments)
    out = torch.empty(tokens, heads, dim, dtype=q.dtype, device=q.device)
    d0, d1 = widths(dim)
    operands = [_columns(x, TILES["BN"], width or d0) for x in (k, v) for width in (d0, d1)]
    launch(_segment_attention, (tokens // TILES["BM"] + count, heads),
        q, *operands, out, segments.starts, count, dim**-0.5 * math.log2(math.e), q.stride(0), GROUP=GROUP,
        H=heads, D=dim, D0=d0, D1=d1, STAGES=pipeline(STAGES), **TILES,
    )  # fmt: skip
    return out


def _columns(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    """All heads of x [T, H, D] as a matrix, loaded by tiles."""
    tokens, heads, dim = x.shape
    return TensorDescriptor(x, [tokens, heads * dim], [x.stride(0), 1], [rows, width])
