"""The indexer's keys and queries in the form in which they are scored: normed (keys), rotated, and for codes
Hadamard-transformed and quantized.

A CTA computes tiles of rows; a row is a key or one head's query. The transform is a product by a matrix of signs in BF16. It is
exact: an FP32 row is split into a sum of three BF16 rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kvcache import IndexCache
from octavo.ops.contract import Norm, Rotation
from octavo.ops.reference_latent import PEAK_FLOOR
from octavo.ops.triton.latent_write import finite, partner, power_of_two, rotated
from octavo.ops.triton.launch import device_units, launch, release, round_to, to_fp8, wait
from octavo.platform import FP8_MAX

__all__ = ["scored_queries", "write_index_keys"]

ROWS = 64  # rows of a tile
SHARING = 4  # CTAs resident per SM
PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}  # BF16 values whose sum is exact


@triton.jit
def _signs(D: tl.constexpr):
    """Sylvester's Hadamard matrix [D, D], entries ± 1, BF16: the sign is the parity of the bits set in both indices."""
    both = tl.arange(0, D)[:, None] & tl.arange(0, D)[None, :]
    both ^= both >> 8
    both ^= both >> 4
    both ^= both >> 2
    both ^= both >> 1
    return (1 - 2 * (both & 1)).to(tl.float32).to(tl.bfloat16)


@triton.jit
def _transformed(x, signs, D: tl.constexpr, PARTS: tl.constexpr):
    """x [rows, D] FP32 times the orthogonal Hadamard matrix."""
    left = x
    part = left.to(tl.bfloat16)
    acc = tl.dot(part, signs)
    for _ in tl.static_range(PARTS - 1):
        left -= part.to(tl.float32)
        part = left.to(tl.bfloat16)
        acc = tl.dot(part, signs, acc)
    return acc * (D**-0.5)


@triton.jit(do_not_specialize=["rows"])
def _as_scored(
    x, gain, bias, cos_sin, rotary_rows, slots, head_weights, out, scales, rows, eps, token_stride, head_stride, weight_stride,
    out_block, out_token, scale_block, scale_token,
    HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, KEYS: tl.constexpr, CODES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """KEYS: rows are tokens, stored at their slots. Otherwise rows are queries of HEADS heads per token, stored contiguously,
    with their head weights times the codes' scales. CODES: out is FP8 with one scale per row.
    """
    d = tl.arange(0, D)[None, :]
    other = partner(d, R, INTERLEAVED)
    dtype: tl.constexpr = x.dtype.element_ty
    if CODES:
        signs = _signs(D)
    if KEYS:
        by_gain, by_bias = tl.load(gain + d).to(tl.float32), tl.load(bias + d).to(tl.float32)
        by_other, other_bias = tl.load(gain + other).to(tl.float32), tl.load(bias + other).to(tl.float32)
    release(PDL)
    wait(PDL)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=1):
        row = tile * ROWS + tl.arange(0, ROWS)
        ok = row < rows
        token = row // HEADS
        source = x + (token.to(tl.int64) * token_stride + (row % HEADS) * head_stride)[:, None]
        a = tl.load(source + d, mask=ok[:, None], other=0.0).to(tl.float32)
        b = tl.load(source + other, mask=ok[:, None], other=0.0).to(tl.float32)
        if KEYS:
            mean = (tl.sum(a, 1) / D)[:, None]
            factor = tl.rsqrt(tl.sum((a - mean) * (a - mean), 1) / D + eps)[:, None]
            a = round_to((a - mean) * factor * by_gain + by_bias, dtype)
            b = round_to((b - mean) * factor * by_other + other_bias, dtype)
        if HEADS % ROWS == 0:  # all rows of the tile are of one token
            row_cos_sin = (cos_sin + tl.load(rotary_rows + tile * ROWS // HEADS) * R)[None, None]
        else:
            row_cos_sin = (cos_sin + tl.load(rotary_rows + token, mask=ok, other=0) * R)[:, None]
        y = round_to(rotated(a, b, d, row_cos_sin, R, INTERLEAVED), dtype)
        if KEYS:
            y = finite(y)
            slot = tl.load(slots + token, mask=ok, other=0).to(tl.int64)
            block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
            to = block * out_block + offset * out_token
        else:
            to = row.to(tl.int64) * D
            weight = tl.load(head_weights + token.to(tl.int64) * weight_stride + row % HEADS, mask=ok, other=0.0).to(tl.float32)
        if CODES:
            y = _transformed(y, signs, D, PARTS)
            by = power_of_two(tl.max(tl.abs(y), 1), LIMIT, FLOOR)
            y = to_fp8(y * (1.0 / by)[:, None], LIMIT, out.dtype.element_ty)
            if KEYS:
                tl.store(scales + block * scale_block + offset * scale_token, by, mask=ok)
            else:
                weight *= by
        tl.store(out + to[:, None] + d, y.to(out.dtype.element_ty), mask=ok[:, None])
        if not KEYS:
            tl.store(scales + row, weight, mask=ok)


def _options(x: Tensor, rotation: Rotation, cache: IndexCache) -> dict[str, Any]:
    return dict(
        D=x.shape[-1], R=rotation.cos_sin.shape[1], INTERLEAVED=rotation.interleaved, CODES=cache.scale is not None,
        BLOCK_SIZE=cache.k.shape[1], PARTS=PARTS[x.dtype], ROWS=ROWS, LIMIT=FP8_MAX.get(cache.k.dtype, 1.0), FLOOR=PEAK_FLOOR,
        num_warps=4,
    )  # fmt: skip


def _grid(rows: int) -> tuple[int]:
    return (min(triton.cdiv(rows, ROWS), SHARING * device_units()),)


def write_index_keys(k: Tensor, norm: Norm, rotation: Rotation, cache: IndexCache, slots: Tensor) -> None:
    if not len(k):
        return
    if k.stride(1) != 1:
        k = k.contiguous()
    assert norm.bias is not None, "the norm of index keys is LayerNorm"
    scale_strides = (0, 0) if cache.scale is None else cache.scale.stride()[:2]
    launch(_as_scored, _grid(len(k)),
        k, norm.weight, norm.bias, rotation.cos_sin, rotation.rows, slots, None, cache.k, cache.scale, len(k), norm.eps,
        k.stride(0), 0, 0, *cache.k.stride()[:2], *scale_strides, HEADS=1, KEYS=True, **_options(k, rotation, cache),
    )  # fmt: skip


def scored_queries(q: Tensor, weights: Tensor, rotation: Rotation, cache: IndexCache) -> tuple[Tensor, Tensor]:
    """(queries [T, H, D] in the dtype of the stored keys, head weights times the queries' scales, FP32 [T, H])."""
    tokens, heads, dim = q.shape
    if q.stride(2) != 1:
        q = q.contiguous()
    if weights.stride(1) != 1:
        weights = weights.contiguous()
    out = torch.empty(tokens, heads, dim, dtype=cache.k.dtype, device=q.device)
    by = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    launch(_as_scored, _grid(tokens * heads),
        q, None, None, rotation.cos_sin, rotation.rows, None, weights, out, by, tokens * heads, 0.0, *q.stride()[:2],
        weights.stride(0), 0, 0, 0, 0, HEADS=heads, KEYS=False, **_options(q, rotation, cache),
    )  # fmt: skip
    return out, by
