"""Packed INT4 on a CPU, whole weights and stacks of experts: against float64 products of the same codes and scales."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import relative_error
from ops.cases import on_each_instruction_set, over
from ops.shapes import EXPERTS, LINEAR, ROUTINGS
from ops.test_experts import chosen
from ops.test_linear import activations

from octavo.ops import reference
from octavo.ops.cpu import experts, library, linear, native
from octavo.ops.cpu.op_recorder import capture
from octavo.platform import Platform
from octavo.quant import QTensor
from octavo.quant.scheme import int4_of

CPU = Platform(torch.device("cpu"), "test")
WIDENING = {held: replace(CPU, widened_dtype=held) for held in (torch.float32, torch.bfloat16)}
SCALES = (torch.bfloat16, torch.float32)
GROUPS = (32, 128, 24)  # the two that checkpoints have, and one that divides no vector
DTYPES = (torch.float32, torch.bfloat16)
needs_kernels = pytest.mark.skipif(library.missing() is not None, reason=f"needs the C kernels: {library.missing()}")


def packed_int4(shape: tuple[int, ...], group: int, scales: torch.dtype) -> tuple[QTensor, torch.Tensor]:
    """A weight [..., N, K] whose rows lie apart, and its values in float64. What is behind a row's last value is arbitrary."""
    *rows, k = shape
    codes = torch.randint(0, 256, (*rows, -(-k // 8) * 4 + 8), dtype=torch.uint8)[..., :-8]
    codes[..., 0] |= 1  # no row is all zeros, which are stored as 8
    scale = (torch.rand(*rows, -(-k // group)) + 0.1).to(scales) * 4.0 ** torch.randint(-2, 3, (*rows, 1))
    scale = scale.to(scales)
    values = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)[..., :k].double() - 8
    return QTensor(codes, scale, int4_of(group), shape), values * scale.double().repeat_interleave(group, -1)[..., :k]


def bound(*dtypes: torch.dtype) -> float:
    return 4e-3 if torch.bfloat16 in dtypes else 2e-6


@needs_kernels
@over("group", GROUPS)
def test_products_by_the_kernels(group: int) -> None:
    """With few tokens and many, in FP32 and, where there is such an instruction, in pairs of BF16; codes are not copied."""
    for shape in [*LINEAR, (4, 33, 384), (9, 24, 512), (48, 20, 1152), (530, 18, 70)]:
        products_of(shape, group)


@on_each_instruction_set
def products_of(shape: tuple[int, int, int], group: int) -> None:
    m, n, k = shape
    for scales in SCALES:
        q, values = packed_int4((n, k), group, scales)
        assert native.Native().supports(q, CPU) is None
        packed = native.Native().pack(q, CPU)
        assert packed.data.data_ptr() == q.data.data_ptr()
        assert packed.held_bytes == q.nbytes
        for dtype in DTYPES:
            x = activations(m, k, dtype)
            y = packed(x)
            assert (y.dtype, y.shape) == (dtype, (m, n))
            assert not m or relative_error(y, x.double() @ values.mT) < bound(dtype), (shape, group, scales, dtype)


@on_each_instruction_set
@needs_kernels
def test_experts_by_the_kernels() -> None:
    """Of tokens' rows and of pairs' rows, by the same arithmetic as one weight's; what is captured reads them again."""
    for group in GROUPS:
        for (tokens, hidden, inner, count, top_k), scales in zip(EXPERTS, SCALES * len(EXPERTS), strict=False):
            q, values = packed_int4((count, 2 * inner, hidden), group, scales)
            assert experts.NativeStack().supports(q, CPU) is None
            packed = experts.NativeStack().pack(q, CPU)
            assert packed.held_bytes == q.nbytes
            x = torch.randn(tokens, hidden)
            of_all = torch.einsum("tk,enk->ten", x.double(), values)
            for routing in ROUTINGS:
                to = chosen(routing, tokens, count, top_k)
                at = experts.dispatch(to, count)
                awake = at.order[: at.starts[-1]].long()
                expected = of_all[awake // top_k, to.flatten()[awake].long()]
                for dtype in DTYPES:
                    rows = x.to(dtype)
                    of_tokens = packed(rows, at, of_tokens=True)
                    of_pairs = packed(rows[at.order.long() // top_k], at, of_tokens=False)
                    assert torch.equal(of_tokens[: len(awake)], of_pairs[: len(awake)])
                    if not len(awake):
                        continue
                    assert relative_error(of_tokens[: len(awake)], expected) < 2 * bound(dtype), (group, routing, hidden)


@on_each_instruction_set
@needs_kernels
def test_a_recorded_step_multiplies_by_them() -> None:
    """One weight and a mixture's, joined in one call of the library; its replay reads what is there then."""
    one, _ = packed_int4((96, 256), 32, torch.bfloat16)
    stack, _ = packed_int4((5, 64, 96), 32, torch.bfloat16)
    dense, mixture = native.Native().pack(one, CPU), experts.NativeStack().pack(stack, CPU)
    x, to = torch.randn(3, 256).bfloat16(), chosen("random", 3, 5, 2)

    def step() -> torch.Tensor:
        return mixture(dense(x), experts.dispatch(to, 5), of_tokens=True)

    replay, out, _ = capture(step)
    for _ in range(2):
        x.normal_()
        to.copy_(chosen("random", 3, 5, 2))
        stack.data.random_()
        stack.scale.mul_(1.5)  # type: ignore[union-attr]
        replay()
        assert torch.equal(out, step())
    assert native.captures(64, [dense], latent=False)


def test_held_widened_where_there_are_no_kernels() -> None:
    """Once, as the values that they stand for; not made of codes at each call."""
    for held, on in WIDENING.items():
        for group in (*GROUPS, 4):
            q, values = packed_int4((3, 48, 200), group, torch.bfloat16)
            assert experts.WidenedStack().supports(q, on) is None
            packed, of_one = experts.WidenedStack().pack(q, on), linear.Widened().pack(q.expert(1), on)
            size = 48 * 200 * held.itemsize
            assert (of_one.held_bytes, packed.held_bytes) == (size, 3 * size)
            to = torch.tensor([[0], [1], [1], [2]], dtype=torch.int32)
            at = reference.dispatch(to, 3)
            for dtype in DTYPES:
                x = torch.randn(4, 200).to(dtype)
                expected = torch.stack([x[t].double() @ values[e].mT for t, e in enumerate(to.flatten().tolist())])
                assert relative_error(packed(x, at, of_tokens=True), expected) < bound(dtype, held)
                assert relative_error(of_one(x[1:3]), expected[1:3]) < bound(dtype, held)


@needs_kernels
def test_what_the_kernels_do_not_take_is_refused() -> None:
    q, _ = packed_int4((2, 16, 64), 32, torch.bfloat16)
    assert q.scale is not None
    for other, reason in (
        (packed_int4((2, 16, 64), 4, torch.bfloat16)[0], "groups of 4 are no multiples of 8"),
        (replace(q, data=q.data.view(torch.int8)), "int8"),
        (replace(q, data=q.data[..., :31]), "not rows of 64 codes"),
        (replace(q, scale=q.scale.half()), "BF16 or FP32"),
        (replace(q, scale=q.scale[..., :1]), "one for each 32 values"),
        (replace(q, scale=None), "one for each 32 values"),
    ):
        assert reason in str(experts.NativeStack().supports(other, CPU))
        assert reason in str(native.Native().supports(other.expert(0), CPU))
        assert experts.WidenedStack().supports(other, CPU) is not None
