"""Schemes whose products of at most 32 tokens are of activations as they are: every implementation on both sides of that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import relative_error
from ops.cases import over
from ops.interpreter import HAS_GPU
from ops.test_experts import chosen, packed, stack
from ops.test_linear import FORMATS, PLATFORMS, activations, bound, implementations
from quant import float64
from quant.float64 import Array, array

from octavo import ops
from octavo.ops import Routed, gpu
from octavo.ops.contract import FEW_TOKENS, PackedStack, PackedWeight, codes_of, has_storage
from octavo.ops.hopper import layer_megakernel
from octavo.ops.triton import linear
from octavo.platform import Platform, detect
from octavo.quant import FP8_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, FP8_W8A16, Scheme, quantize

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
ON = Platform(DEVICE, "test")
BOTH = [FP8_PER_CHANNEL, FP8_PER_TENSOR]
AROUND = (1, FEW_TOKENS - 1, FEW_TOKENS, FEW_TOKENS + 1, 70)
pytestmark = pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")


def product(x: Array, w: Array, scheme: Scheme, on: Platform, tokens: int) -> Array:
    """In float64, of so many tokens in a step."""
    fmt, tile = FORMATS[on.fp8_dtype], float64.tile_of(scheme.name, *w.shape)
    read = x if tokens <= 32 else float64.quantized_activation(x, float64.group_of(scheme.name, w.shape[1]), fmt)
    return read @ float64.dequantize(*float64.quantize(w, tile, fmt), tile, fmt).T


@over("scheme", BOTH)
@over("platform", PLATFORMS)
@over("tokens", AROUND)
@over("size", [(64, 96), (130, 257)])
def test_products_beside_float64(size: tuple[int, int], tokens: int, platform: str, scheme: Scheme) -> None:
    """Rounded activations are ten times as far from it as these bounds."""
    on = PLATFORMS[platform]
    w, x = torch.randn(size), activations(tokens, size[1], torch.bfloat16)
    expected = torch.from_numpy(product(array(x), array(w), scheme, on, tokens))
    found = implementations(quantize(w.to(on.device), scheme.with_exact_few, on.fp8_dtype), on)
    assert "reference" in found
    bias = torch.randn(size[0]).bfloat16()
    for name, weight in found.items():
        given = x.to(on.device)
        for y, want in (
            (ops.linear(given, weight), expected),
            (ops.linear(given, weight, bias.to(on.device)), expected + bias),
        ):
            assert relative_error(y, want) < 1.5 * bound(on, name, torch.bfloat16), name
        both = implementations(quantize(w.to(on.device), FP8_W8A16 if tokens <= 32 else scheme, on.fp8_dtype), on)
        if scheme is FP8_PER_CHANNEL and name in both:
            assert torch.equal(ops.linear(given, weight), ops.linear(given, both[name])), name


@over("scheme", BOTH)
@over("platform", PLATFORMS)
@over("tokens", (31, 32, 33))
def test_experts_by_the_tokens_of_a_step(tokens: int, platform: str, scheme: Scheme) -> None:
    """Of which each is three rows of a product, in any number of experts."""
    on, (experts, n, k) = PLATFORMS[platform], (5, 48, 96)
    w, x = torch.randn(experts, n, k).bfloat16(), torch.randn(tokens, k).bfloat16()
    of_all = np.stack([product(array(x), array(one), scheme, on, tokens) for one in w], 1)
    found = packed(stack(w, scheme.with_exact_few, on), on)
    assert "reference" in found
    to = chosen("skewed", tokens, experts, 3).to(on.device)
    at = ops.dispatch(to, experts)
    order = at.order.cpu().long()
    expected = torch.from_numpy(of_all[order // 3, to.cpu().flatten()[order].long()])
    by_pair = x[order // 3]
    for name, weights in found.items():
        own = weights.at(tokens)
        for y in (own(x.to(on.device), at, of_tokens=True), own(by_pair.to(on.device), at, of_tokens=False)):
            assert relative_error(y, expected) < max(1.5 * bound(on, name, torch.bfloat16), 5e-3), name


@over("tokens", (32, 33))
def test_a_mixture_is_that_of_either_scheme(tokens: int) -> None:
    on = detect()
    ops.bind(on)
    gate_up, down = torch.randn(6, 96, 64).bfloat16() / 8, torch.randn(6, 64, 48).bfloat16() / 7
    x, routed = torch.randn(tokens, 64, device=on.device).bfloat16(), chosen("random", tokens, 6, 2).to(on.device)
    to = Routed(routed, torch.rand(tokens, 2, device=on.device))

    def mixed(scheme: Scheme) -> torch.Tensor:
        return ops.experts(x, to, *(ops.pack_experts(stack(w, scheme, on), on) for w in (gate_up, down)))

    plain = FP8_W8A16 if tokens <= 32 else FP8_PER_CHANNEL
    assert torch.equal(mixed(FP8_PER_CHANNEL.with_exact_few), mixed(plain))
    assert not torch.equal(mixed(FP8_PER_CHANNEL.with_exact_few), mixed(FP8_PER_CHANNEL if tokens <= 32 else FP8_W8A16))


@over("tokens", (31, 32, 33))
def test_ops_before_make_what_the_product_reads(tokens: int) -> None:
    """Values of few tokens and codes of more, for a weight and for experts; what they make is what is multiplied."""
    q = quantize(torch.randn(48, 96, device=DEVICE), FP8_PER_CHANNEL.with_exact_few).padded(16)
    weight, plain = gpu.ExactFew().pack(q, ON), gpu.ScaledMM().pack(replace(q, scheme=FP8_PER_CHANNEL), ON)
    experts = gpu.Grouped().pack(stack(torch.randn(2, 48, 96), FP8_PER_CHANNEL.with_exact_few, ON), ON)
    x, gain = torch.randn(tokens, 192, device=DEVICE).bfloat16(), torch.randn(96, device=DEVICE).bfloat16()
    for reader in (weight, experts):
        for made in (gpu.silu_mul(x, (reader,)), gpu.rms_norm(x[:, :96], gain, 1e-5, None, (reader,))[0]):
            assert (made.dense is None) == (made.quantized is not None) == (tokens > 32)
            assert (codes_of(made, plain.reads) is not None) == (tokens > 32)
        assert gpu.silu_mul(x, (reader, None)).dense is not None
    assert isinstance(weight.at(tokens), gpu.PackedWeightOnly if tokens <= 32 else gpu.PackedScaledMM)


def storage(held: Any, seen: set[int]) -> int:
    """Bytes of all tensors that a packed weight holds, each memory once."""
    total = 0
    for value in vars(held).values():
        if isinstance(value, PackedWeight | PackedStack):
            total += storage(value, seen)
        if isinstance(value, torch.Tensor) and has_storage(value) and value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            total += value.nbytes
    return total


@over("platform", ["here", "test"])
def test_it_takes_the_memory_of_one_weight(platform: str) -> None:
    on = detect() if platform == "here" else ON
    q = quantize(torch.randn(64, 96).to(on.device), FP8_PER_CHANNEL.with_exact_few).padded(16)
    experts, plain = stack(torch.randn(2, 64, 96), FP8_PER_CHANNEL.with_exact_few, on), FP8_PER_CHANNEL
    ops.bind(on)
    pairs: list[tuple[Any, Any]] = [
        (ops.pack(q, on), ops.pack(replace(q, scheme=plain), on)),
        (ops.pack_experts(experts, on), ops.pack_experts(replace(experts, scheme=plain), on)),
    ]
    if platform == "test":
        pairs = [
            (gpu.ExactFew().pack(q, on), gpu.ScaledMM().pack(replace(q, scheme=plain), on)),
            (gpu.Grouped().pack(experts, on), gpu.Grouped().pack(replace(experts, scheme=plain), on)),
        ]
    for found, other in pairs:
        assert found.held_bytes == other.held_bytes
        assert storage(found, set()) == storage(other, set())
    found, other = pairs[0]
    ids = torch.tensor([3, 0], device=on.device)
    for weight in (found, other):
        weight.keep(q)
        torch.testing.assert_close(weight.rows(ids, torch.float32), q.rows(ids, torch.float32))
    assert found.held_bytes == other.held_bytes


def test_the_boundary_is_that_of_the_kernels_for_few_tokens() -> None:
    assert FEW_TOKENS == linear.MAX_TOKENS == 32
    assert layer_megakernel.MAX_TOKENS <= FEW_TOKENS


def test_activations_with_other_scales_are_never_so() -> None:
    for scheme in (FP8_BLOCK, FP8_W8A16):
        with pytest.raises(ValueError, match="scale a token"):
            scheme.with_exact_few  # noqa: B018
