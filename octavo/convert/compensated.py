"""Error-compensated rounding of a weight to FP8 codes: a second-order method that knows the inputs of the layer.

With H the sum of x x^T over inputs x of the layer, the rounded weight W' loses tr((W' - W) H (W' - W)^T), the squared error of
its outputs. Columns are rounded one after the other, and what each loses is carried into those that are still to come, in the
amounts that lower this loss most: GPTQ (arXiv:2210.17323), in the form of LDLQ (arXiv:2307.13304), which gives the same codes
and takes one factorization of H and no inverse. Then, in the same order and more than once, each code becomes the one that is
best where all others stay (coordinate descent). Scales are fixed before, so codes mean what plain codes mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo import ops
from octavo.platform import FP8_MAX

__all__ = ["Rounded", "compensated", "factor", "symmetric"]

COLUMNS = 128  # rounded before the rest of the matrix learns of their errors
DAMPING = 0.3  # of H's diagonal, added to it: of a small sample, what is beside it is known by each pair of inputs' own sizes
LEAST = 0.0003  # of the diagonal's mean, added too
SWEEPS = 3  # of coordinate descent: ten gain 1% more
ATTEMPTS = 4  # with ten times as much each, before the matrix is rounded plainly
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Rounded:
    """Codes e4m3fn [N, K], and what each row loses of the layer's outputs, FP64 [N]: rounded plainly, and rounded so."""

    codes: Tensor
    plain: Tensor
    loss: Tensor


def compensated(w: Tensor, scale: Tensor, hessian: Tensor) -> Rounded:
    """Rounds FP32 `w` [N, K] to codes times `scale`, FP32 [N, 1] or [N, K], for inputs whose sum of x x^T is `hessian` [K, K].

    A row of which plain rounding loses less, or whose values are not finite, is rounded plainly; so is a matrix whose hessian
    is not finite.
    """
    plain = _codes(w, scale)
    before = _losses(plain, w, scale, hessian)
    found = factor(hessian) if bool(hessian.isfinite().all()) else None
    if found is None:
        return Rounded(plain, before, before)
    codes = _rounded(w, scale, hessian, *found)
    after = _losses(codes, w, scale, hessian)
    better = after < before  # False of NaN
    chosen = torch.where(better[:, None], codes.view(torch.uint8), plain.view(torch.uint8)).view(FP8)
    return Rounded(chosen, before, torch.where(better, after, before))


def _codes(values: Tensor, scale: Tensor) -> Tensor:
    return (values / scale).clamp_(-FP8_MAX[FP8], FP8_MAX[FP8]).to(FP8)


def _losses(codes: Tensor, w: Tensor, scale: Tensor, hessian: Tensor) -> Tensor:
    """d H d^T of each row's difference d, FP64 [N], of FP32 products."""
    lost = codes.float().mul_(scale).sub_(w)
    return (lost @ hessian).mul_(lost).sum(1, dtype=torch.float64)


def _damping(diagonal: Tensor, part: float = DAMPING) -> Tensor:
    return part * diagonal + LEAST * diagonal.clamp_min(0).mean()


def symmetric(gram: Tensor) -> Tensor:
    """The whole of a sum that `ops.add_gram` made [K, K], which leaves undefined what is below the diagonal. Clears that of
    `gram`, since a copy may be as large as a layer."""
    upper = gram.triu_()
    return upper + upper.triu(1).T


def factor(hessian: Tensor, part: float = DAMPING) -> tuple[Tensor, Tensor] | None:
    """The order of the columns, the largest diagonal first, and in it the U of H = (U + I) D (U + I)^T, FP32 [K, K]: upper
    triangular, zero on its diagonal. D is diagonal. part: of the diagonal, added to it.

    None where H, damped, is not positive definite. A column whose inputs are all zero takes part in nothing.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    backwards = order.flip(0)  # of a matrix turned round the lower factor is the upper one of the matrix, turned round
    h = hessian[backwards][:, backwards].double()
    diagonal = h.diagonal().clone()
    mean, damping = diagonal.clamp_min(0).mean(), _damping(diagonal, part)
    for _ in range(ATTEMPTS):
        h.diagonal().copy_(torch.where(diagonal > 0, diagonal + damping, mean.clamp_min(1e-30)))
        lower, failed = torch.linalg.cholesky_ex(h)
        if not failed:
            lower /= lower.diagonal().clone()
            if bool(lower.isfinite().all()):
                return order, lower.float().tril_(-1).flip(0, 1).contiguous()
        damping = damping * 10
    return None


def _rounded(w: Tensor, scale: Tensor, hessian: Tensor, order: Tensor, carried: Tensor) -> Tensor:
    """Codes [N, K]: columns in `order`, each rounded where those before have moved it to; then SWEEPS of coordinate descent."""
    exact = w.T[order].contiguous()  # a column is a row here, adjacent in memory
    scales = scale.T.contiguous() if scale.shape[1] == 1 else scale.T[order].contiguous()
    values, offset = exact.clone(), torch.zeros_like(exact)
    _pass(values, offset, carried, scales, back=False)
    h = hessian[order][:, order]
    h.diagonal().add_(_damping(h.diagonal()))
    h /= h.diagonal().clone()  # column j by its own: where the loss is least in value j, less the value
    torch.mm(h.T, values - exact, out=offset)
    for _ in range(SWEEPS):
        _pass(values, offset, h, scales, back=True)
    return _in_place((values / scales).to(FP8), order)


def _pass(values: Tensor, offset: Tensor, influence: Tensor, scales: Tensor, *, back: bool) -> None:
    """`octavo.ops.round_columns` of all columns, COLUMNS at a time. back: `influence` is not zero below its diagonal."""
    for start in range(0, len(values), COLUMNS):
        block = slice(start, start + COLUMNS)
        own = influence[block]
        moved = ops.round_columns(values[block], offset[block], own[:, block], scales if len(scales) == 1 else scales[block])
        if back:
            offset[:start].addmm_(own[:, :start].T, moved)
        offset[start + COLUMNS :].addmm_(own[:, start + COLUMNS :].T, moved)


def _in_place(codes: Tensor, order: Tensor) -> Tensor:
    """Codes [N, K] of [K, N] whose rows are columns in `order`."""
    out = torch.empty(codes.shape[1], len(order), dtype=torch.uint8, device=codes.device)
    out[:, order] = codes.view(torch.uint8).T
    return out.view(FP8)
