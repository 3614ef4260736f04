"""Attention of many tokens by prefill_attention.cu, against float64; and that it compiles where there is no GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import relative_error
from ops.cases import over

pytest.importorskip("triton", reason="needs Triton, which this torch came without")

from octavo.ops.hopper import attention, prefill
from octavo.ops.hopper import compile as compiler
from octavo.ops.triton.prefill import prefill_attention as triton_prefill
from tests.ops.megakernels import dumped
from tests.ops.paged import CACHES, exact, needs_hopper, scene

GROUPS = [(32, 8), (4, 4), (14, 2), (24, 8), (64, 1)]  # query heads, KV heads
# Requests as (tokens before this step, tokens in this step).
STEPS = {
    "two tokens": [(0, 2)],
    "a piece": [(0, 48)],
    "blocks and one more": [(0, 65), (63, 66), (128, 129)],
    "the end of a long prompt": [(4000, 17)],
    "many": [(97 * i % 500, 2 + 131 * i % 300) for i in range(9)],
}


@pytest.mark.skipif(compiler.missing() is not None, reason=f"needs NVRTC: {compiler.missing()}")
@pytest.mark.parametrize("scales", [0, 1])
def test_it_compiles(scales: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For sm_90: FP8 matrix instructions of a group of warps, four to a product, that the compiler does not make wait for each
    other; boxes from the cache itself."""
    monkeypatch.setattr(compiler, "KEPT", tmp_path / "kept")
    stacks, code = dumped(compiler.compile_cubin("prefill_attention.cu", "sm_90a", {"PER_TOKEN_HEAD": scales}), tmp_path)
    assert int(stacks[0]) <= 48  # the 160 registers of a thread are all in use: a few of what its loop does not touch are kept
    assert len(re.findall(r"QGMMA\.64x128x32\.F32\.E4M3\.E4M3", code)) == 8
    assert len(re.findall(r"WARPGROUP\.DEPBAR", code)) == 2
    assert "UTMALDG.5D" in code
    assert "UTMALDG.3D" in code


def test_division_by_a_factor_is_exact() -> None:
    """As prefill_attention.cu divides a row's place by the heads of its KV head."""
    for by in range(1, prefill.MAX_GROUP + 1):
        assert [x * (65536 // by + 1) >> 16 for x in range(256)] == [x // by for x in range(256)]


@over("group", [1, 4, 7, 64])
@over("rows", STEPS.values())
def test_pieces_hold_every_row_once(rows: list[tuple[int, int]], group: int) -> None:
    queries, contexts = [n for _, n in rows], [before + n for before, n in rows]
    found = prefill.pieces(queries, contexts, 1, len(rows), group)
    seen = []
    for request, token, position, head, count in found:
        assert 0 < count <= prefill.ROWS
        assert head + count - 1 < 256  # what prefill_attention.cu divides
        assert position - token == contexts[request] - queries[request] - sum(queries[:request])
        seen += [(token * group + head + i) for i in range(count)]
    assert sorted(seen) == list(range(queries[0] * group, sum(queries) * group))
    assert [piece[2] for piece in found] == sorted((piece[2] for piece in found), reverse=True)


@needs_hopper
@over("kv", CACHES)
@over("heads, kv_heads", GROUPS)
@over("rows", STEPS.values())
def test_it_computes_attention(rows: list[tuple[int, int]], heads: int, kv_heads: int, kv: str) -> None:
    """As exact as rounding queries and probabilities to FP8 lets it be, and the same bits each time."""
    cache, batch, q = scene(rows, heads, kv_heads, kv)
    assert attention.prefill_refusal(q, cache, None) is None
    kernel = attention._prefill(q.device, "k_scale" in cache.views)
    assert kernel is not None
    outs = [torch.full_like(q, float("nan")) for _ in range(3)]
    for out in outs[:2]:
        kernel(q, out, cache, batch, 0, len(rows), 128**-0.5)
    triton_prefill(q, outs[2], cache, batch, 0, len(rows), 128**-0.5, None)
    assert torch.equal(outs[0], outs[1])
    expected = exact(q, cache, batch)
    assert relative_error(outs[0], expected) < (0.04 if kv == "fp8_e4m3" else 0.06)  # scales of values differ: fewer weigh
    if kv == "fp8_e4m3":  # Triton's kernel multiplies values in BF16 where each token has its scale
        assert relative_error(outs[0], expected) < 1.02 * relative_error(outs[2], expected)
        assert relative_error(outs[0], outs[2]) < 0.012  # sums in another order, and codes that a last bit moves


@needs_hopper
def test_it_reads_the_scales_that_are_there() -> None:
    """Of many pieces, whichever program takes them; not those of the launch before."""
    cache, batch, q = scene([(0, 700), (128, 300)], 32, 8)
    kernel = attention._prefill(q.device, False)
    assert kernel is not None
    for k_scale, v_scale in ((0.013, 0.7), (0.031, 0.0191)):
        cache.k_scale.fill_(k_scale), cache.v_scale.fill_(v_scale)
        out = torch.full_like(q, float("nan"))
        kernel(q, out, cache, batch, 0, 2, 128**-0.5)
        assert relative_error(out, exact(q, cache, batch)) < 0.04
