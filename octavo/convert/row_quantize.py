"""Quantizing some rows of a matrix at a time, in place, into buffers that the caller uses again.

The codes and scales are bit for bit those of `qtensor.quantize`, which has the matrix as a whole. Only e4m3fn: it is what
checkpoints store.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo import ops
from octavo.platform import FP8_MAX
from octavo.quant.qtensor import expand_scale, scale_of, weight_amax
from octavo.quant.scheme import BLOCK, Granularity

__all__ = ["SEARCH_STEPS", "encode", "peaks", "search_errors", "searched_scale"]

FP8 = torch.float8_e4m3fn
# What `search_errors` multiplies absmax's scale by. 1 is among them, so that no search does worse; from 2 on the same
# mantissas come again, with one exponent less.
SEARCH_STEPS = tuple(1 + i / 16 for i in range(16))


def peaks(values: Tensor, granularity: Granularity) -> Tensor:
    """Largest magnitudes of FP32 `values` [rows, K]: [rows, 1], a grid of tiles, or [1, 1]. NaN where a value is NaN."""
    if granularity is Granularity.BLOCK:
        if (tiles := _tiles(values)) is None:
            return weight_amax(values, granularity)
        return torch.maximum(tiles.amax((1, 3)), tiles.amin((1, 3)).neg_())
    rows = torch.maximum(values.amax(1, keepdim=True), values.amin(1, keepdim=True).neg_())
    return rows.amax(0, keepdim=True) if granularity is Granularity.TENSOR else rows


def encode(values: Tensor, scale: Tensor, granularity: Granularity, out: Tensor) -> None:
    """Write the codes of FP32 `values` [rows, K] to `out`. `scale` is shaped as `peaks` shapes it. Overwrites `values`."""
    view, factor = _aligned(values, scale, granularity)
    view.div_(factor)
    out.copy_(values.clamp_(-FP8_MAX[FP8], FP8_MAX[FP8]))


def search_errors(values: Tensor, peak: Tensor, granularity: Granularity, weight: Tensor | None = None) -> Tensor:
    """The sum of squared errors that each of SEARCH_STEPS leaves where a scale is shared: [16, *peak.shape].

    values: contiguous FP32 [rows, K]. weight: of each column's errors, FP32 [K]; None: all count alike.
    """
    rows, k = values.shape
    scale = scale_of(peak, FP8)
    if granularity is Granularity.BLOCK:
        scale = scale.repeat_interleave(BLOCK, 0)[:rows]
    elif granularity is Granularity.TENSOR:
        scale = scale.expand(rows, 1).contiguous()
    steps = torch.tensor(SEARCH_STEPS, device=values.device)
    errors = ops.scale_errors(values, scale, steps, values.new_ones(k) if weight is None else weight)
    if granularity is Granularity.BLOCK:
        padded = torch.nn.functional.pad(errors, (0, 0, 0, -rows % BLOCK))
        tiles: Tensor = padded.unflatten(1, (-1, BLOCK))
        return tiles.sum(2)
    return errors.sum(1, keepdim=True) if granularity is Granularity.TENSOR else errors


def searched_scale(peak: Tensor, errors: Tensor) -> Tensor:
    """The scales of the smallest errors: `errors` is what `search_errors` gave, summed over all that shares a scale."""
    return scale_of(peak, FP8) * torch.tensor(SEARCH_STEPS, device=peak.device)[errors.argmin(0)]


def _tiles(values: Tensor) -> Tensor | None:
    """A view [rows / 128, 128, K / 128, 128], where whole tiles fill the matrix."""
    n, k = values.shape
    return None if n % BLOCK or k % BLOCK else values.view(n // BLOCK, BLOCK, k // BLOCK, BLOCK)


def _aligned(values: Tensor, scale: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Views of both that broadcast against each other."""
    if granularity is not Granularity.BLOCK:
        return values, scale
    if (tiles := _tiles(values)) is not None:
        return tiles, scale[:, None, :, None]
    return values, expand_scale(scale, values.shape)
