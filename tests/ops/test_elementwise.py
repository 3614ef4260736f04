"""rms_norm, silu_mul and rotate against float64."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error
from ops.cases import over

from octavo import ops
from octavo.ops import reference
from octavo.platform import Platform

dtypes = over("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(params=["bound", "reference"])
def op(request: pytest.FixtureRequest, platform: Platform) -> object:
    ops.bind(platform)
    return ops if request.param == "bound" else reference


def bound(dtype: torch.dtype) -> float:
    return 1e-6 if dtype is torch.float32 else 5e-3


@dtypes
@over("shape", [(1, 1), (5, 100), (3, 4, 17), (0, 8)])
@over("with_residual", [False, True])
def test_rms_norm(op: object, shape: tuple[int, ...], with_residual: bool, dtype: torch.dtype, platform: Platform) -> None:
    x, residual = (torch.randn(shape, dtype=dtype, device=platform.device) * size for size in (0.01, 0.02))
    weight = torch.randn(shape[-1], dtype=dtype, device=platform.device)
    before = x.clone(), residual.clone()
    made, carried = op.rms_norm(x, weight, 1e-3, residual if with_residual else None)  # type: ignore[attr-defined]
    y = made.values()
    total = x.double() + residual.double() if with_residual else x.double()
    expected = total / (total.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    assert y.dtype == carried.dtype == dtype
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])
    if x.numel():
        assert relative_error(carried, total) < bound(dtype)
        assert relative_error(y, expected) < 2 * bound(dtype)


@dtypes
@over("shape", [(0, 6), (1, 2), (7, 34)])
def test_silu_mul(op: object, shape: tuple[int, int], dtype: torch.dtype, platform: Platform) -> None:
    x = torch.randn(shape, dtype=dtype, device=platform.device) * 4
    y = op.silu_mul(x).values()  # type: ignore[attr-defined]
    gate, up = x.double().chunk(2, 1)
    assert y.dtype == dtype
    assert y.shape == gate.shape
    if y.numel():
        assert relative_error(y, gate / (1 + (-gate).exp()) * up) < bound(dtype)


@dtypes
@over("dim, rotated", [(2, 2), (16, 16), (16, 8)])
def test_rotate(op: object, dim: int, rotated: int, dtype: torch.dtype, platform: Platform) -> None:
    x = torch.randn(6, 3, dim, dtype=dtype, device=platform.device)
    angles = torch.rand(50, rotated // 2, dtype=torch.float64, device=platform.device) * 7
    positions = torch.tensor([0, 49, 3, 3, 17, 4], device=platform.device)
    y = op.rotate(x, torch.cat([angles.cos(), angles.sin()], 1).float(), positions)  # type: ignore[attr-defined]
    # As complex numbers: dimension i of the first half with dimension i of the second.
    head = x[..., :rotated].double()
    turned = torch.complex(*head.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)[positions].unsqueeze(1)
    assert y.dtype == dtype
    assert torch.equal(y[..., rotated:], x[..., rotated:])
    assert relative_error(y[..., :rotated], torch.cat([turned.real, turned.imag], -1)) < bound(dtype)
