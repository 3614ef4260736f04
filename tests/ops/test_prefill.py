"""Attention of many tokens as one launch of csrc/prefill.cu, against float64; and that it compiles where there is no GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import relative_error

pytest.importorskip("triton")

from octavo import batch as batches
from octavo.kvcache import KVCache, Layout, Views, spec_for
from octavo.ops.resident import compile as compiler
from octavo.ops.resident import prefill
from octavo.ops.triton.prefill import prefill_attention as triton_prefill
from octavo.platform import detect
from tests.ops.test_resident import dumped

GROUPS = [(32, 8), (4, 4), (14, 2), (24, 8), (64, 1)]  # query heads, KV heads
# Requests as (tokens before this step, tokens in this step).
STEPS = {
    "two tokens": [(0, 2)],
    "a piece": [(0, 48)],
    "blocks and one more": [(0, 65), (63, 66), (128, 129)],
    "the end of a long prompt": [(4000, 17)],
    "many": [(97 * i % 500, 2 + 131 * i % 300) for i in range(9)],
}


@pytest.mark.skipif(compiler.missing() is not None, reason="needs NVRTC")
def test_it_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For sm_90: FP8 matrix instructions of a group of warps, four to a product, that the compiler does not make wait for each
    other; boxes from the cache itself."""
    monkeypatch.setattr(compiler, "KEPT", tmp_path / "kept")
    stacks, code = dumped(compiler.compile_cubin("prefill.cu", "sm_90a", {}), tmp_path)
    assert int(stacks[0]) <= 48  # the 160 registers of a thread are all in use: a few of what its loop does not touch are kept
    assert len(re.findall(r"QGMMA\.64x128x32\.F32\.E4M3\.E4M3", code)) == 8
    assert len(re.findall(r"WARPGROUP\.DEPBAR", code)) == 2
    assert "UTMALDG.5D" in code
    assert "UTMALDG.3D" in code


@pytest.mark.parametrize("group", [1, 4, 7, 64])
@pytest.mark.parametrize("rows", STEPS.values(), ids=STEPS)
def test_pieces_hold_every_row_once(rows: list[tuple[int, int]], group: int) -> None:
    queries, contexts = [n for _, n in rows], [before + n for before, n in rows]
    found = prefill.pieces(queries, contexts, 1, len(rows), group)
    seen = []
    for request, token, position, head, count in found:
        assert 0 < count <= prefill.ROWS
        assert head + count - 1 < 256  # what prefill.cu divides
        assert position - token == contexts[request] - queries[request] - sum(queries[:request])
        seen += [(token * group + head + i) for i in range(count)]
    assert sorted(seen) == list(range(queries[0] * group, sum(queries) * group))
    assert [piece[2] for piece in found] == sorted((piece[2] for piece in found), reverse=True)


def cache_of(blocks: int, heads: int, kv: str = "fp8_e4m3", dim: int = 128, block: int = 64) -> Views:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = spec_for(kv, heads, dim, torch.bfloat16, torch.float8_e4m3fn, Layout.MATRIX_UNIT)
    return KVCache([spec], blocks, block, device).views[0]


def test_what_it_is_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "missing", lambda: None)
    q = torch.zeros(3, 8, 128, dtype=torch.bfloat16)
    monkeypatch.setattr(prefill, "_arch", "sm_100")
    assert "sm_100" in str(prefill.refusal(q, cache_of(2, 2), None))
    monkeypatch.setattr(prefill, "_arch", "sm_90")
    assert prefill.refusal(q, cache_of(2, 2), None) is None
    assert prefill.refusal(q, cache_of(1, 8), None) is None
    assert "e4m3" in str(prefill.refusal(q, cache_of(2, 2, "auto"), None))
    assert "e4m3" in str(prefill.refusal(q, cache_of(2, 2, "fp8_e5m2"), None))
    assert "one scale" in str(prefill.refusal(q, cache_of(2, 2, "fp8_per_token_head"), None))
    assert "whole context" in str(prefill.refusal(q, cache_of(2, 2), 100))
    assert "128" in str(prefill.refusal(torch.zeros(3, 8, 64, dtype=torch.bfloat16), cache_of(2, 2, dim=64), None))
    assert "BF16" in str(prefill.refusal(q.float(), cache_of(2, 2), None))
    assert "64 tokens" in str(prefill.refusal(q, cache_of(2, 2, block=32), None))
    assert "64 query heads" in str(prefill.refusal(torch.zeros(1, 65, 128, dtype=torch.bfloat16), cache_of(2, 1), None))


def exact(q: torch.Tensor, views: Views, batch: batches.ForwardBatch, k_scale: float, v_scale: float) -> torch.Tensor:
    """Float64, of the cache's codes and unrounded queries."""
    out, row = torch.empty(q.shape, dtype=torch.float64, device=q.device), 0
    for request, (count, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        ids = batch.block_tables[request, : -(-context // 64)].long()
        k, v = (views[name][ids].flatten(0, 1)[:context].double() for name in "kv")
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k * k_scale, v * v_scale))
        scores = torch.einsum("qhd,khd->hqk", q[row : row + count].double(), k) * q.shape[2] ** -0.5
        position = torch.arange(context - count, context, device=q.device)
        scores.masked_fill_(torch.arange(context, device=q.device) > position[:, None], float("-inf"))
        out[row : row + count] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        row += count
    return out


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs sm_90")
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
@pytest.mark.parametrize("rows", STEPS.values(), ids=STEPS)
def test_it_computes_attention(rows: list[tuple[int, int]], heads: int, kv_heads: int) -> None:
    """As exact as rounding queries and probabilities to FP8 lets it be, and the same bits each time."""
    torch.manual_seed(0)
    platform = detect()
    prefill.configure(platform)
    contexts = [before + n for before, n in rows]
    needed = [-(-context // 64) for context in contexts]
    views = cache_of(sum(needed) + 3, kv_heads)
    for name in "kv":
        views[name].copy_((25 * torch.randn(views[name].shape, device=platform.device)).clamp(-448, 448))
    order = torch.randperm(sum(needed) + 3).tolist()
    spans = []
    for (before, n), blocks in zip(rows, needed, strict=True):
        spans.append(batches.Span([0] * n, before, order[:blocks]))
        order = order[blocks:]
    batch = batches.build(spans, 64, platform.device)
    q = torch.randn(sum(n for _, n in rows), heads, 128, device=platform.device).bfloat16()
    arguments = views, batch, 0, len(rows), 128**-0.5, None, 0.04, 0.02
    assert prefill.refusal(q, views, None) is None
    assert prefill._kernel(platform.device) is not None
    outs = [torch.full_like(q, float("nan")) for _ in range(3)]
    for out in outs[:2]:
        prefill.prefill_attention(q, out, *arguments)
    triton_prefill(q, outs[2], *arguments)
    assert torch.equal(outs[0], outs[1])
    expected = exact(q, views, batch, 0.04, 0.02)
    assert relative_error(outs[0], expected) < 1.02 * relative_error(outs[2], expected)
    assert relative_error(outs[0], expected) < 0.04
    assert relative_error(outs[0], outs[2]) < 0.012  # sums in another order, and codes that a last bit moves
