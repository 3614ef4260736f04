"""What a weight loses by each of some scales: every implementation beside float64."""

from __future__ import annotations

import torch
from ops.cases import combined, on_each_instruction_set, over
from quant.float64 import E4M3FN

from octavo.ops import reference
from octavo.ops.cpu import library, native

MADE = {"reference": reference.scale_errors} | ({"C": native.scale_errors} if library.missing() is None else {})
STEPS = torch.tensor([1 + i / 16 for i in range(16)])


@on_each_instruction_set
@over("name", MADE)
@over("shape, count", combined([(1, 1), (17, 3), (5, 130), (3, 256), (40, 300)], [16, 5]))
def test_it_is_the_definition(name: str, shape: tuple[int, int], count: int) -> None:
    """Of rows and of tiles' columns; values that only subnormal codes are near to are among them, and a row of zeros."""
    rows, width = shape
    values = torch.randn(shape) * torch.randn(width).mul_(3).exp_()
    values[rows // 2] = 0 if rows > 1 else values[rows // 2]
    weight, steps = torch.rand(width) + 0.1, STEPS[:count]
    for group in {width, 128 if width > 128 else width}:
        parts = [slice(at, min(at + group, width)) for at in range(0, width, group)]
        scale = torch.stack([values[:, part].abs().amax(1).clamp_min(1e-3) / 448 for part in parts], 1)
        found = MADE[name](values, scale, steps, weight)
        assert found.shape == (count, rows, len(parts))
        for s, step in enumerate(steps.double().numpy()):
            for i, part in enumerate(parts):
                by, exact = scale[:, i : i + 1].double().numpy() * step, values[:, part].double().numpy()
                lost = E4M3FN.values[E4M3FN.nearest(exact / by)] * by - exact
                want, last_bits = (
                    lost**2 @ weight[part].double().numpy(),
                    abs(lost * exact) @ weight[part].double().numpy() * 2**-22,
                )
                assert (abs(found[s, :, i].numpy() - want) <= 1e-6 * want + last_bits).all()


@on_each_instruction_set
@over("name", MADE)
def test_what_is_not_finite_stays_in_its_row(name: str) -> None:
    values = torch.randn(4, 70)
    values[2, 69] = torch.nan
    found = MADE[name](values, torch.full((4, 1), 0.02), STEPS, torch.ones(70))
    assert torch.equal(found.isfinite().all(0)[:, 0], torch.tensor([True, True, False, True]))
