"""Padding, stacking, agreeing on scales between ranks, and what a weight takes as stored."""

from __future__ import annotations

import pytest
import torch
from cases import cases

from octavo.quant import BF16, FP8_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, QTensor, Scheme, concat, dequantize, quantize
from octavo.quant.qtensor import weight_amax

SCHEMES = [FP8_PER_TENSOR, FP8_PER_CHANNEL, FP8_BLOCK]
schemes = cases("scheme", SCHEMES, ids=lambda s: s.name)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@schemes
@cases("shape", [(1, 1), (16, 32), (17, 32), (16, 33), (538, 130), (130, 538)], ids=str)
@cases("fp8_dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz], ids=str)
def test_padding_is_invisible(scheme: Scheme, shape: tuple[int, int], fp8_dtype: torch.dtype, seed: int) -> None:
    q = quantize(torch.randn(shape), scheme, fp8_dtype)
    padded = q.padded(16)
    assert padded.shape == shape
    assert padded.data.dtype == fp8_dtype
    assert all(size % 16 == 0 and 0 <= size - n < 16 for size, n in zip(padded.data.shape, shape, strict=True))
    assert torch.equal(dequantize(padded), dequantize(q))
    outside = padded.data.view(torch.uint8).clone()
    outside[: shape[0], : shape[1]] = 0
    assert not outside.any()


@schemes
@cases("shape", [(1, 1), (1, 300), (16, 32), (130, 130), (538, 300), (256, 128)], ids=str)
@cases("fp8_dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz], ids=str)
def test_rows_are_those_of_the_dequantized_weight(
    scheme: Scheme, shape: tuple[int, int], fp8_dtype: torch.dtype, seed: int
) -> None:
    q = quantize(torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None], scheme, fp8_dtype)
    ids = torch.randint(shape[0], (40,))
    for stored in (q, q.padded(16)):
        for dtype in (torch.bfloat16, torch.float32):
            for chosen in (ids, ids.int(), ids[:0]):
                out = stored.rows(chosen, dtype)
                assert (out.dtype, out.is_contiguous()) == (dtype, True)
                assert torch.equal(out, dequantize(q)[chosen.long()].to(dtype))


def test_rows_of_a_dense_weight(seed: int) -> None:
    w = torch.randn(17, 33)
    assert torch.equal(
        QTensor(w, None, BF16, (17, 33)).rows(torch.tensor([3, 16, 3]), torch.bfloat16), w[[3, 16, 3]].bfloat16()
    )


def test_a_dense_weight_is_not_padded() -> None:
    q = QTensor(torch.randn(17, 33), None, BF16, (17, 33))
    assert q.padded(16) is q


@schemes
@cases("heights", [(128, 256, 64), (130, 7, 128), (1, 1, 1), (64, 64), (200,), (1, 127, 130), (64, 128)], ids=str)
@cases("k", [100, 300])
def test_a_stack_keeps_every_matrix(scheme: Scheme, heights: tuple[int, ...], k: int, seed: int) -> None:
    parts = [quantize(torch.randn(n, k) * 10**i, scheme) for i, n in enumerate(heights)]
    stack = concat(parts)
    assert stack.shape == (sum(heights), k)
    assert stack.scheme is scheme
    assert same_bytes(stack.data, torch.cat([p.data.view(torch.uint8) for p in parts]))
    assert torch.equal(dequantize(stack), torch.cat([dequantize(p) for p in parts]))
    assert torch.equal(dequantize(stack.padded(16)), dequantize(stack))


def test_matrices_of_different_schemes_are_stacked_dense(seed: int) -> None:
    for second in (BF16, FP8_PER_TENSOR, FP8_BLOCK):
        parts = [quantize(torch.randn(20, 40), FP8_PER_CHANNEL), quantize(torch.randn(30, 40).bfloat16(), second)]
        stack = concat(parts)
        assert (stack.scheme, stack.scale, stack.shape) == (BF16, None, (50, 40))
        assert torch.equal(stack.data, torch.cat([dequantize(part).bfloat16() for part in parts]))


@pytest.mark.parametrize(("scheme", "dim"), [(FP8_PER_TENSOR, 0), (FP8_PER_TENSOR, 1), (FP8_PER_CHANNEL, 1)], ids=str)
def test_ranks_that_agree_on_the_amax_hold_the_bytes_of_one(scheme: Scheme, dim: int, seed: int) -> None:
    w = torch.randn(70, 90)
    w[3, 80] = 40.0  # in the second half of either dimension's split, but for rows
    halves = w.chunk(2, dim)
    agreed = torch.maximum(*(weight_amax(half, scheme.weight) for half in halves))
    ranks = [quantize(half, scheme, max_reduce=lambda peak: agreed) for half in halves]
    whole = quantize(w, scheme)
    assert same_bytes(torch.cat([rank.data.view(torch.uint8) for rank in ranks], dim), whole.data)
    assert torch.equal(torch.cat([dequantize(rank) for rank in ranks], dim), dequantize(whole))
    alone = [quantize(half, scheme) for half in halves]
    assert not same_bytes(torch.cat([rank.data.view(torch.uint8) for rank in alone], dim), whole.data)


@schemes
def test_fp8_takes_half_of_bf16(scheme: Scheme, seed: int) -> None:
    n, k = 512, 1024
    w = torch.randn(n, k).bfloat16()
    q = quantize(w, scheme)
    scales = 4 * (n if scheme is not FP8_BLOCK else n // 128 * (k // 128))
    assert q.nbytes == w.nbytes / 2 + scales
    assert q.nbytes < 0.503 * w.nbytes
    assert quantize(w, BF16).nbytes == w.nbytes


def test_bf16_is_the_weight_itself(seed: int) -> None:
    w = torch.randn(5, 7).bfloat16()
    q = quantize(w, BF16)
    assert q.data is w
    assert dequantize(q) is w
