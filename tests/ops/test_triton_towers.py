"""The Triton kernels of vision towers against the ops' references: on the GPU where there is one, else interpreted."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error
from ops.cases import combined, over
from ops.interpreter import HAS_GPU
from ops.test_triton import DEVICE, Reads, fp8_dtypes, values

from octavo.ops import reference
from octavo.ops.contract import Norm, PackedWeight, Quantized, Segments
from octavo.ops.triton import elementwise, rotate, segment_attention

pytestmark = pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")  # numpy's, of infinities that the kernels mask


@fp8_dtypes
@over("size", [1, 33, 100, 1152])
@over("both", [False, True])
def test_layer_norm_and_gelu_that_quantize(size: int, both: bool, fp8: torch.dtype) -> None:
    x, residual, weight, bias = (torch.randn(n, size, device=DEVICE).bfloat16() for n in (5, 5, 1, 1))
    readers: list[PackedWeight | None] = [Reads(fp8, size + -size % 16), *[None] * both]
    norm = Norm(weight[0], 1e-5, bias[0])
    made, carried = elementwise.layer_norm(x, norm, residual, readers)
    (dense, total), mapped = reference.layer_norm(x, norm, residual), elementwise.gelu(x * 3, "tanh", readers)
    assert torch.equal(carried, total)
    for found, expected in ((made, dense.values()), (mapped, reference.gelu(x * 3, "tanh").values())):
        assert isinstance(found.quantized, Quantized)
        assert not found.quantized.codes[:, size:].float().any()
        assert relative_error(values(found.quantized)[:, :size], expected) < 0.04
        assert both == (found.dense is not None)
        if found.dense is not None:
            torch.testing.assert_close(found.dense, expected, rtol=1e-2, atol=1e-2)


SEGMENTS = [[1], [4, 130, 0, 9], [1] * 150]
WIDTHS = [(1, 8), (3, 72), (2, 36), (2, 64), (1, 128)]  # heads, dimension
# Interpreted, each width once and segments of each kind.
SCENES = (
    combined(WIDTHS, SEGMENTS) if HAS_GPU else [(width, SEGMENTS[i]) for width, i in zip(WIDTHS, (0, 1, 2, 1, 0), strict=True)]
)


@over("width, lengths", SCENES)
def test_segment_attention(width: tuple[int, int], lengths: list[int]) -> None:
    """What is behind the last segment, as in a graph, spoils nothing."""
    heads, dim = width
    qkv = torch.randn(sum(lengths) + 3, 3, heads, dim, device=DEVICE).bfloat16() * 2
    starts = torch.tensor([0, *lengths, 3], device=DEVICE).cumsum(0).int()
    found = segment_attention.segment_attention(*qkv.unbind(1), Segments([*lengths, 3], starts))
    inside = Segments(lengths, starts[:-1])
    expected = reference.segment_attention(*qkv[:-3].float().unbind(1), inside)
    assert relative_error(found[:-3], expected) < 5e-3
    if segment_attention.captures_segments(qkv.dtype, dim):
        qkv[-3:] = 1e30
        again = segment_attention.segment_attention(*qkv.unbind(1), Segments(None, starts))
        assert torch.equal(again[:-3], found[:-3])


@over("dim, rotated", [(16, 16), (16, 8), (72, 72)])
@over("interleaved", [False, True])
@over("tokens, heads", [(0, 3), (1, 1), (5, 40)])
def test_rotate(tokens: int, heads: int, dim: int, rotated: int, interleaved: bool) -> None:
    x = torch.randn(tokens, 3, heads, dim, device=DEVICE).bfloat16()[:, 1]
    cos_sin, rows = torch.randn(20, rotated, device=DEVICE), torch.randint(0, 20, (tokens,), device=DEVICE)
    found = rotate.rotate(x, cos_sin, rows, interleaved)
    torch.testing.assert_close(found, reference.rotate(x, cos_sin, rows, interleaved), rtol=1e-2, atol=1e-2)
    assert torch.equal(found[..., rotated:], x[..., rotated:])
