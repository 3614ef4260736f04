"""Quantizing some rows of a matrix at a time, in place, into buffers that the caller uses again.

The codes and scales are bit for bit those of `qtensor.quantize`, which has the matrix as a whole. Only e4m3fn: it is what
checkpoints store.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.platform import FP8_MAX
from octavo.quant.qtensor import expand_scale, scale_of, weight_amax
from octavo.quant.scheme import BLOCK, Granularity

__all__ = ["SEARCH_STEPS", "encode", "peaks", "search_errors", "searched_scale"]

FP8 = torch.float8_e4m3fn
# What `search_errors` multiplies absmax's scale by. 1 is among them, so that no search does worse; from 2 on the same
# mantissas come again, with one exponent less.
SEARCH_STEPS = tuple(1 + i / 16 for i in range(16))
SMALLEST_NORMAL = 2.0**-6


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


def search_errors(
    values: Tensor, peak: Tensor, granularity: Granularity, work: tuple[Tensor, Tensor], weight: Tensor | float = 1.0
) -> Tensor:
    """The sum of squared errors that each of SEARCH_STEPS leaves where a scale is shared: [16, *peak.shape].

    `work`: two FP32 tensors of the shape of `values`, which are overwritten. weight: of each column's errors, [K].
    """
    rounded, offset = work
    original, _ = _aligned(values, peak, granularity)
    view, _ = _aligned(rounded, peak, granularity)
    errors = []
    for step in SEARCH_STEPS:
        _, scale = _aligned(values, scale_of(peak, FP8) * step, granularity)
        torch.div(original, scale, out=view)
        # A value plus 1.5 * 2^(20 + e), e being its exponent, keeps the 3 bits after its leading one, rounded to nearest even
        # as the cast rounds; subnormal codes are as far apart as the smallest normal ones. Far faster than two casts.
        torch.abs(rounded, out=offset).clamp_min_(SMALLEST_NORMAL).view(torch.int32).bitwise_and_(0x7F800000)
        offset.mul_(1.5 * 2**20)
        rounded.add_(offset).sub_(offset)
        view.mul_(scale).sub_(original)
        errors.append(_sums(rounded.square_().mul_(weight), peak, granularity))
    return torch.stack(errors)


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


def _sums(squares: Tensor, peak: Tensor, granularity: Granularity) -> Tensor:
    """Sums over what shares a scale."""
    if granularity is Granularity.TENSOR:
        return squares.sum().view(1, 1)
    if granularity is Granularity.ROW:
        return squares.sum(1, keepdim=True)
    n, k = squares.shape
    padded = torch.nn.functional.pad(squares, (0, -k % BLOCK, 0, -n % BLOCK))
    tiles = _tiles(padded)
    assert tiles is not None
    return tiles.sum((1, 3))
