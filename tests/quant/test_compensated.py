"""Error-compensated rounding, against its definition in float64: no Cholesky factor, no blocks of columns."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from cases import cases
from numpy.typing import NDArray
from quant.float64 import E4M3FN

from octavo import ops
from octavo.convert.compensated import DAMPING, LEAST, SWEEPS, compensated
from octavo.platform import Platform
from octavo.quant import FP8_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, Scheme, quantize
from octavo.quant.qtensor import expand_scale

Array = NDArray[np.float64]
SCHEMES = [FP8_PER_TENSOR, FP8_PER_CHANNEL, FP8_BLOCK]
schemes = cases("scheme", SCHEMES, ids=lambda s: s.name)


@pytest.fixture(autouse=True, scope="module")
def on_a_cpu() -> None:
    ops.bind(Platform(torch.device("cpu"), "test"))


def inputs(k: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Correlated, of unequal sizes, as a layer's are; one of them always zero."""
    x: torch.Tensor = torch.randn(count, k, generator=generator) @ torch.randn(k, k, generator=generator) / k**0.5
    x *= torch.rand(k, generator=generator) * 3 + 0.1
    x[:, k // 2] = 0
    return x


def one_by_one(w: Array, scale: Array, hessian: Array) -> Array:
    """The values that codes stand for [N, K]: each column rounded, its error spread by the inverse of what H is of the
    rest; then each in turn the best for the others as they are."""
    diagonal = hessian.diagonal()
    damped = hessian + np.diag(DAMPING * diagonal + LEAST * diagonal.mean())
    left = [int(j) for j in np.argsort(-diagonal, kind="stable")]
    order, exact = left, w
    w, out = w.copy(), np.zeros_like(w)
    while left:
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        j, size = left[0], np.broadcast_to(scale, w.shape)[:, left[0]]
        out[:, j] = E4M3FN.values[E4M3FN.nearest(w[:, j] / size)] * size
        w[:, left] -= np.outer(w[:, j] - out[:, j], inverse[0] / inverse[0, 0])
        left = left[1:]
    for j in order * SWEEPS:
        size = np.broadcast_to(scale, w.shape)[:, j]
        best = out[:, j] - (out - exact) @ damped[:, j] / damped[j, j]
        out[:, j] = E4M3FN.values[E4M3FN.nearest(best / size)] * size
    return out


def loss(values: Array, w: Array, hessian: Array) -> Array:
    losses: Array = np.einsum("nk,kl,nl->n", values - w, hessian, values - w)
    return losses


@schemes
@cases("shape", [(5, 40), (7, 135), (130, 150)])
def test_codes_are_those_of_the_definition(scheme: Scheme, shape: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(sum(shape))
    n, k = shape
    w, x = torch.randn(n, k, generator=g), inputs(k, 400, g)
    hessian, plain = x.T @ x, quantize(w, scheme)
    assert plain.scale is not None
    scale = expand_scale(plain.scale, w.shape)
    found = compensated(w, scale, hessian)
    values = found.codes.double().numpy() * scale.double().numpy()
    exact, h = w.double().numpy(), hessian.double().numpy()
    expected = one_by_one(exact, scale.double().numpy(), h)
    same = (np.abs(values - expected) <= 1e-6 * np.abs(expected)).all(1)
    assert same.mean() > 0.8  # a tie that FP32 sees otherwise changes what follows in its row
    after, wanted, before = (loss(v, exact, h).sum() for v in (values, expected, plain.data.double().numpy() * scale.numpy()))
    assert abs(after / wanted - 1) < 0.02
    assert after < 0.75 * before
    np.testing.assert_allclose(found.loss.sum(), after, rtol=1e-5)
    np.testing.assert_allclose(found.plain.sum(), before, rtol=1e-5)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 150), st.integers(1, 40), st.sampled_from(SCHEMES),
    st.sampled_from([1e-18, 1e-3, 1.0, 1e12]),
)  # fmt: skip
def test_no_row_is_worse_than_rounded_plainly(seed: int, n: int, k: int, count: int, scheme: Scheme, size: float) -> None:
    """Whatever the weights and however few the inputs."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g) * 4 ** torch.randn(n, k, generator=g)
    x = inputs(k, count, g) * size
    plain = quantize(w, scheme)
    assert plain.scale is not None
    scale = expand_scale(plain.scale, w.shape)
    hessian = x.T @ x
    found = compensated(w, scale, hessian)
    exact, h = w.double().numpy(), hessian.double().numpy()
    before, after = (loss(c.double().numpy() * scale.double().numpy(), exact, h) for c in (plain.data, found.codes))
    kept = (found.codes.view(torch.uint8) == plain.data.view(torch.uint8)).all(1).numpy()
    assert (kept | (after < before * (1 + 1e-9))).all()


@cases("spoiled", ["weight", "input", "all inputs", "no inputs"])
def test_what_is_not_finite_is_rounded_plainly(spoiled: str) -> None:
    """A row of such weights, and every row where inputs are such, or zero; no other row learns of it."""
    g = torch.Generator().manual_seed(3)
    w, x = torch.randn(6, 140, generator=g), inputs(140, 300, g)
    clean = compensated(w, torch.full((6, 1), 0.01), x.T @ x).codes.view(torch.uint8)
    if spoiled == "weight":
        w[2, 5] = torch.inf
        w[4, 0] = torch.nan
    elif spoiled == "input":
        x[7, 7] = torch.inf
    else:
        x[:] = torch.nan if spoiled == "all inputs" else 0
    scale = torch.full((6, 1), 0.01)
    found = compensated(w, scale, x.T @ x).codes.view(torch.uint8)
    plain = (w / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    rows = [2, 4] if spoiled == "weight" else list(range(6))
    others = [row for row in range(6) if row not in rows]
    assert torch.equal(found[rows], plain[rows])
    assert torch.equal(found[others], clean[others])
    assert (clean[others] != plain[others]).any(1).all()
