"""Rounding a weight's columns to FP8 one after the other: each CTA has some rows of the weight, all columns in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.triton.launch import launch, power_of_2, release, to_fp8, wait
from octavo.platform import FP8_MAX

__all__ = ["round_columns"]

ROWS = 16  # of the weight in a CTA


@triton.jit
def _round_columns(
    values, offset, influence, scale, moved, columns, rows, influence_stride, scale_stride,
    LIMIT: tl.constexpr, CODE: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    k, n = tl.arange(0, BK), tl.program_id(0) * BN + tl.arange(0, BN)
    inside = n < rows
    release(PDL)
    wait(PDL)
    at = k[:, None] * rows + n[None, :]
    own = tl.load(offset + at, mask=(k < columns)[:, None] & inside[None, :], other=0.0)
    for i in range(columns):
        place = i * rows + n
        value = tl.load(values + place, mask=inside, other=0.0)
        factor = tl.load(scale + i * scale_stride + n, mask=inside, other=1.0)
        own_here = tl.sum(tl.where((k == i)[:, None], own, 0.0), 0)
        rounded = to_fp8(tl.div_rn(value - own_here, factor), LIMIT, CODE).to(tl.float32) * factor
        by = rounded - value
        tl.store(values + place, rounded, mask=inside)
        tl.store(moved + place, by, mask=inside)
        own += tl.load(influence + i * influence_stride + k, mask=k < columns, other=0.0)[:, None] * by[None, :]
    tl.store(offset + at, own, mask=(k < columns)[:, None] & inside[None, :])


def round_columns(values: Tensor, offset: Tensor, influence: Tensor, scale: Tensor) -> Tensor:
    (columns, rows), moved = values.shape, torch.empty_like(values)
    if values.numel():
        launch(_round_columns, (triton.cdiv(rows, ROWS),),
            values, offset, influence, scale, moved, columns, rows, influence.stride(0),
            0 if len(scale) == 1 else scale.stride(0), LIMIT=FP8_MAX[torch.float8_e4m3fn], CODE=tl.float8e4nv,
            BK=power_of_2(columns, 16), BN=ROWS, num_warps=4,
        )  # fmt: skip
    return moved
