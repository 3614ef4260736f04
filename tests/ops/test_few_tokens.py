"""Products of few tokens by csrc/few_tokens_gemm.cu, against float64; and that it compiles where there is no GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import relative_error
from ops.cases import over

pytest.importorskip("triton", reason="needs Triton, which this torch came without")

from octavo import ops
from octavo.ops import gpu
from octavo.ops.hopper import block_gemm, few_tokens
from octavo.ops.hopper import compile as compiler
from octavo.platform import Platform, detect
from octavo.quant import SCHEMES, quantize
from tests.ops.megakernels import dumped
from tests.ops.paged import needs_hopper
from tests.ops.shapes import LINEAR

F8, CPU = torch.float8_e4m3fn, torch.device("cpu")
# Tokens, N, K: beside those of all linear layers Qwen3-30B-A3B's qkv and o, tails of N and K, parts of K without a step.
SHAPES = [
    *(shape for shape in LINEAR if 0 < shape[0] <= 32 and shape[1] % 8 == 0), (32, 5120, 2048), (8, 2048, 4096), (31, 72, 1100),
    (2, 200, 8192), (32, 4096, 1168),
]  # fmt: skip


@pytest.mark.skipif(compiler.missing() is not None, reason=f"needs NVRTC: {compiler.missing()}")
@pytest.mark.parametrize("blocks", [0, 1])
@pytest.mark.parametrize("splits", few_tokens.SPLITS)
def test_it_compiles(splits: int, blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For sm_90: nothing spilled, FP8 matrix instructions of a group of warps, loads from the cluster's shared memory."""
    monkeypatch.setattr(compiler, "KEPT", tmp_path / "kept")
    stacks, code = dumped(
        compiler.compile_cubin("few_tokens_gemm.cu", "sm_90a", {"SPLITS": splits, "BLOCKS": blocks}), tmp_path
    )
    assert stacks == ["0"]
    assert len(re.findall(r"QGMMA\.64x32x32\.F32\.E4M3\.E4M3", code)) == 4
    assert "UTMALDG.2D" in code
    assert "UCGABAR_ARV" in code


def dense(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The values of codes with a scale a row, for each 128 of a row, or for each tile of 128 x 128."""
    height = 1 if len(scale) == len(codes) else 128
    width = 1 if scale.shape[1] == 1 else 128
    scale = scale.double().repeat_interleave(height, 0)[: len(codes)].repeat_interleave(width, 1)
    return codes.double() * scale[:, : codes.shape[1] if width > 1 else 1]


@needs_hopper
@over("scheme", ["ptpc_fp8", "fp8_block"])
@over("splits", few_tokens.SPLITS)
@over("shape", SHAPES)
def test_it_multiplies(shape: tuple[int, int, int], splits: int, scheme: str) -> None:
    """As exact as its BF16 results are, and the same bits each time."""
    on = detect()
    ops.bind(on)
    m, n, k = shape
    q = quantize(torch.randn(n, k, device=on.device) * torch.rand(n, 1, device=on.device), SCHEMES[scheme], F8).padded(16)
    w: few_tokens.PackedScaledMM | block_gemm.PackedBlocks
    if scheme == "fp8_block":
        w, kernels = block_gemm.PackedBlocks(q, 132), few_tokens.BLOCK_KERNELS
    else:
        w, kernels = few_tokens.PackedScaledMM(q, 132), few_tokens.KERNELS
    if -(-k // 128) > splits * few_tokens.STEPS:
        return
    kernels.configure(on)
    given = w.codes(torch.randn(m, k, device=on.device).bfloat16())
    outs = [few_tokens.multiply(given, w, splits) for _ in range(2)]
    assert outs[0] is not None
    assert outs[1] is not None
    assert torch.equal(outs[0], outs[1])
    scale = w.scale if scheme == "fp8_block" else w.scale.T
    assert relative_error(outs[0], dense(*given) @ dense(w.weight, scale)[:n].T) < 3e-3


@needs_hopper
@over("scheme", ["ptpc_fp8", "fp8_block"])
def test_it_is_the_one_that_is_used(scheme: str) -> None:
    on = detect()
    ops.bind(on)
    w = ops.pack(quantize(torch.randn(512, 1024, device=on.device), SCHEMES[scheme], F8), on)
    assert isinstance(w, few_tokens.PackedScaledMM | block_gemm.PackedBlocks)
    assert "WGMMA" in ops.table()[f"linear[{scheme}]"]
    base = gpu.PackedScaledMM if scheme == "ptpc_fp8" else gpu.PackedBlocks
    for tokens in (1, 32, 33):
        x = torch.randn(tokens, 512 * 2, device=on.device).bfloat16()
        with pytest.MonkeyPatch.context() as patch:
            if tokens <= 32:
                patch.setattr(base, "_product", lambda *_: pytest.fail("Triton's was launched"))
            found = ops.linear(x, w)
        assert relative_error(found, base._product(w, w.codes(x))) < 4e-3  # type: ignore[arg-type]


def test_into_how_many_parts_k_is_split() -> None:
    def splits(rows: int, depth: int) -> int | None:
        return few_tokens.splits_of(rows, depth, 132)

    assert [splits(*shape) for shape in ((5120, 2048), (2048, 4096), (4096, 4096), (2048, 8192))] == [2, 4, 4, 8]
    assert splits(2048, 16384) is None  # a part is more than shared memory holds
    assert splits(28672, 2048) is None  # more CTAs than are resident
    assert splits(64, 128) is None  # K is one step


def test_what_is_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.ops.hopper.compile.missing", lambda: None)
    q, own = quantize(torch.randn(208, 256), SCHEMES["ptpc_fp8"], F8), few_tokens.ScaledMM()
    hopper = Platform(CPU, "sm_90", fp8_dtype=F8)
    assert own.supports(q, hopper) is None
    assert "sm_100" in str(own.supports(q, Platform(CPU, "sm_100", fp8_dtype=F8)))
    assert own.supports(quantize(torch.randn(208, 256), SCHEMES["fp8_block"], F8), hopper) is not None
    assert few_tokens.PackedScaledMM(q, 132).splits == 2
    assert few_tokens.PackedScaledMM(quantize(torch.randn(204, 256), SCHEMES["ptpc_fp8"], F8).padded(16), 132).splits is None
