"""Mixtures of experts: every implementation against one product an expert in float64, over shapes and routings."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import relative_error
from ops.cases import combined, over
from ops.shapes import EXPERTS, ROUTINGS
from ops.test_linear import CASES, FORMATS, PLATFORMS, bound
from quant import float64
from quant.float64 import Array, array

from octavo import batch as batches
from octavo import ops
from octavo.batch import ForwardBatch, Span
from octavo.ops import Routed, Router, reference
from octavo.ops.cpu import STACKS
from octavo.ops.cpu.linear import Widened
from octavo.platform import Platform, detect
from octavo.quant import BF16, SCHEMES, QTensor, Scheme, quantize
from octavo.quant.qtensor import Stacker

Shape = tuple[int, int, int, int, int]


def chosen(routing: str, tokens: int, experts: int, count: int) -> torch.Tensor:
    """Distinct experts of each token, INT32 [T, count]."""
    likely = torch.rand(tokens, experts)
    if routing == "skewed":
        likely = likely * 4.0 ** -torch.arange(experts)
    found = likely.argsort(-1, descending=True)[:, :count].int()
    if routing == "one expert has all":
        found = torch.arange(count).expand(tokens, count).int().contiguous()
    if routing == "none":
        found.fill_(-1)
    if routing == "some rows pad":
        found[tokens // 2 :] = -1
    if routing == "other ranks have some":
        found[torch.rand(tokens, count) < 0.4] = -1
    return found


def stack(weights: torch.Tensor, scheme: Scheme, on: Platform) -> QTensor:
    """[E, N, K] quantized one by one, as loading does."""
    made = Stacker(len(weights))
    for e, w in enumerate(weights):
        made.put(e, quantize(w.to(on.device), scheme, on.fp8_dtype).padded(on.fp8_alignment))
    return made.finished()


def packed(q: QTensor, on: Platform) -> dict[str, ops.PackedStack]:
    ops.bind(on)
    return {i.name: i.pack(q, on) for i in ops.stack_implementations() if i.supports(q, on) is None}


def products(x: Array, w: Array, scheme: Scheme, on: Platform) -> Array:
    """Every row of x by every expert, in float64: [T, E, N]; one product, since threads take longer than a small one."""
    experts, n, k = w.shape
    if scheme.quantized:
        tile, fmt = float64.tile_of(scheme.name, n, k), FORMATS[on.fp8_dtype]
        w = np.stack([float64.dequantize(*float64.quantize(one, tile, fmt), tile, fmt) for one in w])
        if scheme.activation is not None:
            x = float64.quantized_activation(x, float64.group_of(scheme.name, k), fmt)
    return (x @ w.reshape(-1, k).T).reshape(-1, experts, n)


@over("scheme, where, shape", combined(SCHEMES.values(), CASES, EXPERTS))
def test_products(scheme: Scheme, where: tuple[str, torch.dtype], shape: Shape) -> None:
    """Of tokens' rows, and of pairs' rows in sorted order."""
    platform, dtype = where
    tokens, hidden, inner, experts, count = shape
    on = PLATFORMS[platform]
    w, x = torch.randn(experts, 2 * inner, hidden).to(dtype), torch.randn(tokens, hidden).to(dtype)
    q = stack(w, scheme, on)
    found = packed(q, on)
    assert "reference" in found
    of_all = torch.from_numpy(products(array(x), array(w), scheme, on))
    for routing in ROUTINGS:
        to = chosen(routing, tokens, experts, count).to(on.device)
        at = ops.dispatch(to, experts)
        awake = at.order[: at.starts[-1]].cpu().long()  # within an expert, any order is right
        expected = of_all[awake // count, to.cpu().flatten()[awake].long()]
        by_pair = x[at.order.cpu().long() // count]
        for name, weights in found.items():
            of_tokens = weights(x.to(on.device), at, of_tokens=True)
            of_pairs = weights(by_pair.to(on.device), at, of_tokens=False)
            for y in (of_tokens, of_pairs):
                assert y.shape == (tokens * count, 2 * inner), name
                assert y.dtype == dtype, name
                if len(expected):
                    error = relative_error(y[: len(expected)], expected)
                    dtypes = [q.data.dtype] if q.scale is None else []
                    most = bound(on, name, dtype, *dtypes)
                    if scheme.quantized and not on.is_cpu:  # a last bit of a division there may change an activation's code
                        most = 2e-2
                    assert error < most, (name, routing, error)


@over("scheme", SCHEMES.values())
@over("shape", EXPERTS)
def test_the_whole_is_one_mlp_an_expert(shape: Shape, scheme: Scheme) -> None:
    """The platform's own ops, against `linear` and `silu_mul` for each expert and its tokens."""
    tokens, hidden, inner, experts, count = shape
    on = detect()
    ops.bind(on)
    dtype = torch.float32 if on.is_cpu else torch.bfloat16
    gate_up = stack(torch.randn(experts, 2 * inner, hidden).to(dtype) / hidden**0.5, scheme, on)
    down = stack(torch.randn(experts, hidden, inner).to(dtype) / inner**0.5, scheme, on)
    x = torch.randn(tokens, hidden, device=on.device).to(dtype)
    for routing in ROUTINGS:
        to = chosen(routing, tokens, experts, count).to(on.device)
        weights = torch.rand(tokens, count, device=on.device)
        y = ops.experts(x, Routed(to, weights), ops.pack_experts(gate_up, on), ops.pack_experts(down, on))
        expected = torch.zeros(tokens, hidden, device=on.device)
        for e in to.unique().tolist():
            if e >= 0:
                t, place = (to == e).nonzero(as_tuple=True)
                h = reference.silu_mul(reference.Dequantized(gate_up.expert(e))(x[t])).values()
                expected[t] += reference.Dequantized(down.expert(e))(h).float() * weights[t, place].unsqueeze(1)
        assert y.shape == expected.shape
        assert y.dtype is dtype
        if not (to >= 0).any():
            assert torch.equal(y.float(), expected)
        else:
            # a last bit of an activation may change its code, which is a sixteenth of it: of many, where products are BF16
            exact = on.is_cpu and on.widened_dtype is not torch.bfloat16
            most = 1e-6 if on.is_cpu and not scheme.quantized else 1e-2 if exact else 5e-2 if on.is_cpu else 3e-2
            assert relative_error(y, expected) < most, routing


@over("routing", ROUTINGS)
@over("shape", [*EXPERTS, (700, 8, 8, 130, 6)])
def test_dispatch(shape: Shape, routing: str) -> None:
    tokens, _, _, experts, count = shape
    on = detect()
    ops.bind(on)
    to = chosen(routing, tokens, experts, count)
    at = ops.dispatch(to.to(on.device), experts)
    order, place, starts = (x.cpu().tolist() for x in (at.order, at.place, at.starts))
    pairs = to.flatten().tolist()
    assert sorted(order) == list(range(len(pairs)))
    assert [place[pair] for pair in order] == list(range(len(pairs)))
    assert starts == [sum(0 <= p < e for p in pairs) for e in range(experts + 1)]
    assert all(pairs[p] == e for e, (a, b) in enumerate(pairwise(starts)) for p in order[a:b])
    assert all(pairs[p] == -1 for p in order[starts[-1] :])
    assert {x.dtype for x in (at.order, at.place, at.starts)} == {torch.int32}


ROUTERS = {
    "softmax": Router(3),
    "softmax, weights as they are": Router(3, normalize=False),
    "sigmoid": Router(4, sigmoid=True, scale=2.5),
    "sigmoid, groups": Router(4, sigmoid=True, groups=3, top_groups=2, scale=2.827),
    "one": Router(1),
    "all": Router(12),
    "one an expert of each group": Router(3, sigmoid=True, groups=12, top_groups=3),
}


def decode_batch(tokens: int, device: torch.device) -> ForwardBatch:
    return batches.build([Span([1], 4, [0, 1]) for _ in range(tokens)], 4, device)


@over("biased", [False, True])
@over("name", ROUTERS)
@over("dtype", [torch.float32, torch.bfloat16])
def test_routes(name: str, biased: bool, dtype: torch.dtype) -> None:
    """Against float64 arithmetic, token by token."""
    on, router, experts, tokens = detect(), ROUTERS[name], 12, 37
    ops.bind(on)
    x, w = torch.randn(tokens, 70).to(dtype), (torch.randn(experts, 70) / 8).to(dtype)
    bias = torch.randn(experts) * 0.3 if biased else None
    found = ops.route(
        x.to(on.device), w.to(on.device), None if bias is None else bias.to(on.device), router,
        decode_batch(tokens, on.device),
    )  # fmt: skip
    assert found.experts.shape == found.weights.shape == (tokens, router.top_k)
    assert (found.experts.dtype, found.weights.dtype) == (torch.int32, torch.float32)
    logits = array(x) @ array(w).T
    for t in range(tokens):
        e = np.exp(logits[t] - logits[t].max())
        scores = 1 / (1 + np.exp(-logits[t])) if router.sigmoid else e / e.sum()
        order = scores + (0 if bias is None else array(bias))
        groups = order.reshape(router.groups, -1)
        best = np.sort(groups, 1)[:, -2:].sum(1).argsort()[::-1][: router.top_groups]
        inside = [g * groups.shape[1] + i for g in best for i in range(groups.shape[1])]
        expected = sorted(inside, key=lambda i: -order[i])[: router.top_k]
        weights = scores[expected] / (scores[expected].sum() if router.normalize else 1) * router.scale
        assert found.experts[t].tolist() == expected
        torch.testing.assert_close(found.weights[t].cpu().double(), torch.from_numpy(weights), rtol=1e-4, atol=1e-7)


def test_rows_that_pad_wake_no_expert() -> None:
    on = detect()
    ops.bind(on)
    x, w = torch.randn(6, 16, device=on.device), torch.randn(4, 16, device=on.device)
    decode = decode_batch(6, on.device)
    decode.seq_lens[3:] = 0
    prompt = batches.build([Span([1] * 6, 0, [0, 1])], 4, on.device)
    whole = ops.route(x, w, None, Router(2), prompt)
    assert (whole.experts >= 0).all()
    prompt.live = torch.tensor([4], dtype=torch.int32, device=on.device)
    for batch, real in ((decode, 3), (prompt, 4)):
        found = ops.route(x, w, None, Router(2), batch)
        assert torch.equal(found.experts[:real], whole.experts[:real])
        assert (found.experts[real:] == -1).all()
        assert (found.weights[real:] == 0).all()


@over("name", ROUTERS)
def test_a_token_that_is_not_a_number_wakes_experts_that_exist(name: str) -> None:
    """And harms no other."""
    on, router = detect(), ROUTERS[name]
    ops.bind(on)
    x, w = torch.randn(5, 16, device=on.device), torch.randn(12, 16, device=on.device)
    before = ops.route(x, w, None, router, decode_batch(5, on.device))
    x[1], x[3, 2] = float("nan"), float("inf")
    found = ops.route(x, w, None, router, decode_batch(5, on.device))
    assert ((found.experts >= 0) & (found.experts < 12)).all()
    assert all(len(set(row)) == router.top_k for row in found.experts.tolist())
    assert found.weights[1].isnan().all()
    for t in (0, 2, 4):
        assert torch.equal(found.experts[t], before.experts[t])


def test_equal_scores_go_to_the_first() -> None:
    on = detect()
    ops.bind(on)
    x, w = torch.ones(2, 8, device=on.device), torch.ones(9, 8, device=on.device)
    assert ops.route(x, w, None, Router(3), decode_batch(2, on.device)).experts.tolist() == [[0, 1, 2]] * 2


def test_a_stack_holds_what_was_put() -> None:
    weights = torch.randn(3, 40, 24)
    for scheme in SCHEMES.values():
        one = [quantize(w, scheme) for w in weights]
        made = Stacker(3)
        for e in (2, 0, 1):
            made.put(e, one[e])
        q = made.finished()
        assert q.shape == (3, 40, 24)
        for e in range(3):
            assert torch.equal(q.expert(e).data.view(torch.uint8), one[e].data.view(torch.uint8))
            assert q.scale is None or torch.equal(q.expert(e).scale, one[e].scale)  # type: ignore[arg-type]


@over("held", [torch.float32, torch.bfloat16])
@over("scheme", SCHEMES.values())
def test_widened_experts_take_what_each_takes_alone(scheme: Scheme, held: torch.dtype) -> None:
    on = Platform(torch.device("cpu"), "test", widened_dtype=held)
    q = stack(torch.randn(3, 40, 200).bfloat16(), scheme, on)
    taken = {i.name: i.pack(q, on).held_bytes for i in STACKS if i.supports(q, on) is None}
    assert taken == {"widened codes, torch": sum(Widened().pack(q.expert(e), on).held_bytes for e in range(3))}


def test_experts_that_are_stored_otherwise_are_refused() -> None:
    from octavo.errors import OctavoError

    made = Stacker(2)
    made.put(0, quantize(torch.randn(16, 16), SCHEMES["fp8"]))
    with pytest.raises(OctavoError, match="stored alike"):
        made.put(1, quantize(torch.randn(16, 16), BF16))
