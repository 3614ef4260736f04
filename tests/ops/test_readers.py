"""What rms_norm, silu_mul and gated_linear make for several readers: dense values, codes, or both, in one launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import relative_error
from ops.cases import over
from ops.interpreter import HAS_GPU
from torch import Tensor

from octavo import ops
from octavo.ops import gpu, reference
from octavo.ops.contract import Activation, CodeFormat, PackedWeight, Quantized, codes_of, wanted
from octavo.ops.cpu import library
from octavo.ops.triton import elementwise
from octavo.platform import Platform, detect
from octavo.quant import BF16, FP8_BLOCK, FP8_PER_CHANNEL, Granularity, Scheme, dequantize, quantize

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
ON = Platform(DEVICE, "test")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
pytestmark = pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")

RMSNORM, SILU = "rms_norm", "silu_mul"


class Reads(PackedWeight):
    """Some weight that reads these codes."""

    def __init__(self, reads: CodeFormat | None):
        self.reads = reads


ROWS, OTHER, BLOCKS = (Reads(CodeFormat(dtype, granularity, 112)) for dtype, granularity in
                       ((E4M3, Granularity.ROW), (E5M2, Granularity.ROW), (E4M3, Granularity.BLOCK)))  # fmt: skip


def exact(op: str, x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    """In float64, of the sum that is rounded to BF16 before it is normed."""
    if op == SILU:
        gate, up = x.double().chunk(2, 1)
        return gate / (1 + (-gate).exp()) * up
    total = (x + residual).double()
    return total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()


class Step:
    """Random inputs of an op whose results are [tokens, 100], and the op on them."""

    def __init__(self, op: str, module: Any, tokens: int = 5):
        self.op, self.module = op, module
        wide = 200 if op == SILU else 100
        self.x, self.residual = (torch.randn(tokens, wide, device=DEVICE).bfloat16() for _ in range(2))
        self.weight = torch.randn(wide, device=DEVICE).bfloat16()
        self.exact = exact(op, self.x, self.residual, self.weight)

    def __call__(self, *readers: ops.Reader) -> Activation:
        if self.op == SILU:
            made: Activation = self.module.silu_mul(self.x, readers)
            return made
        made, carried = self.module.rms_norm(self.x, self.weight, 1e-5, self.residual, readers)
        assert torch.equal(carried, self.x + self.residual)
        return made


def same(a: Quantized | None, b: Quantized | None) -> bool:
    assert a is not None
    assert b is not None
    return all(torch.equal(x.float(), y.float()) for x, y in zip(a, b, strict=True))


@pytest.fixture(params=[RMSNORM, SILU])
def step(request: pytest.FixtureRequest) -> Step:
    return Step(request.param, elementwise)


def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []
    before = elementwise.launch

    def counted(kernel: Any, *args: Any, **options: Any) -> None:
        seen.append(kernel)
        before(kernel, *args, **options)

    monkeypatch.setattr(elementwise, "launch", counted)
    return seen


def test_dense_values_and_codes_in_one_launch(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are right, and bit for bit what each would be alone; codes are those of the dense values."""
    plain, alone = step(None), step(ROWS)
    seen = launches(monkeypatch)
    both = step(None, ROWS)
    assert len(seen) == 1
    assert (plain.quantized, alone.dense) == (None, None)
    assert torch.equal(both.values(), plain.values())
    assert same(both.quantized, alone.quantized)
    assert relative_error(both.values(), step.exact) < 6e-3
    codes, scale = both.quantized or pytest.fail("no codes")
    assert codes.shape == (5, 112)
    assert scale.shape == (5, 1)
    assert not codes[:, 100:].float().any()
    assert relative_error(codes[:, :100].double() * scale.double(), step.exact) < 0.04
    again, again_scale = reference.quantize_activation(both.values().cpu(), Granularity.ROW, E4M3)
    torch.testing.assert_close(scale.cpu(), again_scale, rtol=1e-6, atol=0)
    assert (codes[:, :100].cpu().float() != again.float()).float().mean() < 0.02  # a last bit of a division


@over(
    "readers, dense, codes",
    [
        ((), True, None),
        ((None,), True, None),
        ((ROWS,), False, ROWS),
        ((ROWS, ROWS), False, ROWS),
        ((ROWS, Reads(ROWS.reads)), False, ROWS),
        ((ROWS, None), True, ROWS),
        ((Reads(None), ROWS), True, ROWS),
        ((ROWS, OTHER), True, None),  # each makes its own
        ((ROWS, BLOCKS), True, None),
        ((BLOCKS,), False, BLOCKS),
        ((None, BLOCKS), True, BLOCKS),
        ((OTHER, OTHER, None), True, OTHER),
    ],
)
def test_what_is_made_for_whom(step: Step, readers: tuple[ops.Reader, ...], dense: bool, codes: Reads | None) -> None:
    made = step(*readers)
    assert (made.dense is not None) == dense
    assert (made.quantized is not None) == (codes is not None)
    assert made.tokens == 5
    if codes is not None:
        assert codes.reads is not None
        assert codes_of(made, codes.reads) is made.quantized
    if dense:
        assert relative_error(made.values(), step.exact) < 6e-3
    wants_dense, form = wanted(readers, 5)
    assert wants_dense or form is not None


def packed(scheme: Scheme, n: int) -> tuple[PackedWeight, Tensor]:
    """A weight [n, 100] of a GPU's implementation, and its values in float64."""
    q = quantize(
        torch.randn(n, 100, device=DEVICE) if scheme.quantized else torch.randn(n, 100, device=DEVICE).bfloat16(), scheme
    )
    q = q.padded(16)
    make = {BF16: gpu.Dense, FP8_PER_CHANNEL: gpu.ScaledMM, FP8_BLOCK: gpu.Blocks}[scheme]()
    assert make.supports(q, ON) is None
    return make.pack(q, ON), dequantize(q).double()


@over("schemes", [(BF16, FP8_PER_CHANNEL), (FP8_PER_CHANNEL, FP8_BLOCK), (BF16, FP8_BLOCK, FP8_PER_CHANNEL)])  # fmt: skip
def test_a_router_and_experts(step: Step, schemes: tuple[Scheme, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reader's product is as exact as its own format, whatever the others read; only a dense product is BF16's."""
    weights = [packed(scheme, 16 * (1 + i)) for i, scheme in enumerate(schemes)]
    made = step(*(weight for weight, _ in weights))
    quantized_here = []
    names, make = {Granularity.ROW: "rows", Granularity.BLOCK: "groups"}, gpu.quantize
    monkeypatch.setattr(gpu, "quantize", lambda *args: (quantized_here.append(names[args[3]]), make(*args))[1])
    for scheme, (weight, values) in zip(schemes, weights, strict=True):
        assert relative_error(ops.linear(made, weight), step.exact @ values.mT) < (0.01 if scheme is BF16 else 0.04)
    formats = {scheme for scheme in schemes if scheme.quantized}
    assert ("rows" in quantized_here) == (len(formats) > 1)  # with one format the op before has made the codes
    assert ("groups" in quantized_here) == (len(formats) > 1 and FP8_BLOCK in schemes)


def test_codes_with_a_scale_a_group_are_taken() -> None:
    """As [M, groups]: the product is what it is of the dense values."""
    x = torch.randn(7, 300, device=DEVICE).bfloat16()
    q = quantize(torch.randn(48, 300, device=DEVICE), FP8_BLOCK).padded(16)
    weight = gpu.Blocks().pack(q, ON)
    assert weight.reads == CodeFormat(E4M3, Granularity.BLOCK, 304)
    codes = elementwise.quantize(x, E4M3, 304, Granularity.BLOCK)
    assert codes.scale.shape == (7, weight.reads.groups) == (7, 3)
    assert torch.equal(weight(Activation(None, codes)), weight(x))
    by_token = elementwise.quantize(x, E4M3, 304)
    assert codes_of(Activation(x, by_token), weight.reads) is None
    assert torch.equal(weight(Activation(x, by_token)), weight(x))  # codes of another format are not taken for its own


@over("op", [RMSNORM, SILU])
def test_on_a_cpu_everyone_reads_dense_values(op: str) -> None:
    """Of the reference and, where they are, the C kernels, which quantize within the product."""
    modules = [reference]
    if library.missing() is None and DEVICE.type == "cpu":
        from octavo.ops.cpu import native

        modules.append(native)
    for module in modules:
        one = Step(op, module)
        for readers in ((), (ROWS,), (None, ROWS), (ROWS, OTHER)):
            made = one(*readers)
            assert made.quantized is None
            assert relative_error(made.values(), one.exact) < 6e-3


@pytest.mark.skipif(DEVICE.type != "cpu", reason="needs a CPU (test_gate_up_silu.py has the GPU's)")
def test_gated_linear_on_a_cpu() -> None:
    ops.bind(detect("cpu"))
    w = ops.pack(quantize(torch.randn(200, 64), FP8_PER_CHANNEL), detect("cpu"))
    x = torch.randn(5, 64)
    made = ops.gated_linear(Activation(x), w, [None, w])
    assert torch.equal(made.values(), ops.silu_mul(ops.linear(x, w)).values())


def test_values_that_nobody_asked_for() -> None:
    with pytest.raises(AssertionError, match="dense"):
        Activation(None, Quantized(torch.zeros(1, 16), torch.ones(1, 1))).values()
