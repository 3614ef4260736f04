"""Error-compensated rounding of a weight to FP8 codes: a second-order method that knows the inputs of the layer.

With H the sum of x x^T over inputs x of the layer, the rounded weight W' loses tr((W' - W) H (W' - W)^T), the squared error of
its outputs. Columns are rounded one after the other, and what each loses is carried into those that are still to come, in the
amounts that lower this loss most: GPTQ (arXiv:2210.17323), in the form of LDLQ (arXiv:2307.13304), which gives the same codes
and takes one factorization of H and no inverse. (H is damped, so FP32 factors it: 4e-7 from float64 in SmolLM2.)
Then, in the same order and more than once, each code becomes the one that is best where all others stay (coordinate descent).
Scales are fixed before, so codes mean what plain codes mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo import ops
from octavo.platform import FP8_MAX

__all__ = ["Rounded", "compensated", "factor", "forms", "in_order", "is_finite", "symmetric"]

COLUMNS = 128  # rounded before the rest of the matrix learns of their errors
STRIP = 256  # columns of H that are multiplied at once, from the diagonal on
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
    plain = (w / scale).clamp_(-FP8_MAX[FP8], FP8_MAX[FP8]).to(FP8)
    before = forms(plain.float().mul_(scale).sub_(w), hessian)
    order, h = in_order(hessian)
    carried = factor(h) if is_finite(h) else None
    if carried is None:
        return Rounded(plain, before, before)
    codes, after = _rounded(w, scale, h, order, carried)
    better = after < before  # False of NaN
    chosen = torch.where(better[:, None], codes.view(torch.uint8), plain.view(torch.uint8)).view(FP8)
    return Rounded(chosen, before, torch.where(better, after, before))


def forms(rows: Tensor, hessian: Tensor) -> Tensor:
    """d H d^T of each row d of FP32 `rows` [N, K], of FP32 products: FP64 [N]. Reads H [K, K] from its diagonal on."""
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for start in range(0, len(hessian), STRIP):
        strip = slice(start, start + STRIP)
        products = rows[:, strip] @ hessian[strip, start:]
        products[:, STRIP:] *= 2  # what is below the diagonal, too
        total += products.mul_(rows[:, start:]).sum(1, dtype=torch.float64)
    return total


def _damping(diagonal: Tensor, part: float = DAMPING) -> Tensor:
    return part * diagonal + LEAST * diagonal.clamp_min(0).mean()


def symmetric(gram: Tensor) -> Tensor:
    """Completes a sum [K, K] that `ops.add_gram` made, which leaves undefined what is below the diagonal. Returns it."""
    for start in range(0, len(gram), STRIP):
        stop = start + STRIP
        own = gram[start:stop, start:stop].triu()
        gram[start:stop, start:stop] = own + own.triu(1).T
        gram[stop:, start:stop] = gram[start:stop, stop:].T
    return gram


def is_finite(hessian: Tensor) -> bool:
    return bool(torch.stack(torch.aminmax(hessian)).isfinite().all())


def in_order(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The order in which columns are rounded, the largest diagonal first, and H in it."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    return order, hessian.index_select(0, order).index_select(1, order)


def factor(hessian: Tensor, part: float = DAMPING) -> Tensor | None:
    """The U of H = (U + I) D (U + I)^T, FP32 [K, K], for `hessian` in the order of the columns: upper triangular, zero on its
    diagonal. D is diagonal. part: of the diagonal, added to it.

    None where H, damped, is not positive definite. A column whose inputs are all zero takes part in nothing.
    """
    h = hessian.flip(0, 1)  # of a matrix turned round the lower factor is the upper one of the matrix, turned round
    diagonal = h.diagonal().clone()
    mean, damping = diagonal.clamp_min(0).mean(), _damping(diagonal, part)
    for _ in range(ATTEMPTS):
        h.diagonal().copy_(torch.where(diagonal > 0, diagonal + damping, mean.clamp_min(1e-30)))
        lower: Tensor
        lower, failed = torch.linalg.cholesky_ex(h)
        if not failed:
            lower /= lower.diagonal().clone()
            lower.diagonal().zero_()
            if is_finite(lower):
                return lower.flip(0, 1).contiguous()  # LAPACK has columns adjacent
        damping = damping * 10
    return None


def _rounded(w: Tensor, scale: Tensor, h: Tensor, order: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [N, K]: columns in `order`, each rounded where those before have moved it to; then SWEEPS of coordinate descent.
    And what each row loses, FP64 [N]. h: H in the order, which is overwritten. carried: its factor."""
    exact = w.T.index_select(0, order)  # a column is a row here, adjacent in memory
    values, offset = exact.clone(), torch.zeros_like(exact)
    scales = scale.T.contiguous() if scale.shape[1] == 1 else scale.T.index_select(0, order)
    for start in range(0, len(values), COLUMNS):
        block, rest = slice(start, start + COLUMNS), slice(start + COLUMNS, None)
        own = scales if len(scales) == 1 else scales[block]
        moved = ops.round_columns(values[block], offset[block], carried[block, block], own)
        offset[rest].addmm_(carried[block, rest].T, moved)
    damping = _damping(h.diagonal())
    h.diagonal().add_(damping)
    diagonal = h.diagonal().clone()
    h /= diagonal  # column j by its own: where the loss is least in value j, less the value
    codes, exact, scales = (x.T.contiguous() for x in (values, exact, scales))
    best = (codes - exact) @ h
    ops.descend(codes, best, h, scales, SWEEPS)
    lost = codes - exact
    loss = (best.mul_(diagonal).sub_(lost * damping)).mul_(lost).sum(1, dtype=torch.float64)
    return _in_place((codes / scales).to(FP8), order), loss


def _in_place(codes: Tensor, order: Tensor) -> Tensor:
    """Codes [N, K] of columns that are in `order`."""
    out = torch.empty(codes.shape, dtype=torch.uint8, device=codes.device)
    out[:, order] = codes.view(torch.uint8)
    return out.view(FP8)
