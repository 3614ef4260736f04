"""Norms, activations, rotate and attention within segments against float64."""

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
@over("shape", [(1, 1), (5, 100), (3, 4, 17), (0, 8)])
@over("with_residual", [False, True])
def test_layer_norm(op: object, shape: tuple[int, ...], with_residual: bool, dtype: torch.dtype, platform: Platform) -> None:
    x, residual = (torch.randn(shape, dtype=dtype, device=platform.device) + 1 for _ in range(2))
    weight, bias = (torch.randn(shape[-1], dtype=dtype, device=platform.device) for _ in range(2))
    made, carried = op.layer_norm(x, ops.Norm(weight, 1e-3, bias), residual if with_residual else None)  # type: ignore[attr-defined]
    total = (x + residual).double() if with_residual else x.double()
    apart = total - total.mean(-1, keepdim=True)
    expected = apart / (apart.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double() + bias.double()
    assert made.values().dtype == carried.dtype == dtype
    if x.numel():
        assert relative_error(carried, total) < bound(dtype)
        assert relative_error(made.values(), expected) < 2 * bound(dtype)


@dtypes
@over("approximate", ["none", "tanh"])
@over("shape", [(0, 6), (1, 1), (7, 34), (2, 4304)])
def test_gelu(op: object, shape: tuple[int, int], approximate: str, dtype: torch.dtype, platform: Platform) -> None:
    x = torch.randn(shape, dtype=dtype, device=platform.device) * 4
    y = op.gelu(x, approximate).values()  # type: ignore[attr-defined]
    u = x.double()
    by_hand = 0.5 * u * (1 + torch.erf(u / 2**0.5))
    if approximate == "tanh":
        by_hand = 0.5 * u * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)))
    assert y.dtype == dtype
    if y.numel():
        assert relative_error(y, by_hand) < bound(dtype)


@dtypes
@over("heads, dim", [(1, 8), (3, 72), (2, 36), (2, 128)])
@over("lengths", [[1], [4, 130, 0, 9], [1] * 150])
def test_segment_attention(
    op: object, lengths: list[int], heads: int, dim: int, dtype: torch.dtype, platform: Platform
) -> None:
    """Lengths of zero too."""
    qkv = torch.randn(sum(lengths), 3, heads, dim, dtype=dtype, device=platform.device) * 2
    starts = torch.tensor([0, *lengths], device=platform.device).cumsum(0).int()
    y = op.segment_attention(*qkv.unbind(1), ops.Segments(lengths, starts))  # type: ignore[attr-defined]
    expected = []
    for part in qkv.double().split(lengths):
        q, k, v = part.unbind(1)
        weights = (torch.einsum("qhd,khd->hqk", q, k) / dim**0.5).softmax(-1)
        expected.append(torch.einsum("hqk,khd->qhd", weights, v))
    assert y.dtype == dtype
    assert relative_error(y, torch.cat(expected)) < 2 * bound(dtype)


@dtypes
@over("dim, rotated", [(2, 2), (16, 16), (16, 8), (72, 72)])
@over("interleaved", [False, True])
def test_rotate(op: object, dim: int, rotated: int, interleaved: bool, dtype: torch.dtype, platform: Platform) -> None:
    x = torch.randn(6, 5, dim, dtype=dtype, device=platform.device)[:, 1:4]
    angles = torch.rand(50, rotated // 2, dtype=torch.float64, device=platform.device) * 7
    positions = torch.tensor([0, 49, 3, 3, 17, 4], device=platform.device)
    y = op.rotate(x, torch.cat([angles.cos(), angles.sin()], 1).float(), positions, interleaved)  # type: ignore[attr-defined]
    # As complex numbers: dimension i of the first half with dimension i of the second, or neighbours.
    axis = -1 if interleaved else -2
    pairs = x[..., :rotated].double().unflatten(-1, (-1, 2) if interleaved else (2, -1))
    turned = torch.complex(*pairs.unbind(axis)) * torch.polar(torch.ones_like(angles), angles)[positions].unsqueeze(1)
    assert y.dtype == dtype
    assert torch.equal(y[..., rotated:], x[..., rotated:])
    assert relative_error(y[..., :rotated], torch.stack([turned.real, turned.imag], axis).flatten(-2)) < bound(dtype)
