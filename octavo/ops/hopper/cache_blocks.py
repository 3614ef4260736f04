"""Tensor maps and scales of the KV cache for csrc/cache_blocks.cuh, and which caches and queries its kernels support."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kvcache import LayerCache, Views
from octavo.ops.hopper.compile import no_warpgroups, tensor_map
from octavo.platform import Platform

__all__ = ["BLOCK", "DIM", "cache_maps", "per_token_head", "refusal", "scales"]

DIM, BLOCK = 128, 64  # of a head; tokens of a block


def refusal(platform: Platform, queries: torch.dtype, cache: LayerCache, window: int | None) -> str | None:
    """None, or the reason why these kernels do not support such queries over this cache."""
    views = cache.views
    k, v = views["k"], views["v"]
    heads, dim = k.shape[2:]
    if (reason := no_warpgroups(platform)) is not None:
        return reason
    if k.dtype is not torch.float8_e4m3fn:
        return "not a cache of e4m3"
    if not per_token_head(cache) and max(cache.k_scale.numel(), cache.v_scale.numel()) > 1:
        return "scales a head are Triton's"
    if queries is not torch.bfloat16 or dim != DIM or window is not None:
        return f"not BF16 queries of {DIM} dimensions that see their whole context"
    size, of_block = heads * DIM, heads * (2 * BLOCK * DIM + (2 * BLOCK * 4 if per_token_head(cache) else 0))
    expected = (of_block, size, DIM, 1), (of_block, 1, DIM * BLOCK, BLOCK)
    if k.shape[1] != BLOCK or (k.stride(), v.stride()) != expected or v.data_ptr() - k.data_ptr() != BLOCK * size:
        return f"not blocks of {BLOCK} tokens, keys before values, values with their tokens last"
    if per_token_head(cache):
        places = [views[name].data_ptr() - k.data_ptr() for name in ("k_scale", "v_scale")]
        if views["k_scale"].stride() != (of_block // 4, 1, BLOCK) or places != [
            2 * BLOCK * size,
            BLOCK * (2 * size + 4 * heads),
        ]:
            return "not scales with their tokens last, behind the values"
    return None


def per_token_head(cache: LayerCache) -> bool:
    """Whether the cache has a scale for each token and head."""
    return "k_scale" in cache.views


def scales(cache: LayerCache) -> tuple[Tensor, Tensor]:
    """The scales of keys and of values that the kernels read: within the cache, or the layer's."""
    if per_token_head(cache):
        return cache.views["k_scale"], cache.views["v_scale"]
    return cache.k_scale, cache.v_scale


def cache_maps(views: Views) -> bytes:
    """(tensor map of keys, of values) for a cache [blocks, 64, heads, 128].

    Keys: TMA permutes a block's tokens, those of every second pair first, so that four adjacent ones are in one thread's
    accumulators of a WGMMA. Values: a head's values of a block are 128 rows of 64 tokens.
    """
    k, v = views["k"], views["v"]
    blocks, token = k.shape[0], k.stride(1)
    sizes, strides = (token, 2, BLOCK // 4, 2, blocks), (token, 4 * token, 2 * token, k.stride(0))
    keys = tensor_map(k, sizes, strides, (DIM, 2, BLOCK // 4, 2, 1))
    return keys + tensor_map(v, (BLOCK, token, blocks), (BLOCK, k.stride(0)), (BLOCK, DIM, 1))
