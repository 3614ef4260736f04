"""Rounding keys to FP8 values one dimension after the other, by what queries read of them.

A CTA of one warp has one head of one token in registers, or of some tokens, so that a step's sums need no barrier.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kvcache import KeyRounding, LayerCache
from octavo.ops.contract import Rope
from octavo.ops.triton.launch import head_strides, launch, power_of_2, release, to_fp8, wait
from octavo.ops.triton.rope import finite, norm_rotate, rope_write_kv, store_codes
from octavo.platform import FP8_MAX

__all__ = ["rope_write_rounded_kv", "round_keys"]

TOKENS = 4  # of a CTA, where there are many
CODES = {
    torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e4m3fnuz: tl.float8e4b8, torch.float8_e5m2: tl.float8e5,
}  # fmt: skip


@triton.jit
def _rounded(x, influence, order, head, d, by, D: tl.constexpr, LIMIT: tl.constexpr, CODE: tl.constexpr):
    """Keys x [DP, N] of a head, FP32, as codes of dtype CODE times `by`."""
    x = finite(x)
    offset = tl.zeros(x.shape, tl.float32)
    for step in range(D):
        here = (d == tl.load(order + head * D + step))[:, None]
        carried = tl.load(influence + (head * D + step) * D + d, mask=d < D, other=0.0)
        own = tl.sum(tl.where(here, x, 0.0), 0)
        code = to_fp8(tl.div_rn(own - tl.sum(tl.where(here, offset, 0.0), 0), by), LIMIT, CODE)
        rounded = code.to(tl.float32) * by
        x = tl.where(here, rounded[None, :], x)
        offset += carried[:, None] * (rounded - own)[None, :]
    return x


@triton.jit
def _round_keys(
    k, out, influence, order, scale, tokens, k_stride, k_head_stride, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BT: tl.constexpr, SCALE_STRIDE: tl.constexpr, LIMIT: tl.constexpr, CODE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    head, d, token = tl.program_id(1), tl.arange(0, DP), tl.program_id(0) * BT + tl.arange(0, BT)
    inside = (d < D)[:, None] & (token < tokens)[None, :]
    row = token.to(tl.int64)[None, :]
    by = tl.load(scale + head * SCALE_STRIDE)
    release(PDL)
    wait(PDL)
    x = tl.load(k + row * k_stride + head * k_head_stride + d[:, None], mask=inside, other=0.0).to(tl.float32)
    x = _rounded(x, influence, order, head, d, by, D, LIMIT, CODE)
    tl.store(out + (row * HEADS + head) * D + d[:, None], x.to(out.dtype.element_ty), mask=inside)


def round_keys(k: Tensor, rounding: KeyRounding, scale: Tensor, dtype: torch.dtype) -> Tensor:
    (tokens, heads, dim), k = k.shape, k if k.stride(2) == 1 else k.contiguous()
    out = k.new_empty(k.shape)
    if k.numel():
        launch(_round_keys, (triton.cdiv(tokens, TOKENS), heads),
            k, out, rounding.influence, rounding.order, scale, tokens, k.stride(0), k.stride(1), HEADS=heads, D=dim,
            DP=power_of_2(dim, 32), BT=TOKENS, SCALE_STRIDE=int(scale.numel() > 1), LIMIT=FP8_MAX[dtype], CODE=CODES[dtype],
            num_warps=1,
        )  # fmt: skip
    return out


@triton.jit
def _rewrite_keys(
    k, cache, norm, influence, order, scale, cos_sin, rotary_rows, slots, eps, k_stride, block_stride, token_stride,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, BLOCK_SIZE: tl.constexpr, NORM: tl.constexpr, K_STRIDE: tl.constexpr,
    LIMIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token, head, d = tl.program_id(0), tl.program_id(1), tl.arange(0, DP)
    ok = (d < D)[:, None] & (tl.arange(0, 1) == 0)[None, :]
    by = tl.load(scale + head * K_STRIDE)
    release(PDL)
    wait(PDL)
    source = k + token.to(tl.int64) * k_stride + head * D + tl.arange(0, 1)[None, :]
    angles = cos_sin + tl.load(rotary_rows + token) * R
    x = norm_rotate(source, ok, norm, eps, angles, d, D, R, NORM)
    x = _rounded(x, influence, order, head, d, by, D, LIMIT, cache.dtype.element_ty)
    slot = tl.load(slots + token).to(tl.int64)
    at = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * token_stride + head * D + d[:, None]
    store_codes(x, ok, cache, at, by, LIMIT)


def rope_write_rounded_kv(q: Tensor, k: Tensor, v: Tensor, rope: Rope, cache: LayerCache, slots: Tensor) -> Tensor:
    """All by `rope_write_kv`, then the keys once more, rounded."""
    rounding, (norms, cos_sin, rows), keys = cache.key_rounding, rope, cache.views["k"]
    assert rounding is not None
    out = rope_write_kv(q, k, v, rope, cache, slots)
    tokens, heads, dim = k.shape
    if k.numel():
        launch(_rewrite_keys, (tokens, heads),
            k, keys, norms.k if norms else None, rounding.influence, rounding.order, cache.k_scale, cos_sin, rows, slots,
            norms.eps if norms else 0.0, k.stride(0), *keys.stride()[:2], D=dim, DP=power_of_2(dim, 32), R=cos_sin.shape[1],
            BLOCK_SIZE=keys.shape[1], NORM=norms is not None, K_STRIDE=head_strides(cache)["K_STRIDE"],
            LIMIT=FP8_MAX[keys.dtype], num_warps=1,
        )  # fmt: skip
    return out
