"""A GPU's FP8 product, run on the CPU: torch has `_scaled_mm` there too, with the same rules of shape, stride and dtype."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error
from ops.cases import over
from ops.shapes import LINEAR
from quant import float64
from quant.float64 import E4M3FN, array

from octavo.ops import gpu
from octavo.ops.contract import Unscaled
from octavo.ops.gpu import ScaledMM
from octavo.ops.reference import scaled
from octavo.platform import Platform
from octavo.quant import BF16, FP8_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, FP8_W8A16, Scheme, quantize

PLATFORM = Platform(torch.device("cpu"), "test")


def rowwise() -> bool:
    """Older torch has no scales a row on the CPU."""
    codes, scales = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(codes, codes.mT, scale_a=scales, scale_b=scales.view(1, -1), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


@pytest.mark.skipif(not rowwise(), reason="needs a torch with a scale a row on the CPU")
@over("scheme", [FP8_PER_TENSOR, FP8_PER_CHANNEL])
@over("shape", [shape for shape in [*LINEAR, (65, 48, 64)] if shape[0]])
def test_padded_shapes_and_scales(shape: tuple[int, int, int], scheme: Scheme) -> None:
    """As close as BF16 where no code depends on a division's last bit, which moves some of other values' codes."""
    m, n, k = shape
    w, on_codes = torch.randn(n, k), (100 * torch.randn(m, k)).clamp(-448, 448).to(torch.float8_e4m3fn).bfloat16()
    on_codes[:, 0] = 448  # so that the scale of each token is a power of two
    q = quantize(w, scheme).padded(PLATFORM.fp8_alignment)
    packed = ScaledMM().pack(q, PLATFORM)
    for x, most in (((on_codes * 2.0 ** torch.randint(-9, 9, (m, 1))).bfloat16(), 4e-3), (torch.randn(m, k).bfloat16(), 1e-2)):
        expected = torch.from_numpy(float64.linear(array(x), array(w), scheme.name, E4M3FN))
        bias = torch.randn(n).bfloat16()
        for y, added in ((packed(x), 0), (scaled(packed.unscaled(x)), 0), (packed.biased(x, bias), bias.double())):
            assert y.shape == (m, n)
            assert relative_error(y, expected + added) < most


@pytest.mark.skipif(not rowwise(), reason="needs a torch with a scale a row on the CPU")
@over("shape", [(33, 48, 64), (70, 33, 130), (200, 20, 96), (200, 48, 64)])
def test_activations_as_they_are(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens than the kernel for few takes, and more than are multiplied at once."""
    monkeypatch.setattr(gpu, "TOKENS_AT_ONCE", 70)
    monkeypatch.setattr(gpu, "WIDENED_TOKENS", 150)
    monkeypatch.setattr(gpu, "WIDENED_CODES", 1000)
    m, n, k = shape
    w, x = torch.randn(n, k), torch.randn(m, k) * torch.logspace(-3, 3, m)[:, None]
    packed = gpu.WeightOnly().pack(quantize(w, FP8_W8A16).padded(PLATFORM.fp8_alignment), PLATFORM)
    expected = torch.from_numpy(float64.linear(array(x.bfloat16()), array(w), "fp8_w8a16", E4M3FN))
    for dtype in (torch.bfloat16, torch.float32):
        given = x.bfloat16().to(dtype)
        assert isinstance(packed.unscaled(given), Unscaled) == (m == 200 and n == 48 and dtype is torch.bfloat16)
        for y in (packed(given), scaled(packed.unscaled(given))):
            assert (y.shape, y.dtype) == ((m, n), dtype)
            assert relative_error(y, expected) < 5e-3  # two products in BF16, and their sum


def test_without_padding_the_library_refuses() -> None:
    """What the padding is for: the meta device has the GPU's checks."""
    codes, weight = (torch.empty(rows, 96, device="meta", dtype=torch.float8_e4m3fn) for rows in (3, 538))
    scales = torch.empty(3, 1, device="meta"), torch.empty(1, 538, device="meta")
    with pytest.raises((RuntimeError, ValueError), match="16"):
        torch._scaled_mm(codes, weight.mT, scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16)


@over("scheme", [BF16, FP8_BLOCK])
def test_what_it_does_not_take(scheme: Scheme) -> None:
    assert ScaledMM().supports(quantize(torch.randn(32, 32), scheme), PLATFORM)
