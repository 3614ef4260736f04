"""Requests over an FP8 cache of blocks of 64, as a GPU's engine lays it out, and their attention in float64."""

from __future__ import annotations

import pytest
import torch

from octavo import batch as batches
from octavo.kvcache import KVCache, Layout, Views, spec_for
from octavo.ops.resident import attention
from octavo.platform import detect

__all__ = ["K_SCALE", "V_SCALE", "cache_of", "exact", "needs_hopper", "scene"]

needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs sm_90"
)

K_SCALE, V_SCALE = 0.04, 0.02


def cache_of(blocks: int, heads: int, kv: str = "fp8_e4m3", dim: int = 128, block: int = 64) -> Views:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = spec_for(kv, heads, dim, torch.bfloat16, torch.float8_e4m3fn, Layout.MATRIX_UNIT)
    return KVCache([spec], blocks, block, device).views[0]


def scene(rows: list[tuple[int, int]], heads: int, kv_heads: int) -> tuple[Views, batches.ForwardBatch, torch.Tensor]:
    """A full cache, the batch of requests of (tokens before this step, tokens in this step), their queries."""
    torch.manual_seed(0)
    platform = detect()
    attention.configure(platform)
    needed = [-(-(before + n) // 64) for before, n in rows]
    views = cache_of(sum(needed) + 3, kv_heads)
    for name in "kv":
        views[name].copy_((25 * torch.randn(views[name].shape, device=platform.device)).clamp(-448, 448))
    order, spans = torch.randperm(sum(needed) + 3).tolist(), []
    for (before, n), blocks in zip(rows, needed, strict=True):
        spans.append(batches.Span([0] * n, before, order[:blocks]))
        order = order[blocks:]
    q = torch.randn(sum(n for _, n in rows), heads, 128, device=platform.device).bfloat16()
    return views, batches.build(spans, 64, platform.device), q


def exact(q: torch.Tensor, views: Views, batch: batches.ForwardBatch) -> torch.Tensor:
    """Of the cache's codes and unrounded queries."""
    out, row = torch.empty(q.shape, dtype=torch.float64, device=q.device), 0
    for request, (count, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        ids = batch.block_tables[request, : -(-context // 64)].long()
        k, v = (views[name][ids].flatten(0, 1)[:context].double() for name in "kv")
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k * K_SCALE, v * V_SCALE))
        scores = torch.einsum("qhd,khd->hqk", q[row : row + count].double(), k) * q.shape[2] ** -0.5
        position = torch.arange(context - count, context, device=q.device)
        scores.masked_fill_(torch.arange(context, device=q.device) > position[:, None], float("-inf"))
        out[row : row + count] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        row += count
    return out
