"""Products with block scales by csrc/block_gemm.cu and block_gate_up_silu_gemm.cu, against float64; and that they compile where
there is no GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from ops.cases import over
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton, which this torch came without")

from octavo import ops
from octavo.ops import gpu
from octavo.ops.contract import Activation, CodeFormat, Quantized
from octavo.ops.hopper import block_gate_up_silu, block_gemm, few_tokens, gate_up_silu
from octavo.ops.hopper import compile as compiler
from octavo.ops.hopper.gemm import Variant, box_of
from octavo.platform import Platform, detect
from octavo.quant import FP8_BLOCK, SCHEMES, Granularity, QTensor, concat, dequantize, quantize
from tests.ops.megakernels import dumped
from tests.ops.paged import needs_hopper
from tests.ops.shapes import LINEAR

F8, CPU = torch.float8_e4m3fn, torch.device("cpu")
# Tokens, N, K: beside those of all linear layers whole tiles, tails of each side, many tiles, Llama-3.1-8B's.
SHAPES = [
    *LINEAR[1:],
    (33, 128, 128),
    (129, 272, 400),
    (257, 136, 4096),
    (1000, 1536, 512),
    (300, 6144, 4096),
    (2500, 2048, 1040),
]
GATED = [(1, 128, 16), (33, 128, 144), (129, 256, 400), (257, 384, 4096), (300, 14336, 4096), (2500, 1024, 1024)]
KERNELS = [
    *((each, v) for each in (block_gemm.KERNELS, block_gemm.ROW_KERNELS, block_gate_up_silu.KERNELS) for v in each.variants)
]


@pytest.mark.skipif(compiler.missing() is not None, reason=f"needs NVRTC: {compiler.missing()}")
@pytest.mark.parametrize(("kernels", "variant"), KERNELS)
def test_it_compiles(kernels: compiler.Kernels, variant: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For sm_90: nothing spilled; four FP8 matrix instructions of a group of warps for a step of 128 rows; every sum of them is
    added by one instruction."""
    monkeypatch.setattr(compiler, "KEPT", tmp_path / "kept")
    options = kernels.others | dict(zip(kernels.options, variant, strict=True))
    stacks, code = dumped(compiler.compile_cubin(kernels.source, "sm_90a", options), tmp_path)
    assert stacks == ["0"]
    in_turn = kernels is block_gemm.KERNELS and variant.half <= 64
    products = 4 if in_turn else variant.half // 64  # the first step, two of the loop, the last
    width = 2 * min(variant.half, 64)
    assert len(re.findall(rf"QGMMA\.64x{width}x32\.F32\.E4M3\.E4M3", code)) == 4 * products
    assert len(re.findall(r"WARPGROUP\.DEPBAR", code)) == products + in_turn  # the last step is two steps' end
    assert len(re.findall(r"FFMA", code)) >= width // 2 * products
    assert ("UTMALDG.2D.MULTICAST" in code) == (variant.cluster > 1)


def test_the_variant_that_is_done_first() -> None:
    """As measured on an H200 for Llama-3.1-8B."""

    qkv, o, down = (6144, 4096), (4096, 4096), (4096, 14336)

    def chosen(tokens: int, shape: tuple[int, int]) -> Variant:
        return block_gemm.choose(block_gemm.VARIANTS, tokens, shape, 132)

    assert chosen(128, o) == chosen(128, down) == Variant(1, 32, 2)
    assert chosen(128, qkv) == chosen(256, o) == Variant(1, 32)
    assert chosen(256, down) == Variant(1, 64, 2)
    assert chosen(256, qkv) == chosen(512, o) == chosen(512, down) == chosen(1024, qkv) == Variant(1, 64)
    assert chosen(1024, o) == chosen(8192, qkv) == chosen(8192, o) == chosen(8192, down) == Variant(2, 128)

    def gated(tokens: int) -> Variant:
        return block_gemm.choose(block_gate_up_silu.VARIANTS, tokens, (28672, 4096), 132)

    assert gated(64) == gated(128) == gated(256) == Variant(1, 128)
    assert gated(8192) == Variant(2, 128)


def test_a_box_is_half_a_tile_where_one_is_enough() -> None:
    assert [box_of(tokens) for tokens in (33, 64, 129, 192)] == [64] * 4
    assert [box_of(tokens) for tokens in (65, 128, 256, 8200)] == [128] * 4


def weight(n: int, k: int, padded: int = 16) -> tuple[block_gemm.PackedBlocks, Tensor]:
    """A weight whose tiles are of different sizes, and its values in float64."""
    device = detect().device
    values = torch.randn(n, k, device=device) * torch.rand(n, 1, device=device).mul(4).exp()
    q = quantize(values, FP8_BLOCK, F8).padded(padded)
    return block_gemm.PackedBlocks(q, 132), dequantize(q).double()


def in_rows(n: int, k: int) -> tuple[block_gemm.PackedBlocks, Tensor]:
    """As `weight`, of two matrices, tiles of the second of which begin anywhere."""
    first = n // 3
    parts = [weight(rows, k, padded=1) for rows in (first, n - first) if rows]
    q = concat([QTensor(w.weight, w.scale, FP8_BLOCK, (w.n, k)) for w, _ in parts]).padded(16)
    assert q.scale is not None
    if len(q.scale) < n:  # one tile is the whole weight
        q.scale = q.scale.repeat_interleave(128, 0)[:n]
    packed = block_gemm.PackedBlocks(q, 132)
    assert (packed.by_row is not None) == (len(q.scale) != -(-n // 128))
    return packed, torch.cat([exact for _, exact in parts])


def values_of(x: Quantized, k: int) -> Tensor:
    return x.codes[:, :k].double() * x.scale.double().repeat_interleave(128, 1)[:, :k]


def activations(w: block_gemm.PackedBlocks, m: int, k: int) -> tuple[Tensor, Quantized]:
    """Values whose groups are of different sizes, and their codes."""
    sizes = torch.rand(m, -(-k // 128), device=w.weight.device).mul(4).exp().repeat_interleave(128, 1)[:, :k]
    x = (torch.randn(m, k, device=w.weight.device) * sizes).bfloat16()
    return x, w.codes(x)


@needs_hopper
@over("kernels, variant", [(each, v) for each in (block_gemm.KERNELS, block_gemm.ROW_KERNELS) for v in each.variants])
@over("shape", SHAPES)
def test_it_multiplies(shape: tuple[int, int, int], kernels: compiler.Kernels, variant: Variant) -> None:
    """As exact as its BF16 results are, and the same bits each time."""
    torch.manual_seed(0)
    ops.bind(detect())
    kernels.configure(detect())
    m, n, k = shape
    w, exact = weight(n, k) if kernels is block_gemm.KERNELS else in_rows(n, k)
    _, given = activations(w, m, k)
    outs = [torch.full((m + 1, len(w.weight)), float("nan"), dtype=torch.bfloat16, device=exact.device) for _ in range(2)]
    for out in outs:
        assert block_gemm.multiply(given, w, out[:m], variant)
    assert outs[0][m].isnan().all()
    assert torch.equal(outs[0][:m], outs[1][:m])
    assert relative_error(outs[0][:m, :n], values_of(given, k) @ exact.T) < 3e-3


@needs_hopper
@over("variant", block_gate_up_silu.VARIANTS)
@over("shape", GATED)
def test_it_multiplies_and_gates(shape: tuple[int, int, int], variant: Variant) -> None:
    """Dense values, codes and both; the codes have the scale of their group's largest value."""
    torch.manual_seed(0)
    ops.bind(detect())
    block_gate_up_silu.KERNELS.configure(detect())
    m, width, k = shape
    w, exact = weight(2 * width, k)
    _, given = activations(w, m, k)
    gate, up = (values_of(given, k) @ exact.T).chunk(2, 1)
    expected = F.silu(gate) * up
    found = []
    for makes_dense, makes_codes in ((True, False), (False, True), (True, True)):
        dense = torch.full((m + 1, width), float("nan"), dtype=torch.bfloat16, device=exact.device)
        codes = Quantized(
            torch.full((m + 1, width), 0x7F, dtype=torch.uint8, device=exact.device).view(F8),
            torch.full((m + 1, width // 128), float("nan"), device=exact.device),
        )
        of_tokens = Quantized(codes.codes[:m], codes.scale[:m])
        assert block_gate_up_silu.multiply(
            given, w, dense[:m] if makes_dense else None, of_tokens if makes_codes else None, variant
        )
        assert dense[m if makes_dense else 0 :].isnan().all()
        assert codes.scale[m if makes_codes else 0 :].isnan().all()
        assert codes.codes[m if makes_codes else 0 :].float().isnan().all()
        if makes_dense:
            assert relative_error(dense[:m], expected) < 6e-3
        if makes_codes:
            assert relative_error(values_of(of_tokens, width), expected) < 0.04
            peaks = expected.unflatten(1, (-1, 128)).abs().amax(2)
            torch.testing.assert_close(of_tokens.scale.double(), peaks / 448, rtol=2e-2, atol=1e-5)
            assert (of_tokens.codes.float().unflatten(1, (-1, 128)).abs().amax(2) >= 416).all()
        found.append((dense[:m], of_tokens))
    assert torch.equal(found[0][0], found[2][0])
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(found[1][1], found[2][1], strict=True))


def test_what_goes_in_and_what_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels replaced: they get codes, quantized here or before; the next product gets what it reads."""

    def product(x: Quantized, w: gpu.PackedBlocks, out: Tensor, _: Variant) -> bool:
        out.copy_(values_of(x, w.weight.shape[1]) @ rows_of(w).T)
        return True

    def gated(x: Quantized, w: gpu.PackedBlocks, dense: Tensor | None, made: Quantized | None, _: Variant) -> bool:
        gate, up = (values_of(x, w.weight.shape[1]) @ rows_of(w).T).chunk(2, 1)
        y = (F.silu(gate) * up).bfloat16()
        if dense is not None:
            dense.copy_(y)
        if made is not None:
            for to, part in zip(made, gpu.quantize(y, F8, y.shape[1], Granularity.BLOCK), strict=True):
                to.copy_(part)
        return True

    def rows_of(w: gpu.PackedBlocks) -> Tensor:
        return (
            w.weight.double()
            * w.scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)[: len(w.weight), : w.weight.shape[1]]
        )

    monkeypatch.setattr(block_gemm, "multiply", product)
    monkeypatch.setattr(block_gate_up_silu, "multiply", gated)
    monkeypatch.setattr(few_tokens, "multiply", lambda *_: None)  # as where it cannot be compiled
    (w, exact), (feeds, _) = weight(256, 300), weight(24, 128)
    x, given = activations(w, 40, 300)
    expected = values_of(given, 300) @ exact.T
    for operand in (x, Activation(None, given)):
        assert relative_error(w(operand), expected) < 4e-3
    assert relative_error(w(x[:32]), expected[:32]) < 4e-3  # which Triton computes
    gate, up = expected.chunk(2, 1)
    y = F.silu(gate) * up
    plain = gate_up_silu.gated_linear(x, w)
    assert plain.quantized is None
    assert relative_error(plain.values(), y) < 6e-3
    alone, both = gate_up_silu.gated_linear(x, w, [feeds]), gate_up_silu.gated_linear(Activation(None, given), w, [feeds, None])
    assert alone.dense is None
    assert torch.equal(both.values(), plain.values())
    for made in (alone, both):
        assert made.quantized is not None
        assert made.quantized.scale.shape == (40, 1)
        assert relative_error(values_of(made.quantized, 128), y) < 0.04
    by_token = gpu.PackedScaledMM(quantize(torch.randn(16, 128, device=x.device), SCHEMES["ptpc_fp8"], F8))
    made = gate_up_silu.gated_linear(x, w, [by_token])
    assert made.quantized is not None
    assert relative_error(made.quantized.codes.double() * made.quantized.scale, y) < 0.04


def test_what_is_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.ops.hopper.compile.missing", lambda: None)
    hopper, blocks = Platform(CPU, "sm_90"), block_gemm.Blocks()
    q = quantize(torch.randn(208, 256), FP8_BLOCK, F8)
    assert blocks.supports(q, hopper) is None
    assert "gfx942" in str(blocks.supports(q, Platform(CPU, "gfx942", fp8_dtype=F8)))
    assert q.scale is not None
    in_rows = QTensor(q.data, q.scale.repeat_interleave(128, 0)[:208], q.scheme, q.shape)
    assert blocks.supports(in_rows, hopper) is None
    assert "multiples of 16" in str(blocks.supports(quantize(torch.randn(208, 250), FP8_BLOCK, F8), hopper))
    assert "scale a row" in str(blocks.supports(quantize(torch.randn(16, 16), SCHEMES["ptpc_fp8"], F8), hopper))
    w, x = blocks.pack(q, hopper), torch.randn(40, 256).bfloat16()
    assert "multiple of 128" in str(block_gate_up_silu.refusal(x, w))
    assert "32 tokens" in str(block_gate_up_silu.refusal(x[:32], w))
    assert "BF16" in str(block_gate_up_silu.refusal(x.float(), w))
    assert "Hopper" in str(block_gate_up_silu.refusal(x, gpu.PackedBlocks(q)))
    assert "per row" in str(block_gate_up_silu.refusal(x, block_gemm.PackedBlocks(in_rows, 132)))
    assert block_gate_up_silu.refusal(x, block_gemm.PackedBlocks(quantize(torch.randn(256, 256), FP8_BLOCK, F8), 132)) is None
    assert w.reads == CodeFormat(F8, Granularity.BLOCK, 256)


@needs_hopper
def test_it_is_the_one_that_is_used() -> None:
    platform = detect()
    ops.bind(platform)
    q, down = (quantize(torch.randn(n, 512, device=platform.device), FP8_BLOCK, F8) for n in (1024, 128))
    w, feeds = ops.pack(q, platform), ops.pack(down, platform)
    assert isinstance(w, block_gemm.PackedBlocks)
    assert "WGMMA" in ops.table()["linear[fp8_block]"]
    x = torch.randn(200, 512, device=platform.device).bfloat16()
    assert relative_error(ops.linear(x, w), gpu.PackedBlocks(q)(x)) < 4e-3
    found, before = ops.gated_linear(x, w, [feeds]).quantized, gpu.silu_mul(gpu.PackedBlocks(q)(x), [feeds]).quantized
    assert found is not None
    assert before is not None
    assert relative_error(values_of(found, 512), values_of(before, 512)) < 0.03  # codes that a last bit moves
