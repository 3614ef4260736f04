"""Error-compensated rounding of a weight to FP8 codes: a second-order method that knows the inputs of the layer.

With H the sum of x x^T over inputs x of the layer, the rounded weight W' loses tr((W' - W) H (W' - W)^T), the squared error of
its outputs. Columns are rounded one after the other, and what each loses is carried into those that are still to come, in the
amounts that lower this loss most (GPTQ, arXiv:2210.17323). Then, in the same order and more than once, each code becomes the
one that is best where all others stay (coordinate descent). Scales are fixed before, so codes mean what plain codes mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.platform import FP8_MAX

__all__ = ["Rounded", "compensated"]

COLUMNS = 128  # rounded before the rest of the matrix learns of their errors
DAMPING = 0.03  # of the mean of H's diagonal, added to it
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
    factor = _factor(hessian) if bool(hessian.isfinite().all()) else None
    if factor is None:
        return Rounded(plain, before, before)
    codes = _swept(_columns_in_turn(w, scale, *factor), w, scale, hessian, factor[0])
    after = _losses(codes, w, scale, hessian)
    better = after < before  # False of NaN
    chosen = torch.where(better[:, None], codes.view(torch.uint8), plain.view(torch.uint8)).view(FP8)
    return Rounded(chosen, before, torch.where(better, after, before))


def _codes(values: Tensor, scale: Tensor) -> Tensor:
    return (values / scale).clamp_(-FP8_MAX[FP8], FP8_MAX[FP8]).to(FP8)


def _losses(codes: Tensor, w: Tensor, scale: Tensor, hessian: Tensor) -> Tensor:
    """d H d^T of each row's difference d, FP64 [N]."""
    lost = codes.float().mul_(scale).double().sub_(w)
    return (lost @ hessian.double()).mul_(lost).sum(1)


def _factor(hessian: Tensor) -> tuple[Tensor, Tensor] | None:
    """The order of the columns, the largest diagonal first, and in it the upper Cholesky factor of H's inverse, FP32 [K, K].

    None where H cannot be inverted. A column whose inputs are all zero takes part in nothing.
    """
    h = hessian.double()
    diagonal = h.diagonal()
    order = diagonal.argsort(descending=True, stable=True)
    h = h[order][:, order]
    used = diagonal[order] > 0
    mean = diagonal.clamp_min(0).mean()
    damping = DAMPING * mean
    for _ in range(ATTEMPTS):
        damped = h.clone()
        damped.diagonal().copy_(torch.where(used, h.diagonal() + damping, mean.clamp_min(1e-30)))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(upper.isfinite().all()):
                return order, upper.float()
        damping = damping * 10
    return None


def _columns_in_turn(w: Tensor, scale: Tensor, order: Tensor, upper: Tensor) -> Tensor:
    n, k = w.shape
    rest = w.T[order].contiguous()  # a column is a row here, adjacent in memory
    scales = scale.T.contiguous() if scale.shape[1] == 1 else scale.T[order].contiguous()
    limit = FP8_MAX[FP8]
    codes = torch.empty(k, n, dtype=FP8, device=w.device)
    errors = torch.empty(COLUMNS, n, dtype=torch.float32, device=w.device)
    steps = upper / upper.diagonal()[:, None]
    for start in range(0, k, COLUMNS):
        stop = min(start + COLUMNS, k)
        for i in range(start, stop):
            factor = scales[0 if len(scales) == 1 else i]
            codes[i] = (rest[i] / factor).clamp_(-limit, limit)
            error = torch.addcmul(rest[i], codes[i].float(), factor, value=-1, out=errors[i - start])
            rest[i + 1 : stop].addr_(steps[i, i + 1 : stop], error, alpha=-1)
        rest[stop:].addmm_(steps[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    return _in_place(codes, order)


def _swept(codes: Tensor, w: Tensor, scale: Tensor, hessian: Tensor, order: Tensor) -> Tensor:
    """`codes` [N, K] after SWEEPS of coordinate descent over the columns in `order`."""
    h = hessian.float()[order][:, order]
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    scales = scale.T.contiguous() if scale.shape[1] == 1 else scale.T[order].contiguous()
    found = (codes.float() * scale).T[order].contiguous()  # values, a column a row
    slope = h @ (found - w.T[order])  # half of the loss's, by each value
    limit, k = FP8_MAX[FP8], len(h)
    for start in list(range(0, k, COLUMNS)) * SWEEPS:
        stop = min(start + COLUMNS, k)
        before, own, within = found[start:stop].clone(), slope[start:stop], h[start:stop, start:stop]
        for i in range(stop - start):
            factor = scales[0 if len(scales) == 1 else start + i]
            best = torch.sub(found[start + i], own[i] / within[i, i]).div_(factor).clamp_(-limit, limit)
            best = best.to(FP8).float().mul_(factor)
            own.addr_(within[:, i], best - found[start + i])
            found[start + i] = best
        moved = found[start:stop] - before
        slope[:start].addmm_(h[:start, start:stop], moved)
        slope[stop:].addmm_(h[stop:, start:stop], moved)
    return _in_place((found / scales).to(FP8), order)


def _in_place(codes: Tensor, order: Tensor) -> Tensor:
    """Codes [N, K] of [K, N] whose rows are columns in `order`."""
    out = torch.empty(codes.shape[1], len(order), dtype=torch.uint8, device=codes.device)
    out[:, order] = codes.view(torch.uint8).T
    return out.view(FP8)
