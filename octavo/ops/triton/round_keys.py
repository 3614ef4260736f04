"""Rounding keys to FP8 values one dimension after the other: a CTA has some tokens of a head, in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kvcache import KeyRounding
from octavo.ops.triton.launch import launch, power_of_2, release, to_fp8, wait
from octavo.platform import FP8_MAX

__all__ = ["round_keys"]

TOKENS = 16  # of a CTA
CODES = {
    torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e4m3fnuz: tl.float8e4b8, torch.float8_e5m2: tl.float8e5,
}  # fmt: skip


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
    x = tl.where(tl.abs(x) < float("inf"), x, 0.0)  # NaN too
    offset = tl.zeros((DP, BT), tl.float32)
    for step in range(D):
        here = (d == tl.load(order + head * D + step))[:, None]
        own = tl.sum(tl.where(here, x, 0.0), 0)
        rounded = to_fp8(tl.div_rn(own - tl.sum(tl.where(here, offset, 0.0), 0), by), LIMIT, CODE).to(tl.float32) * by
        x = tl.where(here, rounded[None, :], x)
        carried = tl.load(influence + (head * D + step) * D + d, mask=d < D, other=0.0)
        offset += carried[:, None] * (rounded - own)[None, :]
    tl.store(out + (row * HEADS + head) * D + d[:, None], x.to(out.dtype.element_ty), mask=inside)


def round_keys(k: Tensor, rounding: KeyRounding, scale: Tensor, dtype: torch.dtype) -> Tensor:
    (tokens, heads, dim), k = k.shape, k if k.stride(2) == 1 else k.contiguous()
    out = k.new_empty(k.shape)
    if k.numel():
        launch(_round_keys, (triton.cdiv(tokens, TOKENS), heads),
            k, out, rounding.influence, rounding.order, scale, tokens, k.stride(0), k.stride(1), HEADS=heads, D=dim,
            DP=power_of_2(dim, 16), BT=TOKENS, SCALE_STRIDE=int(scale.numel() > 1), LIMIT=FP8_MAX[dtype], CODE=CODES[dtype],
            num_warps=4,
        )  # fmt: skip
    return out
