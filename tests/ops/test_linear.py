"""Every implementation of `linear` against float64 arithmetic of the same scheme."""

from __future__ import annotations

import torch
from conftest import relative_error
from ops.cases import over
from ops.shapes import LINEAR
from quant import float64
from quant.float64 import E4M3FN, E4M3FNUZ, Array, Format, array

from octavo import ops
from octavo.platform import Platform, detect
from octavo.quant import BF16, FP8_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, FP8_W8A16, SCHEMES, QTensor, Scheme, concat, quantize

QUANTIZED = [FP8_PER_TENSOR, FP8_PER_CHANNEL, FP8_BLOCK, FP8_W8A16]
CPU = torch.device("cpu")
PLATFORMS = {"here": detect()} | {
    f"{fmt.dtype} in {held}": Platform(CPU, "test", fp8_dtype=fmt.dtype, widened_dtype=held)
    for fmt in (E4M3FN, E4M3FNUZ)
    for held in (torch.float32, torch.bfloat16)
}
CASES = [("here", torch.bfloat16), *((name, torch.float32) for name in PLATFORMS)]  # a platform and x's dtype
FORMATS = {fmt.dtype: fmt for fmt in (E4M3FN, E4M3FNUZ)}


def implementations(q: QTensor, platform: Platform) -> dict[str, ops.PackedWeight]:
    """q laid out by each implementation that takes it here."""
    ops.bind(platform)
    padded = q.padded(platform.fp8_alignment)
    return {i.name: i.pack(padded, platform) for i in ops.implementations() if i.supports(padded, platform) is None}


def bound(platform: Platform, name: str, *dtypes: torch.dtype) -> float:
    """FP32 sums are good to 1e-6; a BF16 result is rounded by up to 2^-9, and once more where a BF16 product comes first."""
    if (name != "reference" and platform.widened_dtype is torch.bfloat16) or not platform.is_cpu:
        dtypes = (*dtypes, torch.bfloat16)
    return 4e-3 if torch.bfloat16 in dtypes else 2e-6


def check(q: QTensor, x: torch.Tensor, expected: Array, platform: Platform) -> None:
    packed = implementations(q, platform)
    assert "reference" in packed
    for name, weight in packed.items():
        y = ops.linear(x.to(platform.device), weight)
        assert y.dtype == x.dtype, name
        assert y.shape == expected.shape, name
        if y.numel():
            error = relative_error(y, torch.from_numpy(expected))
            assert error < bound(platform, name, x.dtype, *([q.data.dtype] if q.scale is None else [])), (name, error)


def activations(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Tokens of sizes far apart, one of them zero, with outliers."""
    x = torch.randn(m, k) * torch.logspace(-3, 3, max(m, 1))[:m, None]
    x[torch.rand(m, k) < 0.01] *= 30
    if m > 2:
        x[m // 2] = 0
    return x.to(dtype)


@over("scheme", QUANTIZED)
@over("platform, dtype", CASES)
@over("shape", LINEAR)
def test_quantized(shape: tuple[int, int, int], platform: str, scheme: Scheme, dtype: torch.dtype) -> None:
    m, n, k = shape
    on = PLATFORMS[platform]
    x, w = activations(m, k, dtype), torch.randn(n, k)
    expected = float64.linear(array(x), array(w), scheme.name, FORMATS[on.fp8_dtype])
    check(quantize(w.to(on.device), scheme, on.fp8_dtype), x, expected, on)


@over("platform, dtype", CASES[:2])
@over("shape", LINEAR)
def test_dense(shape: tuple[int, int, int], platform: str, dtype: torch.dtype) -> None:
    m, n, k = shape
    on = PLATFORMS[platform]
    x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    check(quantize(w.to(on.device), BF16), x, array(x) @ array(w).T, on)


@over("platform", PLATFORMS)
@over("scheme", QUANTIZED)
def test_a_stack_is_its_matrices(scheme: Scheme, platform: str) -> None:
    """Query, key and value in one product, each with its own scales, though tiles of 128 would straddle them."""
    on = PLATFORMS[platform]
    fmt = FORMATS[on.fp8_dtype]
    x, weights = torch.randn(7, 150), [torch.randn(n, 150) * 8**i for i, n in enumerate((130, 40, 70))]
    stack = concat([quantize(w.to(on.device), scheme, on.fp8_dtype) for w in weights])
    parts = [torch.from_numpy(float64.linear(array(x), array(w), scheme.name, fmt)) for w in weights]
    check(stack, x, torch.cat(parts, 1).numpy(), on)


@over("scheme", SCHEMES.values())
def test_bias_is_added_once_and_inputs_stay(scheme: Scheme) -> None:
    on = detect()
    x, w, b = (torch.randn(*size).to(on.device) for size in ((5, 64), (32, 64), (32,)))
    before = x.clone(), b.clone()
    for name, packed in implementations(quantize(w, scheme, on.fp8_dtype), on).items():
        plain = ops.linear(x, packed)
        again = ops.linear(x, packed, b)
        torch.testing.assert_close(again, plain + b, msg=name)  # a product may add it before it rounds
        assert torch.equal(x, before[0]), name
        assert torch.equal(b, before[1]), name


@over("scheme", QUANTIZED)
def test_a_token_does_not_depend_on_its_neighbours(scheme: Scheme) -> None:
    """Not even on one that is infinite or not a number."""
    on = detect()
    x = torch.randn(6, 200).to(on.device)
    spoiled = x.clone()
    spoiled[2, 7], spoiled[4, 1] = float("nan"), float("inf")
    good = [0, 1, 3, 5]
    for name, packed in implementations(quantize(torch.randn(48, 200).to(on.device), scheme, on.fp8_dtype), on).items():
        alone = torch.cat([ops.linear(x[i : i + 1], packed) for i in good])
        together = ops.linear(spoiled, packed)[good]
        assert relative_error(together, alone) < 1e-6, name


@over("scheme", SCHEMES.values())
def test_the_preferred_one_is_chosen_and_said(scheme: Scheme) -> None:
    on = PLATFORMS["here"]
    ops.bind(on)
    q = quantize(torch.randn(32, 64).to(on.device), scheme, on.fp8_dtype)
    refused = [i.name for i in ops.implementations() if i.supports(q, on) is not None]
    ops.pack(q, on)
    chosen, *reasons = ops.table()[f"linear[{scheme.name}]"].split("; ")
    assert chosen == next(i.name for i in ops.implementations() if i.name not in refused)
    assert all(reason.startswith("not ") for reason in reasons)


def test_names_hold_no_separator() -> None:
    """Of the table of ops, on any platform."""
    for platform in PLATFORMS.values():
        ops.bind(platform)
        assert not [one.name for one in ops.implementations() if ";" in one.name]


@over("fmt", [E4M3FN, E4M3FNUZ])
def test_activations_are_quantized_as_float64_does(fmt: Format) -> None:
    from octavo.ops.reference import quantize_activation

    x = activations(9, 300, torch.float32)
    x[3] = 1e-7  # under the floor of the scale
    for scheme in (FP8_PER_CHANNEL, FP8_BLOCK):
        group = float64.group_of(scheme.name, 300)
        codes, scales = float64.quantize(array(x), group, fmt, floor=1 / (448 * 512))
        got, got_scales = quantize_activation(x, scheme.activation, fmt.dtype)
        assert (float64.codes_of(got) == codes).all()
        assert (array(got_scales) == scales).all()
