"""The contracts of the ops that calibration rounds weights by; `octavo.ops` has them among the others."""

from __future__ import annotations

from torch import Tensor

from octavo.ops.bound import bound

__all__ = ["add_gram", "round_columns"]


def add_gram(total: Tensor, x: Tensor) -> None:
    """Adds x^T x of x [T, K], BF16 or FP32, to contiguous FP32 `total` [K, K] from its diagonal on; what is below is undefined.
    A value may be rounded by 2^-12 of the largest of its column among 512 tokens. Not finite where x is not."""
    bound["add_gram"](total, x)


def round_columns(values: Tensor, offset: Tensor, influence: Tensor, scale: Tensor) -> Tensor:
    """Rounds columns of a weight to FP8 codes times `scale` one after the other, each where those before it have moved it to.

    values, offset: contiguous FP32 [K, N], K at most 128; a column of the weight is a row here. Column k is rounded (e4m3fn,
    clamped) from values[k] - offset[k]; then influence[k, j] times what the result differs by from values[k] is added to
    offset[j], for each j. influence FP32 [K, K], scale FP32 [1 or K, N], last axes contiguous. `values` become the rounded
    ones, and the differences [K, N] are returned. Sums are FP32; NaN stays in its place of N.
    """
    return bound["round_columns"](values, offset, influence, scale)  # type: ignore[no-any-return]
