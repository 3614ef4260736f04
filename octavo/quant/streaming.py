"""Quantizing some rows of a matrix at a time, in place, into buffers that the caller uses again.

The codes and scales are bit for bit those of `qtensor.quantize`, which has the matrix as a whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.platform import FP8_MAX
from octavo.quant.qtensor import expand_scale, scale_of, weight_amax
from octavo.quant.scheme import BLOCK, Granularity

__all__ = ["SEARCH_STEPS", "encode", "peaks", "search_errors", "searched_scale"]

# Factors on the scale that `search_errors` tries. The first is absmax's own, so that no search does worse; past 2 the same
# mantissas come again, with one exponent less.
SEARCH_STEPS = torch.linspace(1.0, 2.0, 17)[:16]
FP8 = torch.float8_e4m3fn


def peaks(values: Tensor, granularity: Granularity) -> Tensor:
    """Largest magnitudes of FP32 `values` [rows, K] in the shape of their scales; [1, 1] for Granularity.TENSOR."""
    if (tiles := _tiles(values)) is not None and granularity is Granularity.BLOCK:
        columns = tiles.amax(1), tiles.amin(1).neg_()
        return torch.maximum(*columns).amax(2)
    if granularity is Granularity.BLOCK:
        return weight_amax(values, granularity)
    rows = torch.maximum(values.amax(1, keepdim=True), values.amin(1, keepdim=True).neg_())
    return rows.amax(0, keepdim=True) if granularity is Granularity.TENSOR else rows


def encode(values: Tensor, scale: Tensor, out: Tensor) -> None:
    """The e4m3fn codes of FP32 `values` [rows, K] under `scale`, as `peaks` shapes it, into `out`. Overwrites `values`."""
    _divide(values, scale, values)
    out.copy_(values.clamp_(-FP8_MAX[FP8], FP8_MAX[FP8]))


def search_errors(values: Tensor, peak: Tensor, work: tuple[Tensor, Tensor]) -> Tensor:
    """Squared errors that each factor of SEARCH_STEPS leaves: [16, *peak.shape]. `work`: two FP32 tensors like `values`."""
    scale, (quotient, near) = scale_of(peak, FP8), work
    errors = []
    for step in SEARCH_STEPS.tolist():
        tried = scale * step
        _divide(values, tried, quotient)
        _rounding_offset(quotient, near)
        near.add_(quotient).sub_(_rounding_offset(quotient, torch.empty_like(near)))
        near.sub_(quotient).square_()
        errors.append(_sums(near, peak.shape) * tried.square())
    return torch.stack(errors)


def searched_scale(peak: Tensor, errors: Tensor) -> Tensor:
    """The scales that leave the smallest of `errors`, the sums over all rows of what `search_errors` gave."""
    return scale_of(peak, FP8) * SEARCH_STEPS.to(peak.device)[errors.argmin(0)]
