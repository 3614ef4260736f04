"""Compensated rounding beside its definition, by float64's solver."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from quant.float64 import E4M3FN

from octavo import ops
from octavo.convert import compensated as module
from octavo.platform import detect


def test_what_a_column_loses_moves_the_others_to_their_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without sweeps: after each rounded column those to come are what lowers d H d^T most. A column without inputs, too."""
    monkeypatch.setattr(module, "SWEEPS", 0)
    monkeypatch.setattr(module, "COLUMNS", 16)
    ops.bind(detect("cpu"))
    g = torch.Generator().manual_seed(0)
    rows, columns = 24, 40
    x = torch.randn(200, columns, generator=g) @ torch.randn(columns, columns, generator=g)
    x[:, 5] = 0
    w = torch.randn(rows, columns, generator=g)
    scale = w.abs().amax(1, keepdim=True) / 448
    found = module.compensated(w, scale, x.T @ x)
    h = (x.T @ x).double().numpy()
    diagonal = h.diagonal().copy()
    h[range(columns), range(columns)] += module.DAMPING * diagonal + module.LEAST * diagonal.mean()
    h[5, 5] = 1
    size, exact = scale.double().numpy()[:, 0], w.double().numpy()
    moved, want = exact.copy(), exact.copy()
    order = list(np.argsort(-diagonal, kind="stable"))
    for i, k in enumerate(order):
        want[:, k] = E4M3FN.values[E4M3FN.nearest(moved[:, k] / size)] * size
        done, rest = order[: i + 1], order[i + 1 :]
        by = np.linalg.solve(h[np.ix_(rest, rest)], h[np.ix_(rest, done)] @ (want - exact)[:, done].T)
        moved[:, rest] = exact[:, rest] - by.T
    same = np.isclose(found.codes.double().numpy() * size[:, None], want, rtol=1e-6)
    assert same.mean() > 0.99
    assert bool((found.loss < found.plain).all())
