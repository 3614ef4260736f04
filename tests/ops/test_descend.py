"""Coordinate descent over a weight's codes: every implementation beside float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ops.cases import combined, instruction_sets, over
from quant.float64 import E4M3FN

from octavo.ops import reference, rounding
from octavo.ops.bound import bound
from octavo.ops.cpu import library, native

SETS = [f"C, {name}" for name in instruction_sets()] if library.missing() is None else []
SHAPES = [(1, 1), (17, 3), (40, 33), (5, 130), (70, 150), (33, 300)]


def descend(name: str, *given: torch.Tensor, sweeps: int) -> None:
    """By the implementation of this name."""
    if name.startswith("C, "):
        library.use(name.removeprefix("C, "))
        native.descend(*given, sweeps)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bound, "round_columns", reference.round_columns)
        rounding.composed_descent(*given, sweeps)


@over("name", ["composed", *SETS])
@over("shape, scales", combined(SHAPES, ["a row", "each"]))
def test_it_is_the_definition(name: str, shape: tuple[int, int], scales: str) -> None:
    """Each code in turn is the best for the others as they are; a tie that FP32 sees otherwise changes what follows in its row.
    What is left of the offsets is what the codes of that very result lose."""
    (rows, width), g = shape, torch.Generator().manual_seed(sum(shape))
    h = torch.randn(width, width, generator=g).double() / width**0.5
    h = h @ h.T + torch.eye(width)
    h /= h.diagonal().clone()
    scale = torch.rand(rows, 1 if scales == "a row" else width, generator=g) * 0.02 + 0.01
    exact = torch.randn(shape, generator=g).double()
    exact[0, width // 2] = 1e4  # is clamped
    values = (exact / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    offset = ((values.double() - exact) @ h).float()
    given = values.clone(), offset.clone()
    descend(name, *given, h.float(), scale, sweeps=3)
    found, left = (x.double().numpy() for x in given)
    want, factor = values.double().numpy(), np.broadcast_to(scale.double().numpy(), shape)
    for k in list(range(width)) * 3:
        best = want[:, k] - (want - exact.numpy()) @ h.numpy()[:, k]
        want[:, k] = E4M3FN.values[E4M3FN.nearest(best / factor[:, k])] * factor[:, k]
    assert (np.abs(found - want) <= 1e-6 * np.abs(want)).all(1).mean() > 0.8
    assert width < 30 or (found != values.double().numpy()).mean() > 0.02
    losses = (found - exact.numpy()) @ h.numpy()
    assert (np.abs(left - losses) <= 2e-6 * (np.abs(losses).max(1, keepdims=True) + 1)).all()


@over("name", ["composed", *SETS])
def test_what_is_not_finite_stays_in_its_row(name: str) -> None:
    values, offset, h = torch.randn(5, 20), torch.randn(5, 20), torch.rand(20, 20)
    offset[3, 7] = torch.nan
    descend(name, values, offset, h.fill_diagonal_(1), torch.full((5, 1), 0.01), sweeps=1)
    assert values[3, 7].isnan()
    assert values[[0, 1, 2, 4]].isfinite().all()
