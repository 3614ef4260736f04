"""Which implementation of `linear` takes which weights: by dtype and granularity, with a reason for all others."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error
from ops.cases import over

pytest.importorskip("triton", reason="needs Triton")

from octavo import ops
from octavo.errors import OctavoError
from octavo.ops import cpu, gpu
from octavo.ops.contract import LinearImplementation
from octavo.ops.cpu import library
from octavo.ops.cpu.linear import Widened
from octavo.ops.cpu.native import Native
from octavo.ops.reference import ReferenceLinear, quantize_activation
from octavo.platform import Platform
from octavo.quant import (
    BF16,
    FP8_BLOCK,
    FP8_PER_CHANNEL,
    FP8_PER_TENSOR,
    FP8_W8A16,
    INT4,
    SCHEMES,
    QTensor,
    Scheme,
    dequantize,
    quantize,
)
from octavo.quant.scheme import Granularity, WeightDType

CPU = torch.device("cpu")
GPU, NATIVE = Platform(CPU, "test"), Platform(CPU, "test")
FNUZ = Platform(CPU, "test", fp8_dtype=torch.float8_e4m3fnuz)
WIDENING = Platform(CPU, "test", widened_dtype=torch.float32)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SHAPES = [(32, 64), (1, 300), (260, 48), (48, 260), (16, 16)]  # [N, K]; with one row, a channel's scale and a tile's look alike
UNSCALED = Scheme("fp8 of tiles, unscaled activations", WeightDType.FP8, Granularity.BLOCK, None)
MIXED = Scheme("fp8 of tiles, a scale a token", WeightDType.FP8, Granularity.BLOCK, Granularity.ROW)
KINDS = [*SCHEMES.values(), INT4, UNSCALED, MIXED]

# Each implementation, where it runs, and the schemes that it takes of codes in e4m3fn, and in e5m2.
ROWS, ALL = {FP8_PER_TENSOR, FP8_PER_CHANNEL}, set(SCHEMES.values())
PACKED_TOO = {*ALL, INT4}
TABLE: list[tuple[LinearImplementation, Platform, set[Scheme], set[Scheme]]] = [
    (gpu.ScaledMM(), GPU, ROWS, set()),
    (gpu.ScaledMM(), FNUZ, set(), set()),  # whose units do not multiply e4m3fn
    (gpu.Blocks(), GPU, {FP8_BLOCK}, set()),
    (gpu.Blocks(), FNUZ, set(), set()),
    (gpu.WeightOnly(), GPU, {FP8_W8A16}, set()),
    (gpu.WeightOnly(), FNUZ, set(), set()),
    (gpu.Dense(), GPU, {BF16}, {BF16}),
    (gpu.Int4(), GPU, {INT4}, {INT4}),
    (gpu.Int4(), FNUZ, {INT4}, {INT4}),
    (Widened(), WIDENING, PACKED_TOO, PACKED_TOO),
    (Widened(), NATIVE, set(), set()),
    (ReferenceLinear(), GPU, PACKED_TOO, PACKED_TOO),
]
if library.missing() is None:
    TABLE.append((Native(), NATIVE, PACKED_TOO, PACKED_TOO))
    TABLE.append((Native(), WIDENING, set(), set()))


def weight(scheme: Scheme, shape: tuple[int, int], fp8: torch.dtype = E4M3) -> QTensor:
    """A random one, as the loader hands it on."""
    n, k = shape
    if scheme is INT4:
        codes = torch.randint(0, 256, (n, -(-k // 8) * 4), dtype=torch.uint8)
        return QTensor(codes, torch.rand(n, -(-k // INT4.group)).bfloat16(), INT4, shape)
    known = scheme if scheme in ALL else FP8_BLOCK if scheme in (MIXED, UNSCALED) else FP8_PER_CHANNEL
    q = quantize(torch.randn(n, k).bfloat16() if scheme is BF16 else torch.randn(n, k), known, fp8)
    return QTensor(q.data, q.scale, scheme, shape).padded(GPU.fp8_alignment)


@over("fp8", [E4M3, E5M2])
@over("shape", SHAPES)
@over("row", TABLE)
def test_who_takes_what(
    row: tuple[LinearImplementation, Platform, set[Scheme], set[Scheme]], shape: tuple[int, int], fp8: torch.dtype
) -> None:
    """Those and no others; what is taken can be multiplied by, what is not has a reason that says what was wrong."""
    implementation, on, *taken = row
    expected = {scheme.name for scheme in taken[fp8 is E5M2]}
    found = {scheme.name: implementation.supports(weight(scheme, shape, fp8), on) for scheme in KINDS}
    assert {name for name, reason in found.items() if reason is None} == expected
    assert all(reason is None or len(reason) > 10 for reason in found.values())
    if on is not FNUZ and expected and INT4 not in taken[0]:
        assert "int4 with a scale a group of 32" in str(found["int4"])
    for scheme in taken[fp8 is E5M2]:
        q = weight(scheme, shape, fp8)
        x = torch.randn(40, shape[1]).bfloat16()
        given = x.float()
        if scheme.activation is not None:
            codes, scale = quantize_activation(x, scheme.activation, q.data.dtype)
            given = codes.float() * (scale.repeat_interleave(128, 1)[:, : shape[1]] if scheme is FP8_BLOCK else scale)
        if not (
            isinstance(implementation, gpu.Blocks | gpu.ScaledMM | gpu.WeightOnly | gpu.Int4) and torch.cuda.is_available()
        ):
            assert (
                relative_error(implementation.pack(q, on)(x), given.double() @ dequantize(q).double().mT) < 1e-2
            )  # sums and results in BF16


def test_sides_that_are_not_padded() -> None:
    q = quantize(torch.randn(30, 64), FP8_PER_CHANNEL)
    assert "multiples of 16" in str(gpu.ScaledMM().supports(q, GPU))
    assert gpu.ScaledMM().supports(q.padded(16), GPU) is None


def test_codes_that_are_no_codes() -> None:
    """A scheme and a dtype that contradict each other are nobody's."""
    for q in (
        QTensor(torch.randn(16, 16), torch.ones(16, 1), FP8_PER_CHANNEL, (16, 16)),
        QTensor(torch.zeros(16, 16, dtype=torch.int8), torch.ones(16, 1), FP8_PER_CHANNEL, (16, 16)),
    ):
        assert all(implementation.supports(q, on) is not None for implementation, on, *_ in TABLE)


@over("scheme", [UNSCALED])
@over("preferred", [cpu.LINEAR, gpu.LINEAR])
def test_what_nobody_takes_is_refused_with_all_reasons(
    scheme: Scheme, preferred: list[LinearImplementation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_linear", [*preferred, ReferenceLinear()])
    with pytest.raises(OctavoError, match="no product here takes a weight of") as refused:
        ops.pack(weight(scheme, (32, 64)), NATIVE)
    for implementation in ops.implementations():
        assert f"not {implementation.name}: " in str(refused.value)


def test_a_scheme_that_contradicts_itself() -> None:
    for args in ((WeightDType.FP8,), (WeightDType.BF16, Granularity.ROW), (WeightDType.INT4, Granularity.GROUP)):
        with pytest.raises(ValueError, match="scale"):
            Scheme("wrong", *args)
    with pytest.raises(ValueError, match="group"):
        Scheme("wrong", WeightDType.FP8, Granularity.ROW, None, 32)


def test_int4_is_neither_offered_nor_made_nor_unpacked_by_accident() -> None:
    assert INT4.quantized
    assert INT4 not in SCHEMES.values()
    with pytest.raises(OctavoError, match="int4"):
        quantize(torch.randn(4, 64), INT4)
    q = weight(INT4, (4, 64))
    assert q.padded(16) is q  # zero bytes would be codes of -8
    with pytest.raises(OctavoError, match="int4"):
        q.rows(torch.tensor([1]), torch.float32)
