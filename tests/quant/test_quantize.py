"""Every scheme's codes and scales, against float64 arithmetic of the same scheme."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import cases
from quant import float64
from quant.float64 import E4M3FN, E4M3FNUZ, FORMATS, Format, array, codes_of

from octavo.quant import FP8_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, Scheme, dequantize, qtensor, quantize
from octavo.quant.qtensor import expand_scale

SCHEMES = [FP8_PER_TENSOR, FP8_PER_CHANNEL, FP8_BLOCK]
SHAPES = [(1, 1), (1, 300), (300, 1), (17, 33), (128, 128), (130, 257), (64, 538)]
WEIGHT_FORMATS = [E4M3FN, E4M3FNUZ]
schemes = cases("scheme", SCHEMES, ids=lambda s: s.name)
formats = cases("fmt", WEIGHT_FORMATS, ids=lambda f: str(f.dtype)[13:])


def weight(n: int, k: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> torch.Tensor:
    """Normal values with a few outliers, a row of zeros and, among the signs of zero, both."""
    w = torch.randn(n, k) * size
    w[torch.rand(n, k) < 0.01] *= 20
    w[n // 2] = 0.0 if n > 1 else w[n // 2]
    w[-1, -1] *= -0.0 if n * k > 1 else 1
    return w.to(dtype)


def assert_same(w: torch.Tensor, scheme: Scheme, fmt: Format) -> None:
    n, k = w.shape
    tile = float64.tile_of(scheme.name, n, k)
    codes, scales = float64.quantize(array(w), tile, fmt)
    q = quantize(w, scheme, fmt.dtype)
    assert q.scale is not None
    assert q.scale.dtype == torch.float32
    assert q.shape == (n, k)
    assert q.scale.shape == ((n, 1) if scheme is not FP8_BLOCK else scales.shape)
    np.testing.assert_array_equal(array(q.scale), np.broadcast_to(scales, q.scale.shape))
    np.testing.assert_array_equal(codes_of(q.data), codes)
    # Products of a code and a scale are rounded once, to FP32.
    expected = float64.dequantize(codes, scales, tile, fmt).astype(np.float32)
    np.testing.assert_array_equal(dequantize(q).numpy(), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_the_oracle_reads_codes_as_torch_does(name: str) -> None:
    fmt = FORMATS[name]
    values = torch.arange(256, dtype=torch.uint8).view(fmt.dtype).double().numpy()
    np.testing.assert_array_equal(np.where(np.isfinite(values), values, np.nan), fmt.values)


@formats
@schemes
@cases("dtype", [torch.float32, torch.bfloat16])
@cases("shape", SHAPES, ids=str)
def test_codes_and_scales_equal_float64(
    shape: tuple[int, int], dtype: torch.dtype, scheme: Scheme, fmt: Format, seed: int
) -> None:
    assert_same(weight(*shape, dtype), scheme, fmt)


@formats
@schemes
@cases("size", [1e30, 1e-30, 1e-37])
def test_huge_and_tiny_weights(size: float, scheme: Scheme, fmt: Format, seed: int) -> None:
    assert_same(weight(40, 150, size=size), scheme, fmt)


@schemes
@formats
def test_weights_too_small_for_a_scale_stay_numbers(scheme: Scheme, fmt: Format) -> None:
    """Or, where the scale is FP32's smallest number and still too small for them, the largest codes."""
    for size in (1e-43, 4e-43, 8e-43):
        w = torch.full((3, 5), size)
        w[0, 0] = 0.0
        q = quantize(w, scheme, fmt.dtype)
        assert torch.isfinite(q.data.float()).all()
        assert dequantize(q).abs().max() <= 1.1 * w.max()


@formats
def test_ties_go_to_the_even_code(fmt: Format) -> None:
    table = fmt.values[:0x7F]
    table = table[table <= fmt.limit]
    middle = torch.tensor((table[1:] + table[:-1]) / 2, dtype=torch.float32)
    w = torch.cat([middle, -middle, torch.tensor([fmt.limit])])[None]  # the last makes the scale 1
    codes = codes_of(quantize(w, FP8_PER_CHANNEL, fmt.dtype).data)[0]
    assert not (codes & 1)[:-1].any()
    np.testing.assert_array_equal(codes, fmt.nearest(array(w)[0]))


@formats
@schemes
def test_zeros_stay_zeros(scheme: Scheme, fmt: Format) -> None:
    q = quantize(torch.zeros(130, 140), scheme, fmt.dtype)
    assert torch.equal(dequantize(q), torch.zeros(130, 140))
    assert q.scale is not None
    assert (q.scale > 0).all()


@schemes
@cases("chunk", [1, 128 * 300, 200 * 300])
def test_converting_in_chunks_changes_nothing(scheme: Scheme, chunk: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight(410, 300)
    whole = quantize(w, scheme)
    monkeypatch.setattr(qtensor, "CHUNK", chunk)
    parts = quantize(w, scheme)
    np.testing.assert_array_equal(codes_of(parts.data), codes_of(whole.data))
    assert torch.equal(dequantize(parts), dequantize(whole))


@schemes
def test_a_sliced_or_transposed_weight(scheme: Scheme, seed: int) -> None:
    assert_same(weight(70, 300)[3:60, 5:260], scheme, E4M3FN)
    assert_same(weight(300, 70).T, scheme, E4M3FN)


def test_a_smaller_group_loses_less(seed: int) -> None:
    """Rounding to nearest with 3 mantissa bits costs 2.6% of a normal weight, whatever the scale; outliers cost the rest."""
    w = torch.randn(512, 512)
    plain = [relative(w, scheme) for scheme in SCHEMES]
    assert all(0.024 < error < 0.029 for error in plain), plain
    w[::32] *= torch.logspace(0, -4, 16)[:, None]  # rows that one scale for all pushes into subnormal codes
    outlier = [float((dequantize(quantize(w, s)) - w)[::32].norm(dim=1).div(w[::32].norm(dim=1)).max()) for s in SCHEMES]
    assert outlier[1] < 0.03 < outlier[0]


def relative(w: torch.Tensor, scheme: Scheme) -> float:
    return float((dequantize(quantize(w, scheme)) - w).norm() / w.norm())


@schemes
def test_expanded_scale_multiplies_the_codes(scheme: Scheme, seed: int) -> None:
    q = quantize(weight(130, 257), scheme)
    assert q.scale is not None
    product = q.data.float() * expand_scale(q.scale, q.shape)
    assert torch.equal(product, dequantize(q))
