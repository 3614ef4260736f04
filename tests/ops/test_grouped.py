"""Triton's kernels of mixtures of experts against their references: on the GPU where there is one, else interpreted."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error
from ops.cases import over
from ops.interpreter import HAS_GPU
from ops.shapes import EXPERTS, ROUTINGS
from ops.test_experts import Shape, chosen, stack

from octavo import batch as batches
from octavo.ops import gpu, reference
from octavo.ops.contract import Activation, Dispatch, Routed, Router, Uncombined
from octavo.ops.triton import elementwise, experts, routing
from octavo.platform import Platform
from octavo.quant import FP8_BLOCK, FP8_PER_CHANNEL, SCHEMES, QTensor, Scheme, concat, quantize
from octavo.quant.qtensor import Stacker

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
ON = Platform(DEVICE, "sm_90" if HAS_GPU else "test")
pytestmark = pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
schemes = over("scheme", SCHEMES.values())

ROUTERS = {
    "softmax": Router(3),
    "as they are": Router(3, normalize=False),
    "groups": Router(4, sigmoid=True, groups=3, top_groups=2, scale=2.827),
    "groups of one": Router(3, sigmoid=True, groups=12, top_groups=3),
    "all": Router(12),
}


def decode_batch(tokens: int, padding: int = 0) -> batches.ForwardBatch:
    batch = batches.build([batches.Span([1], 4, [0, 1]) for _ in range(tokens)], 4, DEVICE)
    batch.seq_lens[tokens - padding :] = 0
    return batch


def check_route(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, router: Router, **config: int) -> None:
    batch = decode_batch(len(x), 1)
    found = routing.route(x, w, bias, router, batch, config)
    expected = reference.route(x, w, bias, router, batch)
    assert [t.dtype for t in found[:2]] == [torch.int32, torch.float32]
    assert torch.equal(found.experts, expected.experts)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-4, atol=1e-7)


@over("biased", [False, True])
@over("name", ROUTERS)
@over("dtype, split", [(torch.float32, 1), (torch.bfloat16, 4)])
def test_route(dtype: torch.dtype, name: str, biased: bool, split: int) -> None:
    """The last row pads; twice, since a launch leaves its counters as the next one needs them."""
    x, w = torch.randn(19, 70, device=DEVICE).to(dtype), (torch.randn(12, 70, device=DEVICE) / 8).to(dtype)
    bias = torch.randn(12, device=DEVICE) * 0.3 if biased else None
    for _ in range(2):
        check_route(x, w, bias, ROUTERS[name], split=split, BK=16)


@over("count, router", [
    (1, Router(1)), (130, Router(8)), (257, Router(8, sigmoid=True)), (512, Router(9, sigmoid=True, groups=8, top_groups=4)),
])  # fmt: skip
def test_routes_to_many_experts(count: int, router: Router) -> None:
    check_route(torch.randn(5, 48, device=DEVICE), torch.randn(count, 48, device=DEVICE) / 7, None, router)


@over("name", ROUTERS)
def test_scores_that_are_not_numbers(name: str) -> None:
    """They choose as the reference does, whose rows hold distinct experts."""
    x, w = torch.randn(5, 16, device=DEVICE), torch.randn(12, 16, device=DEVICE)
    x[1], x[3, 2], w[4, 2] = float("nan"), float("inf"), 0.5
    found, expected = (m.route(x, w, None, ROUTERS[name], decode_batch(5)) for m in (routing, reference))
    assert torch.equal(found.experts, expected.experts)
    assert found.weights[1].isnan().all()
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-4, atol=1e-7, equal_nan=True)


def test_equal_scores_and_what_says_that_rows_pad() -> None:
    x, w = torch.ones(4, 8, device=DEVICE), torch.ones(9, 8, device=DEVICE)
    prompt = batches.build([batches.Span([1] * 4, 0, [0])], 4, DEVICE)
    assert routing.route(x, w, None, Router(3), prompt).experts.tolist() == [[0, 1, 2]] * 4
    prompt.live = torch.tensor([3], dtype=torch.int32, device=DEVICE)
    found = routing.route(x, w, None, Router(3), prompt)
    assert found.experts.tolist() == [[0, 1, 2]] * 3 + [[-1] * 3]
    assert not found.weights[3].any()
    assert routing.route(x[:0], w, None, Router(3), decode_batch(0)).experts.shape == (0, 3)


def check_dispatch(to: torch.Tensor, count: int, at: Dispatch) -> None:
    """Within an expert any order is right."""
    expected = reference.dispatch(to, count)
    assert torch.equal(at.starts, expected.starts)
    assert torch.equal(at.order.sort().values, expected.order.sort().values)
    assert torch.equal(at.place[at.order.long()], torch.arange(to.numel(), dtype=torch.int32, device=DEVICE))
    assert torch.equal(to.flatten()[at.order.long()], to.flatten()[expected.order.long()])


@over("routing_of", ROUTINGS)
@over("shape", [*EXPERTS, (300, 8, 8, 20, 3)])
def test_dispatch(shape: Shape, routing_of: str) -> None:
    """In one launch, and in chunks."""
    tokens, _, _, count, top_k = shape
    to = chosen(routing_of, tokens, count, top_k).to(DEVICE)
    for chunk in (routing.CHUNK, 128):
        check_dispatch(to, count, routing.dispatch(to, count, chunk))


@over("dtype", [torch.float32, torch.bfloat16])
def test_combine(dtype: torch.dtype) -> None:
    """Rows of pairs that wake no expert are not read; of rows wider than what is summed, neither is the rest."""
    to, weights = chosen("some rows pad", 10, 7, 3).to(DEVICE), torch.rand(10, 3, device=DEVICE)
    to[0, 1] = -1
    at, wide = reference.dispatch(to, 7), torch.full((30, 100), torch.nan, dtype=dtype, device=DEVICE)
    wide[: int(at.starts[-1]), :90] = torch.randn(int(at.starts[-1]), 90, device=DEVICE).to(dtype)
    found, expected = (m.combine(wide[:, :90], Routed(to, weights), at) for m in (routing, reference))
    torch.testing.assert_close(found, expected, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)
    assert not found[5:].any()


@over("adds", [False, True])
def test_a_norm_of_what_it_combines(adds: bool) -> None:
    """As combine, then the norm, into codes and dense values; rows of pairs without an expert are not numbers."""
    to, weights = chosen("some rows pad", 10, 7, 3).to(DEVICE), torch.rand(10, 3, device=DEVICE)
    at, y = reference.dispatch(to, 7), torch.full((30, 96), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    y[: int(at.starts[-1])] = torch.randn(int(at.starts[-1]), 96, device=DEVICE).bfloat16()
    gain, residual = torch.randn(2, 11, 96, device=DEVICE).bfloat16().unbind()
    residual = residual[:10] if adds else None
    reads = gpu.PackedScaledMM(quantize(torch.randn(16, 96, device=DEVICE), FP8_PER_CHANNEL))
    routed = Routed(to, weights)
    found, carried = elementwise.combine_norm_quantize(Uncombined(y, routed, at), gain[0], 1e-6, residual, [reads, None])
    expected, sums = elementwise.rms_norm(routing.combine(y, routed, at), gain[0], 1e-6, residual, [reads, None])
    assert relative_error(carried, sums.double()) < 4e-3
    assert relative_error(found.values(), expected.values().double()) < 4e-3
    assert found.quantized is not None
    assert expected.quantized is not None
    assert relative_error(*(q.codes.double() * q.scale for q in (found.quantized, expected.quantized))) < 2e-2


def on_codes(rows: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Random values that codes stand for exactly, whichever way a product divides: a last bit would move a code by a tenth."""
    x = (100 * torch.randn(rows, k, device=DEVICE)).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    x[:, ::128] = 448  # of each group's values the largest, so that its scale is a power of 2
    return (x * 2.0 ** torch.randint(-9, 9, (rows, 1), device=DEVICE)).to(dtype)


def expected_product(q: QTensor, x: torch.Tensor, at: Dispatch, *, of_tokens: bool) -> torch.Tensor:
    return reference.ReferenceStack().pack(q, ON)(x, at, of_tokens=of_tokens)[: int(at.starts[-1])]


def check_product(q: QTensor, tokens: int, top_k: int, routing_of: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Of tokens' rows and of pairs' rows, which past the last expert's are not numbers, as the products there may be."""
    count, _, k = q.shape
    to = chosen(routing_of, tokens, count, top_k).to(DEVICE)
    at, weights = routing.dispatch(to, count), gpu.Grouped().pack(q, ON)
    x, by_pair = (on_codes(rows, k, dtype) for rows in (tokens, tokens * top_k))
    by_pair[int(at.starts[-1]) :] = torch.nan
    for of_tokens, rows in ((True, x), (False, by_pair)):
        y = weights(rows, at, of_tokens=of_tokens)
        assert (y.shape, y.dtype) == ((tokens * top_k, q.shape[1]), dtype)
        expected = expected_product(q, rows, at, of_tokens=of_tokens)
        bound = 4e-3 if q.scheme.quantized or dtype is torch.bfloat16 else 2e-6
        if len(expected):
            assert relative_error(y[: len(expected)], expected) < bound


@schemes
@over("shape", [s for s in EXPERTS if s[0] < 70])
def test_products(shape: Shape, scheme: Scheme) -> None:
    """Each shape with the next routing under the next scheme; all of them meet on a GPU, in test_experts.py."""
    tokens, hidden, inner, count, top_k = shape
    routing_of = ROUTINGS[(EXPERTS.index(shape) + list(SCHEMES).index(scheme.name)) % len(ROUTINGS)]
    q = stack(torch.randn(count, 2 * inner, hidden, device=DEVICE).bfloat16(), scheme, ON)
    check_product(q, tokens, top_k, routing_of)


@schemes
def test_products_of_fp32(scheme: Scheme) -> None:
    check_product(stack(torch.randn(5, 40, 72, device=DEVICE), scheme, ON), 9, 2, "random", torch.float32)


LARGE = {"BM": 64, "BN": 128, "table": 1, "tma": 1, "promote": 0, "stages": 3, "warps": 8}


@schemes
@over("routing_of", ["skewed", "none"])
def test_tiles_of_many_rows(scheme: Scheme, routing_of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tokens have them: tiles found beforehand, weights copied tile by tile; they straddle experts."""
    before = experts._shape
    monkeypatch.setattr(experts, "_shape", lambda *args: before(*args) | LARGE)
    q = stack(torch.randn(3, 272, 160, device=DEVICE).bfloat16(), scheme, ON)
    check_product(q, 100, 2, routing_of)


def test_a_row_of_scales_a_channel() -> None:
    """As two matrices have them, stacked, whose heights 128 does not divide."""
    made = Stacker(3)
    for e in range(3):
        made.put(e, concat([quantize(torch.randn(72, 300, device=DEVICE), FP8_BLOCK) for _ in range(2)]).padded(16))
    q = made.finished()
    assert q.scale is not None
    assert q.scale.shape == (3, 144, 3)
    check_product(q, 7, 2, "random")


def test_codes_are_made_once() -> None:
    """A stack takes what the op before it made; the product is the same."""
    q = stack(torch.randn(4, 32, 96, device=DEVICE).bfloat16(), FP8_PER_CHANNEL, ON)
    weights, to = gpu.Grouped().pack(q, ON), chosen("random", 6, 4, 2).to(DEVICE)
    at, x = reference.dispatch(to, 4), torch.randn(6, 192, device=DEVICE).bfloat16()
    made = elementwise.silu_mul(x, [weights])
    assert made.dense is None
    dense = elementwise.silu_mul(x).values()
    y, again = (weights(given, at, of_tokens=True) for given in (made, dense))
    assert relative_error(y, again) < 1e-2


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU, whose graphs hold launches")
@schemes
@over("tokens", [3, 300])
def test_in_a_graph(tokens: int, scheme: Scheme) -> None:
    """Captured with one routing, replayed with others."""
    from octavo import ops
    from octavo.platform import detect

    on = detect()
    ops.bind(on)
    gate_up, down = (
        ops.pack_experts(stack(torch.randn(12, *shape, device=DEVICE).bfloat16() / 10, scheme, on), on)
        for shape in ((96, 112), (112, 48))
    )
    w, x = torch.randn(12, 112, device=DEVICE).bfloat16() / 5, torch.randn(tokens, 112, device=DEVICE).bfloat16()
    batch = decode_batch(tokens)

    def whole() -> torch.Tensor:
        given = Activation(x)
        return ops.experts(given, ops.route(x, w, None, Router(4), batch), gate_up, down)

    whole()
    replay, out, _ = ops.capture(whole)
    for padding in (0, 2):
        x.normal_()
        batch.seq_lens[tokens - padding :] = 0
        expected = whole()
        out.fill_(torch.nan)
        replay()
        assert torch.equal(out, expected)
        assert not out[tokens - padding :].any()
