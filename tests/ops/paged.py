"""Requests over an FP8 cache of blocks of 64, as a GPU's engine lays it out, and their attention in float64."""

from __future__ import annotations

import pytest
import torch

from octavo import batch as batches
from octavo.kvcache import KVCache, LayerCache, Layout, spec_for
from octavo.ops import gpu
from octavo.ops.hopper import attention
from octavo.ops.reference import SCALE_FLOOR
from octavo.platform import detect
from octavo.quant import SCHEMES, quantize
from tests.ops.caches import layer_cache

__all__ = ["CACHES", "K_SCALE", "V_SCALE", "cache_of", "exact", "needs_hopper", "requests", "scene", "weight"]

needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU (sm_90)"
)

K_SCALE, V_SCALE = 0.04, 0.02
CACHES = "fp8_e4m3", "fp8_per_token_head"


def cache_of(blocks: int, heads: int, kv: str = "fp8_e4m3", dim: int = 128, block: int = 64) -> LayerCache:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = spec_for(kv, heads, dim, torch.bfloat16, torch.float8_e4m3fn, Layout.TENSOR_CORE)
    return layer_cache(KVCache([spec], blocks, block, device).views[0], K_SCALE, V_SCALE)


def requests(rows: list[tuple[int, int]], kv_heads: int, kv: str = "fp8_e4m3") -> tuple[LayerCache, batches.ForwardBatch]:
    """A cache and the batch of requests of (tokens before this step, tokens in this step), whose blocks lie anywhere in it."""
    torch.manual_seed(0)
    needed = [-(-(before + n) // 64) for before, n in rows]
    order = iter(torch.randperm(sum(needed) + 3).tolist())
    spans = [
        batches.Span([0] * n, before, [next(order) for _ in range(blocks)])
        for (before, n), blocks in zip(rows, needed, strict=True)
    ]
    return cache_of(sum(needed) + 3, kv_heads, kv), batches.build(spans, 64, detect().device)


def scene(
    rows: list[tuple[int, int]], heads: int, kv_heads: int, kv: str = "fp8_e4m3"
) -> tuple[LayerCache, batches.ForwardBatch, torch.Tensor]:
    """A full cache, the batch of `requests`, their queries. Scales a token and head differ, of values by up to a thousand."""
    platform = detect()
    attention.configure(platform)
    cache, batch = requests(rows, kv_heads, kv)
    for name, scale, spread in (("k_scale", K_SCALE, 0.3), ("v_scale", V_SCALE, 1.5)):
        if name in cache.views:
            view = cache.views[name]
            view.copy_(scale * 2 ** (spread * torch.randn(view.shape, device=platform.device)).clamp(-5, 5))
    for name in "kv":
        view = cache.views[name]
        view.copy_((25 * torch.randn(view.shape, device=platform.device)).clamp(-448, 448))
    if "v_scale" in cache.views:  # values that are zero have the least scale
        cache.views["v"][:, 3::7] = 0
        cache.views["v_scale"][:, 3::7] = SCALE_FLOOR
    return cache, batch, torch.randn(batch.num_tokens, heads, 128, device=platform.device).bfloat16()


def weight(rows: int, columns: int) -> gpu.PackedScaledMM:
    """An FP8 weight whose rows are of different sizes."""
    device = detect().device
    w = torch.randn(rows, columns, device=device) * torch.rand(rows, 1, device=device)
    return gpu.PackedScaledMM(quantize(w.bfloat16(), SCHEMES["ptpc_fp8"], torch.float8_e4m3fn).padded(16))


def dequantized(cache: LayerCache, name: str, ids: torch.Tensor) -> torch.Tensor:
    """Keys or values of blocks, FP64 [tokens, heads, dim]."""
    codes = cache.views[name][ids].flatten(0, 1).double()
    if (scales := cache.views.get(f"{name}_scale")) is not None:
        return codes * scales[ids].flatten(0, 1).unsqueeze(-1)
    return codes * (cache.k_scale if name == "k" else cache.v_scale).view(-1, 1)


def exact(q: torch.Tensor, cache: LayerCache, batch: batches.ForwardBatch) -> torch.Tensor:
    """Of the cache's codes and unrounded queries."""
    out, row = torch.empty(q.shape, dtype=torch.float64, device=q.device), 0
    for request, (count, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        ids = batch.block_tables[request, : -(-context // 64)].long()
        k, v = (dequantized(cache, name, ids)[:context] for name in "kv")
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[row : row + count].double(), k) * q.shape[2] ** -0.5
        position = torch.arange(context - count, context, device=q.device)
        scores.masked_fill_(torch.arange(context, device=q.device) > position[:, None], float("-inf"))
        out[row : row + count] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        row += count
    return out
