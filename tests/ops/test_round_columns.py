"""Columns rounded to FP8 one after the other: every implementation beside float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ops.cases import combined, instruction_sets, over
from quant.float64 import E4M3FN

from octavo.ops import reference
from octavo.ops.cpu import library, native

pytest.importorskip("triton", reason="needs Triton, which this torch came without")

from octavo.ops.triton import round_columns as triton_kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MADE = {"reference": (reference.round_columns, DEVICE), "Triton": (triton_kernel.round_columns, DEVICE)}
SHAPES = [(1, 1), (3, 17), (33, 40), (128, 5), (100, 130), (128, 64)]
if library.missing() is None:
    MADE |= {f"C, {name}": (native.round_columns, torch.device("cpu")) for name in instruction_sets()}


@over("name", MADE)
@over("shape, scales", combined(SHAPES, ["a row", "each"]))
def test_it_is_the_definition(name: str, shape: tuple[int, int], scales: str) -> None:
    """A column is rounded from where those before it have moved it to; a tie that FP32 sees otherwise changes what follows."""
    made, device = MADE[name]
    if name.startswith("C, "):
        library.use(name.removeprefix("C, "))
    columns, rows = shape
    g = torch.Generator().manual_seed(columns + rows)
    values, offset = torch.randn(shape, generator=g), torch.randn(shape, generator=g) * 0.1
    influence = (torch.randn(128, 160, generator=g) * 0.05)[:columns, 3 : columns + 3]  # part of a larger matrix
    scale = torch.rand(1 if scales == "a row" else columns, rows, generator=g) * 0.02 + 0.001
    values[0, 0] = 1e4  # is clamped
    if rows > 2:
        values[0, 1] = torch.nan  # stays in its own row of the weight
    given = [x.to(device, copy=True) for x in (values, offset)]
    moved = made(*given, influence.to(device), scale.to(device)).cpu().double()
    found = given[0].cpu().double()
    want, own = values.double().numpy().copy(), offset.double().numpy().copy()
    by = np.zeros_like(want)
    for k in range(columns):
        size = scale[0 if len(scale) == 1 else k].double().numpy()
        start = want[k] - own[k]
        with np.errstate(invalid="ignore"):
            rounded = E4M3FN.values[E4M3FN.nearest(np.nan_to_num(start / size))] * size
        by[k] = rounded - want[k]
        own += np.outer(influence[k].double().numpy(), by[k])
        want[k] = rounded
    clean = [n for n in range(rows) if n != 1 or rows <= 2]
    same = (np.abs(found.numpy() - want) <= 1e-6 * np.abs(want)).all(0)[clean]
    assert same.mean() > 0.8
    alike = np.array(clean)[same]
    assert np.abs(moved.numpy() - by)[:, alike].max() < 1e-4 * max(1.0, np.abs(by[:, alike]).max())
    left = given[1].cpu().double().numpy() - own
    assert np.abs(left[:, alike]).max() < 1e-4 * max(1.0, np.abs(own[:, alike]).max())
    if rows > 2:
        assert found[0, 1].isnan()
        assert found[:, clean].isfinite().all()
