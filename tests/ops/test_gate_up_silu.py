"""An MLP's first product with SiLU, csrc/gate_up_silu_gemm.cu, against float64; and that it compiles where there is no GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from ops.cases import over

pytest.importorskip("triton", reason="needs Triton, which this torch came without")

from octavo import ops
from octavo.ops import gpu
from octavo.ops.contract import Activation, Quantized
from octavo.ops.hopper import compile as compiler
from octavo.ops.hopper import gate_up_silu
from octavo.ops.hopper.gemm import Variant, choose
from octavo.platform import Platform, detect
from octavo.quant import SCHEMES, quantize
from tests.ops.megakernels import dumped
from tests.ops.paged import needs_hopper, weight

# Tokens, width, K: of one tile and less, with tails of each, of many tiles, of Llama-3.1-8B.
SHAPES = [
    (1, 8, 16), (128, 112, 128), (33, 168, 144), (129, 264, 400), (257, 136, 4096), (1000, 1536, 512), (300, 14336, 4096),
    (2500, 2048, 1024),
]  # fmt: skip
F8, CPU = torch.float8_e4m3fn, torch.device("cpu")


@pytest.mark.skipif(compiler.missing() is not None, reason=f"needs NVRTC: {compiler.missing()}")
@pytest.mark.parametrize("variant", gate_up_silu.VARIANTS)
def test_it_compiles(variant: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For sm_90: nothing spilled; FP8 matrix instructions of a group of warps, four to a step, that are waited for a step later
    and once at the end; weights for all programs of a cluster at once. Of those, programs meet at the start and at the end, and
    in between none waits for its own writes to be seen, which made each step a third longer."""
    monkeypatch.setattr(compiler, "KEPT", tmp_path / "kept")
    options = dict(zip(gate_up_silu.KERNELS.options, variant, strict=True))
    stacks, code = dumped(compiler.compile_cubin("gate_up_silu_gemm.cu", "sm_90a", options), tmp_path)
    assert stacks == ["0"]
    assert len(re.findall(rf"QGMMA\.64x{2 * variant.half}x32\.F32\.E4M3\.E4M3", code)) == 4
    assert len(re.findall(r"WARPGROUP\.DEPBAR", code)) == 2
    assert ("UTMALDG.2D.MULTICAST" in code) == (variant.cluster > 1)
    assert len(re.findall(r"MEMBAR\.ALL\.GPU", code)) == (2 if variant.cluster > 1 else 0)


def test_the_variant_that_is_done_first() -> None:
    def chosen(tokens: int, width: int = 14336) -> Variant:
        return choose(gate_up_silu.VARIANTS, tokens, 2 * width, 132)

    assert chosen(33) == chosen(128) == Variant(1, 112)  # one tile for each multiprocessor
    assert chosen(256) == chosen(512) == Variant(2, 112)
    assert chosen(384) == Variant(1, 112)  # three tiles a multiprocessor, not two pairs
    assert chosen(8192) == Variant(2, 128)
    assert choose([Variant(1, 64)], 1, 1, 1) == Variant(1, 64)


def exact(codes: torch.Tensor, scale: torch.Tensor, rows: torch.Tensor, by_row: torch.Tensor) -> torch.Tensor:
    gate, up = ((codes.double() * scale) @ (rows.double() * by_row.view(-1, 1)).T).chunk(2, 1)
    return F.silu(gate) * up


def factors(tokens: int, width: int, depth: int) -> tuple[torch.Tensor, gpu.PackedScaledMM, gpu.PackedScaledMM]:
    """Activations, the weight of gate and up, the weight that comes after."""
    torch.manual_seed(0)
    x = torch.randn(tokens, depth, device=detect().device).bfloat16()
    return x, weight(2 * width, depth), weight(16, width)


def test_what_goes_in_and_what_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernel replaced: it gets codes, quantized here or before; the next product gets what it reads."""

    def stub(
        codes: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, by_row: torch.Tensor, out: torch.Tensor, _: Variant
    ) -> bool:
        out.copy_(exact(codes, scale, weight, by_row))
        return True

    x, w, feeds = factors(40, 24, 48)
    monkeypatch.setattr(gate_up_silu, "multiply", stub)
    monkeypatch.setattr(gate_up_silu, "refusal", lambda x, w: None)
    codes, scale = given = w.codes(x)
    expected = exact(codes, scale, w.weight, w.scale)
    plain = gate_up_silu.gated_linear(x, w)
    assert plain.quantized is None
    assert relative_error(plain.values(), expected) < 4e-3
    again = gate_up_silu.gated_linear(Activation(None, given), w)
    assert torch.equal(again.values(), plain.values())
    made = gate_up_silu.gated_linear(x, w, [feeds])
    found = made.quantized
    assert made.dense is None
    assert isinstance(found, Quantized)
    assert found.codes.shape == (40, feeds.reads.width)
    assert relative_error(found.codes[:, :24].double() * found.scale, expected) < 0.04
    both = gate_up_silu.gated_linear(x, w, [None, feeds])
    assert torch.equal(both.values(), plain.values())
    assert both.quantized is not None
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(both.quantized, found, strict=True))


def test_what_is_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, _ = factors(40, 24, 48)
    monkeypatch.setattr(gate_up_silu.KERNELS, "platform", Platform(CPU, "gfx942"))
    assert "gfx942" in str(gate_up_silu.refusal(x, w))
    monkeypatch.setattr(gate_up_silu.KERNELS, "platform", Platform(CPU, "sm_90"))
    monkeypatch.setattr(compiler, "missing", lambda: None)
    assert "fewer tiles" in str(gate_up_silu.refusal(x, w))
    monkeypatch.setattr(gate_up_silu, "FILLED", 0)
    assert gate_up_silu.refusal(x, w) is None
    assert "not more than 32 tokens" in str(gate_up_silu.refusal(x[:32], w))
    assert "BF16" in str(gate_up_silu.refusal(x.float(), w))
    assert "multiple of 8" in str(gate_up_silu.refusal(x, factors(40, 4, 48)[1]))
    assert "scale a row" in str(gate_up_silu.refusal(x, gpu.PackedDense(quantize(torch.ones(16, 16), SCHEMES["bf16"], F8))))
    w.reads = w.reads._replace(dtype=torch.float8_e4m3fnuz)
    assert "e4m3" in str(gate_up_silu.refusal(x, w))


@needs_hopper
@over("variant", gate_up_silu.VARIANTS)
@over("tokens, width, depth", SHAPES)
def test_it_multiplies_and_gates(tokens: int, width: int, depth: int, variant: Variant) -> None:
    """As exact as its BF16 results and the 14 bits of the matrix unit's sums are, and the same bits each time."""
    x, w, _ = factors(tokens, width, depth)
    ops.bind(detect())
    codes, scale = w.codes(x)
    outs = [torch.full((tokens + 1, width), float("nan"), dtype=torch.bfloat16, device=x.device) for _ in range(2)]
    for out in outs:
        assert gate_up_silu.multiply(codes, scale, w.weight, w.scale, out[:tokens], variant)
    assert outs[0][tokens].isnan().all()
    assert torch.equal(outs[0][:tokens], outs[1][:tokens])
    assert relative_error(outs[0][:tokens], exact(codes, scale, w.weight, w.scale)) < 6e-3


@needs_hopper
def test_it_is_the_one_that_is_used() -> None:
    x, w, feeds = factors(256, 14336, 512)
    ops.bind(detect())
    assert ops.table()["gated_linear"] == "hopper.gate_up_silu"
    assert gate_up_silu.refusal(x, w) is None
    found, before = ops.gated_linear(x, w, [feeds]).quantized, gpu.silu_mul(w.unscaled(x), [feeds]).quantized
    assert isinstance(found, Quantized)
    assert isinstance(before, Quantized)
    values = [each.codes.double() * each.scale for each in (found, before)]
    assert relative_error(*values) < 0.03  # codes that a last bit of a BF16 result moves
