"""Products by packed INT4 weights against float64 of the same codes: on the GPU where there is one, else interpreted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import relative_error
from ops.cases import combined, over
from ops.interpreter import HAS_GPU
from ops.shapes import EXPERTS, LINEAR, ROUTINGS
from ops.test_experts import chosen

from octavo.ops import gpu, reference
from octavo.ops.triton import int4, launch, routing
from octavo.platform import Platform, detect
from octavo.quant import QTensor
from octavo.quant.scheme import Granularity, int4_of

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
ON = detect() if HAS_GPU else Platform(DEVICE, "test")
FP8 = ON.fp8_dtype
ROUNDED = 6e-3  # a weight, and the result, to BF16
W4A8 = 0.04  # from the float64 product of activations that are not rounded to FP8
pytestmark = pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")


@pytest.fixture(autouse=True)
def _kernels_of_this_device() -> None:
    if HAS_GPU:
        launch.configure(ON)


def weight(group: int, *shape: int, scales: torch.dtype = torch.bfloat16) -> QTensor:
    """Random bytes; behind a row's last code too, in words of 8 codes as compressed-tensors has them."""
    *lead, k = shape
    data = torch.randint(0, 256, (*lead, -(-k // 8) * 4), dtype=torch.uint8)
    scale = (torch.rand(*lead, -(-k // group)) + 0.5).to(scales)
    return QTensor(data.to(DEVICE), scale.to(DEVICE), int4_of(group), shape)


def values(q: QTensor) -> torch.Tensor:
    """What the codes stand for, in float64."""
    assert q.scale is not None
    data, k = q.data.cpu().numpy(), q.shape[-1]
    codes = np.stack([data & 15, data >> 4], -1).reshape(*data.shape[:-1], -1)[..., :k].astype(np.float64) - 8
    scale = np.repeat(q.scale.cpu().double().numpy(), q.scheme.group, -1)[..., :k]
    return torch.from_numpy(codes * scale).to(DEVICE)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Activations as FP8 with a scale a token has them."""
    codes, scale = reference.quantize_activation(x, Granularity.ROW, FP8)
    return codes.double() * scale


def spoil(rows: int, n: int, dtype: torch.dtype) -> None:
    """Memory that the next result is likely to get holds no numbers."""
    del_me = torch.full((rows, n), torch.nan, dtype=dtype, device=DEVICE)
    del del_me


WAYS: list[dict[str, int]] = [{}, {"planar": 1, "BM": 64, "split": 1}, {"split": 3, "planar": 0}]


@over("group", int4.GROUPS)
def test_dense(group: int) -> None:
    """W4A16 the ways that numbers of tokens are multiplied, and W4A8; weights with FP32 scales too, which are rounded.

    Where kernels are interpreted each shape meets one of them in groups of 32 and the other in groups of 128.
    """
    for number, (m, n, k) in enumerate(LINEAR):
        q = weight(group, n, k, scales=torch.float32 if number % 3 == 2 else torch.bfloat16)
        codes, scale = int4.laid_out(q.data, q.scale, group)  # type: ignore[arg-type]
        dtype = torch.float32 if number % 4 == 3 else torch.bfloat16
        x, w = torch.randn(m, k, device=DEVICE).bfloat16().to(dtype), values(q)
        turn = None if HAS_GPU else (number + int4.GROUPS.index(group)) % 2
        for way in WAYS if HAS_GPU else WAYS[number % 3 :][:turn]:
            spoil(m, n, dtype)
            y = int4.int4_product(x, codes[None], scale[None], group, config=way)
            assert (y.shape, y.dtype) == ((m, n), dtype)
            assert not m or relative_error(y, x.double() @ w.mT) < ROUNDED, (m, n, k, way)
        if turn == 1:
            continue
        spoil(m, n, dtype)
        y = int4.int4_product(x, codes[None], scale[None], group, fp8=FP8)
        assert y.shape == (m, n)
        if m:
            assert relative_error(y, rounded(x) @ w.mT) < (2e-2 if HAS_GPU else ROUNDED)  # a division's last bit moves codes
            assert relative_error(y, x.double() @ w.mT) < W4A8, (m, n, k)


EXPERTS_HERE = EXPERTS if HAS_GPU else EXPERTS[:5]
EXPERTS_WAYS: list[tuple[torch.dtype | None, dict[str, int]]] = [(None, {}), (None, {"planar": 1, "BM": 64}), (FP8, {"BM": 16})]


@over("group, shape, of_tokens, way", combined(int4.GROUPS, EXPERTS_HERE, [True, False], EXPERTS_WAYS))
def test_experts(group: int, shape: tuple[int, ...], of_tokens: bool, way: tuple[torch.dtype | None, dict[str, int]]) -> None:
    """Each shape with the next routing; of tokens' rows and of pairs', which past the last expert's are not numbers."""
    (tokens, hidden, inner, count, top_k), (fp8, config) = shape, way
    q = weight(group, count, 2 * inner, hidden)
    codes, scale = int4.laid_out(q.data, q.scale, group)  # type: ignore[arg-type]
    to = chosen(ROUTINGS[(EXPERTS.index(shape) + group) % len(ROUTINGS)], tokens, count, top_k).to(DEVICE)  # type: ignore[arg-type]
    at = routing.dispatch(to, count)
    awake = at.order[: int(at.starts[-1])].long()
    rows = torch.randn(tokens if of_tokens else tokens * top_k, hidden, device=DEVICE).bfloat16()
    if not of_tokens:
        rows[len(awake) :] = torch.nan
    given = rows[awake // top_k] if of_tokens else rows[: len(awake)]
    spoil(tokens * top_k, 2 * inner, rows.dtype)
    y = int4.int4_product(rows, codes, scale, group, at, of_tokens=of_tokens, fp8=fp8, config=config)
    assert (y.shape, y.dtype) == ((tokens * top_k, 2 * inner), torch.bfloat16)
    if len(awake):
        met = given.double() if fp8 is None else rounded(given)
        expected = torch.einsum("pk,pnk->pn", met, values(q)[to.flatten()[awake].long()])
        assert relative_error(y[: len(awake)], expected) < (2e-2 if HAS_GPU and fp8 is not None else ROUNDED)


def test_what_is_bound() -> None:
    """Stored bytes stay the memory that is held, where rows are whole steps; what else is refused has a reason."""
    for stacked, preferred in ((False, gpu.LINEAR), (True, gpu.STACKS)):
        for group in int4.GROUPS:
            q = weight(group, *([3] if stacked else []), 40, 512)
            taking = [i for i in preferred if i.supports(q, ON) is None]  # type: ignore[attr-defined]
            assert [i.name for i in taking] == ["Triton, packed INT4"]
            held = taking[0].pack(q, ON)
            assert held.held_bytes == q.nbytes
            assert held.codes.data_ptr() == q.data.data_ptr()
        for wrong, reason in (
            (QTensor(q.data, q.scale, int4_of(64), q.shape), "groups are of 64"),
            (QTensor(q.data.view(torch.int8), q.scale, q.scheme, q.shape), "torch.int8"),
        ):
            assert all(i.supports(wrong, ON) for i in preferred)  # type: ignore[attr-defined]
            assert any(reason in str(i.supports(wrong, ON)) for i in preferred)  # type: ignore[attr-defined]


@over("group", int4.GROUPS)
def test_the_number_of_rows_decides(group: int) -> None:
    """W4A16 or W4A8, as `quantizes` says, each within its error."""
    q = weight(group, 1, 24, 256)
    stack, dense, w = gpu.Int4Experts().pack(q, ON), gpu.Int4().pack(q.expert(0), ON), values(q)[0]
    for rows in (1, 70):
        x = torch.randn(rows, 256, device=DEVICE).bfloat16()
        at = routing.dispatch(torch.zeros(rows, 1, dtype=torch.int32, device=DEVICE), 1)
        exact = x.double() @ w.mT
        assert relative_error(dense(x), exact) < ROUNDED
        error = relative_error(stack(x, at, of_tokens=True)[at.place.long()], exact)  # rows lie in any order
        assert (error > ROUNDED) == (group == 128 and rows == 70)
        assert error < W4A8


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU, whose graphs hold launches")
def test_in_a_graph() -> None:
    """Captured with one routing, replayed with others: the same bits as without a graph."""
    from octavo import ops

    ops.bind(ON)
    for group in int4.GROUPS:
        held = gpu.Int4Experts().pack(weight(group, 12, 96, 256), ON)
        for tokens in (3, 300):
            x = torch.randn(tokens, 256, device=DEVICE).bfloat16()
            to = chosen("random", tokens, 12, 4).to(DEVICE)

            def whole(held=held, x=x, to=to) -> torch.Tensor:  # type: ignore[no-untyped-def]
                at = routing.dispatch(to, 12)
                return held(x, at, of_tokens=True)[at.place.long()]  # an expert's rows lie in any order

            whole()
            replay, out, _ = ops.capture(whole)
            for name in ("random", "skewed"):
                to.copy_(chosen(name, tokens, 12, 4))
                x.normal_()
                expected = whole()
                out.fill_(torch.nan)
                replay()
                assert torch.equal(out, expected)
