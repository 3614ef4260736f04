"""Tensor maps of the KV cache for prefill_attention.cu and decode_attention.cu, and which caches and queries they support."""

from __future__ import annotations

import torch

from octavo.kvcache import LayerCache, Views
from octavo.ops.hopper.compile import no_warpgroups, tensor_map
from octavo.platform import Platform

__all__ = ["BLOCK", "DIM", "cache_maps", "refusal"]

DIM, BLOCK = 128, 64  # of a head; tokens of a block


def refusal(platform: Platform, queries: torch.dtype, cache: LayerCache, window: int | None) -> str | None:
    """None, or the reason why these kernels do not support such queries over this cache."""
    views = cache.views
    k, v = views["k"], views["v"]
    heads, dim = k.shape[2:]
    if (reason := no_warpgroups(platform)) is not None:
        return reason
    if k.dtype is not torch.float8_e4m3fn or "k_scale" in views:
        return "not a cache of e4m3 with one scale"
    if max(cache.k_scale.numel(), cache.v_scale.numel()) > 1:
        return "scales a head are Triton's"
    if queries is not torch.bfloat16 or dim != DIM or window is not None:
        return f"not BF16 queries of {DIM} dimensions that see their whole context"
    size = heads * DIM
    expected = (2 * BLOCK * size, size, DIM, 1), (2 * BLOCK * size, 1, DIM * BLOCK, BLOCK)
    if k.shape[1] != BLOCK or (k.stride(), v.stride()) != expected or v.data_ptr() - k.data_ptr() != BLOCK * size:
        return f"not blocks of {BLOCK} tokens, keys before values, values with their tokens last"
    return None


def cache_maps(views: Views) -> bytes:
    """(tensor map of keys, of values) for a cache [blocks, 64, heads, 128].

    Keys: TMA permutes a block's tokens, pairs four apart, so that each 16 are in the register order of a WGMMA accumulator.
    Values: a head's values of a block are 128 rows of 64 tokens.
    """
    k, v = views["k"], views["v"]
    blocks, token = k.shape[0], k.stride(1)
    sizes, strides = (token, 2, 4, 2, 2 * blocks * BLOCK // 16), (token, 4 * token, 2 * token, 16 * token)
    keys = tensor_map(k, sizes, strides, (DIM, 2, 4, 2, BLOCK // 16))
    return keys + tensor_map(v, (BLOCK, token, blocks), (BLOCK, k.stride(0)), (BLOCK, DIM, 1))
