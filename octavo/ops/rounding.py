"""The ops that calibration rounds weights by; `octavo.ops` has them among the others."""

from __future__ import annotations

from torch import Tensor

from octavo.ops.bound import bound
from octavo.quant.scheme import BLOCK

__all__ = ["add_gram", "composed_descent", "descend", "round_columns", "scale_errors"]


def add_gram(total: Tensor, x: Tensor) -> None:
    """Adds x^T x of x [T, K], BF16 or FP32, to contiguous FP32 `total` [K, K] from its diagonal on; what is below is undefined.
    A value may be rounded by 2^-8 of the largest of its column among 512 tokens. Not finite where x is not."""
    bound["add_gram"](total, x)


def round_columns(values: Tensor, offset: Tensor, influence: Tensor, scale: Tensor) -> Tensor:
    """Rounds columns of a weight to FP8 codes times `scale` one after the other, each where those before it have moved it to.

    values, offset: contiguous FP32 [K, N], K at most 128; a column of the weight is a row here. Column k is rounded (e4m3fn,
    clamped) from values[k] - offset[k]; then influence[k, j] times what the result differs by from values[k] is added to
    offset[j], for each j. influence FP32 [K, K], scale FP32 [1 or K, N], last axes contiguous. `values` become the rounded
    ones, and the differences [K, N] are returned. Sums are FP32; NaN stays in its place of N.
    """
    return bound["round_columns"](values, offset, influence, scale)  # type: ignore[no-any-return]


def descend(values: Tensor, offset: Tensor, influence: Tensor, scale: Tensor, sweeps: int) -> None:
    """Coordinate descent over a weight's FP8 codes in place, `sweeps` times over all columns: each in turn is rounded (e4m3fn,
    clamped) from values[:, k] - offset[:, k], and influence[k, j] times its change is added to offset[:, j], for each j.

    values, offset: contiguous FP32 [N, K]; values are codes times `scale`, FP32 [N, 1 or K]. influence: contiguous FP32 [K, K],
    1 on its diagonal. Sums are FP32; NaN stays in its row.
    """
    bound["descend"](values, offset, influence, scale, sweeps)


def scale_errors(values: Tensor, scale: Tensor, steps: Tensor, weight: Tensor) -> Tensor:
    """The sums of weight[k] (v' - v)^2 over what shares a scale, FP32 [S, N, G], for v' the FP8 codes (e4m3fn) of FP32 `values`
    [N, K] times `scale`, FP32 [N, G], times each of `steps`, FP32 [S], from 1 on.

    A scale is for the whole of a row (G is 1), or for BLOCK columns each, and no value is beyond its codes. weight: FP32 [K].
    All are contiguous. Not finite where a value is not.
    """
    return bound["scale_errors"](values, scale, steps, weight)  # type: ignore[no-any-return]


def composed_descent(values: Tensor, offset: Tensor, influence: Tensor, scale: Tensor, sweeps: int) -> None:
    """`descend` by `round_columns` of as many columns as that takes, and a product for all others after each."""
    rows = values.T.contiguous(), offset.T.contiguous(), scale.T.contiguous()
    for start in [*range(0, len(influence), BLOCK)] * sweeps:
        block = slice(start, start + BLOCK)
        value, own, by = (x if len(x) == 1 else x[block] for x in rows)
        moved = round_columns(value, own, influence[block, block], by)
        rows[1][:start].addmm_(influence[block, :start].T, moved)
        rows[1][start + BLOCK :].addmm_(influence[block, start + BLOCK :].T, moved)
    values.copy_(rows[0].T)
    offset.copy_(rows[1].T)
