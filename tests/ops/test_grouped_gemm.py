"""A mixture's two products for more than a few tokens, csrc/grouped_gemm.cu, against float64; and that it compiles where there
is no GPU."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from ops.cases import over
from ops.shapes import ROUTINGS
from ops.test_experts import chosen, stack

pytest.importorskip("triton", reason="needs Triton, which this torch came without")

from octavo import ops
from octavo.ops import gpu
from octavo.ops.contract import Activation, Dispatch, Quantized, Routed
from octavo.ops.hopper import compile as compiler
from octavo.ops.hopper import experts
from octavo.platform import Platform, detect
from octavo.quant import SCHEMES
from tests.ops.megakernels import dumped
from tests.ops.paged import needs_hopper

# Tokens, hidden, intermediate, experts, chosen: tails of every tile, widths that 128 and 256 do not divide, one expert, more
# experts than pairs, Qwen3-30B-A3B's.
SHAPES = [
    (1, 64, 40, 7, 3), (40, 96, 272, 5, 1), (70, 144, 48, 130, 8), (150, 64, 96, 1, 1), (333, 400, 2048, 6, 2),
    (256, 2048, 768, 128, 8), (1500, 256, 264, 10, 3),
]  # fmt: skip
CPU = torch.device("cpu")
Shape = tuple[int, int, int, int, int]


@pytest.mark.skipif(compiler.missing() is not None, reason=f"needs NVRTC: {compiler.missing()}")
@pytest.mark.parametrize("variant", [*experts.VARIANTS[1:3], *experts.VARIANTS[4:]])  # all of the large tile, two of the small
def test_it_compiles(variant: experts.Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For sm_90: nothing spilled; FP8 matrix instructions of a group of warps for tiles of every width; weights by boxes, gate
    and up in one, and tokens' rows by copies of 16 bytes. Sums that are not scaled in between are waited for a step later."""
    monkeypatch.setattr(compiler, "KEPT", tmp_path / "kept")
    options = dict(zip(experts.KERNELS.options, variant, strict=True))
    stacks, code = dumped(compiler.compile_cubin("grouped_gemm.cu", "sm_90a", options), tmp_path)
    assert stacks == ["0"]
    widths = [str(n) for n in range(32, variant.tokens + 1, 32) for _ in range(8)]
    assert sorted(re.findall(r"QGMMA\.64x(\d+)x32\.F32\.E4M3\.E4M3", code)) == sorted(widths)
    if not variant.blocks and (variant.gated or variant.tokens > 32):
        assert len(re.findall(r"WARPGROUP\.DEPBAR", code)) == 3 * variant.tokens // 32
    assert ("UTMALDG.5D" in code) == bool(variant.gated)
    assert ("UTMALDG.3D" in code) != bool(variant.gated)
    assert "LDGSTS" in code or not variant.gated


@pytest.mark.skipif(compiler.missing() is not None, reason=f"needs NVRTC: {compiler.missing()}")
def test_quantization_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "KEPT", tmp_path / "kept")
    stacks, code = dumped(compiler.compile_cubin("quantize_pairs.cu", "sm_90a", {}), tmp_path)
    assert stacks == ["0"]
    assert "F2FP.SATFINITE.E4M3" in code


def mixture(shape: Shape, scheme: str) -> tuple[torch.Tensor, gpu.PackedGrouped, gpu.PackedGrouped]:
    """Activations, the stack of gate and up, that of down."""
    torch.manual_seed(0)
    (tokens, hidden, inner, count, _), on = shape, detect()
    ops.bind(on)
    made = [
        gpu.PackedGrouped(stack((torch.randn(count, n, k) * k**-0.5).bfloat16(), SCHEMES[scheme], on))
        for n, k in ((2 * inner, hidden), (hidden, inner))
    ]
    return torch.randn(tokens, hidden, device=on.device).bfloat16(), made[0], made[1]


def values(codes: torch.Tensor, scale: torch.Tensor, width: int) -> torch.Tensor:
    """Of codes with a scale a row, or for each 128."""
    each = scale.double() if scale.shape[1] == 1 else scale.double().repeat_interleave(128, 1)[:, :width]
    return codes[:, :width].double() * each


def by_expert(x: torch.Tensor, w: gpu.PackedGrouped, at: Dispatch, of_tokens: bool) -> torch.Tensor:
    """The grouped product in float64."""
    rows, parts = at.order.long() // at.top_k if of_tokens else torch.arange(len(x), device=x.device), []
    assert w.scale is not None
    for e, (start, stop) in enumerate(pairwise(at.starts.tolist())):
        scale = w.scale[e].double()
        if w.by_tile:
            scale = scale.repeat_interleave(128, 0)[: w.n].repeat_interleave(128, 1)[:, : w.k]
        parts.append(x[rows[start:stop]] @ (w.weight[e, : w.n, : w.k].double() * scale[: w.n]).T)
    return torch.cat(parts)


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Instead of torch.empty: NaN in every float's format."""
    return torch.zeros(*shape, dtype=dtype, device=device).view(torch.uint8).fill_(0xFF).view(dtype)


CASES = [
    (scheme, tokens, shape)
    for scheme in ("ptpc_fp8", "fp8_block")
    for tokens in experts.TOKENS
    for shape in SHAPES
    if scheme == "ptpc_fp8" or shape[2] % 128 == 0
]


@needs_hopper
@over("scheme, tokens, shape", CASES)
def test_products(scheme: str, tokens: int, shape: Shape) -> None:
    """Codes between them as exact as rounding to FP8 allows, results as BF16 and the 14 bits of the matrix unit's sums do; the
    same bits each time, and nothing behind the last pair."""
    x, gate_up, down = mixture(shape, scheme)
    assert gate_up.reads is not None
    assert down.reads is not None
    given = gpu.quantized(x, gate_up.reads)
    for routing in ROUTINGS:
        at = gpu.dispatch(chosen(routing, shape[0], shape[3], shape[4]).to(x.device), shape[3])
        n, runs = int(at.starts[-1]), []
        for _ in range(2):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "empty", poisoned)
                made = experts.gate_up(given, gate_up, at, down.reads.width, tokens)
                assert made is not None
                out = experts.down(made, down, at, tokens)
                assert out is not None
            runs.append((made.codes.view(torch.uint8), made.scale, out))
        for first, second in zip(*runs, strict=True):
            assert torch.equal(first[:n], second[:n]), routing
        _, scale, out = runs[0]
        assert scale[n:].isnan().all(), routing
        assert out[n:].isnan().all(), routing
        if not n:
            continue
        gate, up = by_expert(values(*given, shape[1]), gate_up, at, True).chunk(2, 1)
        between = values(made.codes[:n], scale[:n], shape[2])
        assert relative_error(between, F.silu(gate) * up) < 0.04, routing
        assert relative_error(out[:n], by_expert(between, down, at, False)) < 6e-3, routing


@needs_hopper
@over("scheme", ["ptpc_fp8", "fp8_block"])
@over("tokens", [9, 32, 256, 1400])
def test_it_is_the_one_that_is_used(tokens: int, scheme: str) -> None:
    x, gate_up, down = mixture((tokens, 512, 256, 16, 4), scheme)
    assert ops.table()["fused_experts"] == "hopper.experts"
    for routing in ROUTINGS:
        routed = Routed(chosen(routing, tokens, 16, 4).to(x.device), torch.rand(tokens, 4, device=x.device))
        assert experts.refusal(x, routed, gate_up, down) is None
        at = gpu.dispatch(routed.experts, 16)
        inner = gpu.silu_mul(gate_up(x, at, of_tokens=True), (down,))
        expected = gpu.combine(down(inner, at, of_tokens=False), routed, at)
        found = ops.experts(x, routed, gate_up, down)
        assert relative_error(found, expected.double()) < 0.04 if (routed.experts >= 0).any() else not found.any(), routing


def test_what_is_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    x, gate_up, down = mixture((40, 32, 16, 4, 2), "ptpc_fp8")
    routed = Routed(torch.zeros(40, 2, dtype=torch.int32), torch.zeros(40, 2))
    monkeypatch.setattr(compiler, "missing", lambda: None)
    monkeypatch.setattr(experts.KERNELS, "platform", Platform(CPU, "gfx942"))
    assert "gfx942" in str(experts.refusal(x, routed, gate_up, down))
    monkeypatch.setattr(experts.KERNELS, "platform", Platform(CPU, "sm_90"))
    assert experts.refusal(x, routed, gate_up, down) is None
    codes = Activation(None, Quantized(x.to(torch.float8_e4m3fn), x[:, :1].float()))
    assert experts.refusal(codes, routed, gate_up, down) is None
    few = Routed(routed.experts[:8], routed.weights[:8])
    assert "not more than 8 tokens" in str(experts.refusal(x[:8], few, gate_up, down))
    assert "BF16" in str(experts.refusal(x.float(), routed, gate_up, down))
    for scheme, reason in (("bf16", "multiplied by codes"), ("fp8_block", "blocks of 128")):
        assert reason in str(experts.refusal(x, routed, *mixture((40, 32, 16, 4, 2), scheme)[1:])), scheme
    assert experts.refusal(x, routed, *mixture((40, 32, 256, 4, 2), "fp8_block")[1:]) is None
    monkeypatch.setattr(experts, "MAX_WIDTH", 8)
    assert "channels" in str(experts.refusal(x, routed, gate_up, down))


def test_tiles_as_high_as_experts_have_pairs() -> None:
    assert [experts.choose(8 * tokens, 128) for tokens in (64, 256, 512, 8192)] == [32, 32, 128, 128]
