"""Attention over an FP8 cache on sm_90 by csrc/decode_attention.cu and csrc/prefill_attention.cu; all else goes to Triton."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.kvcache import LayerCache
from octavo.ops import gpu
from octavo.ops.contract import Rope
from octavo.ops.hopper import cache_blocks
from octavo.ops.hopper.compile import Kernels
from octavo.ops.hopper.decode import HEADS, MAX_COUNTERS, DecodeAttention
from octavo.ops.hopper.prefill import MAX_GROUP, PrefillAttention
from octavo.ops.triton import decode, launch
from octavo.ops.triton.attention import prefills
from octavo.ops.triton.decode import New
from octavo.platform import Platform

__all__ = [
    "DECODE", "PER_TOKEN_HEAD_DECODE", "PER_TOKEN_HEAD_PREFILL", "PREFILL", "attend", "attention", "configure",
    "decode_refusal", "decode_variant", "is_long", "prefill_refusal",
]  # fmt: skip

# decode_attention.cu is the faster kernel for up to this many (request, KV head) pairs per SM: by 14% of attention at 32
# requests, by 4 to 7% at 128 to 224. At 248 requests, writing the new values while others are read costs it 1% more than two
# launches (one H100, 700 to 1,280 tokens each). Where each token has its scale, it is the faster one at 256, too: by 14% (one
# H200, 1,152 tokens each).
MAX_ITEMS = 14

# Total context from which decode_attention.cu is the faster kernel between launches of layer_megakernel.cu, too, and for so few
# requests that an SM has one pair of request and KV head or less. It reads 3% faster but starts later, since the two do not fit
# into shared memory together (H100: 3% of a step slower at 36,864 tokens, 4% faster at 528,000; H200, op by op: 32 requests of
# 1,152 tokens over 4 KV heads 3.2 µs slower).
LONG = 1 << 18

PREFILL, PER_TOKEN_HEAD_PREFILL = (
    Kernels(
        "prefill_attention.cu", "prefill_attention", "attention of many tokens is Triton's", (), [()], PER_TOKEN_HEAD=scales
    ) for scales in (0, 1)
)  # fmt: skip
DECODE, PER_TOKEN_HEAD_DECODE = (
    Kernels(
        "decode_attention.cu", "decode_attention", "attention of single tokens is Triton's", ("HEADS",), [(n,) for n in HEADS],
        PER_TOKEN_HEAD=scales,
    ) for scales in (0, 1)
)  # fmt: skip


def configure(platform: Platform) -> None:
    for kernels in (PREFILL, DECODE):
        kernels.configure(platform)
    for kernels in (PER_TOKEN_HEAD_PREFILL, PER_TOKEN_HEAD_DECODE):
        kernels.configure(platform, now=False)  # compiled for a model whose cache has such scales


@cache
def _prefill(device: torch.device, per_token_head: bool) -> PrefillAttention | None:
    kernel = (PER_TOKEN_HEAD_PREFILL if per_token_head else PREFILL).kernel((), device)
    return None if kernel is None else PrefillAttention(kernel, device)


@cache
def _decode(device: torch.device, heads: int, per_token_head: bool) -> DecodeAttention | None:
    kernel = (PER_TOKEN_HEAD_DECODE if per_token_head else DECODE).kernel((heads,), device)
    return None if kernel is None else DecodeAttention(kernel, heads, device)


def prefill_refusal(q: Tensor, cache: LayerCache, window: int | None) -> str | None:
    """None, or the reason why Triton computes prefills of these queries [T, H, D] over this cache."""
    if q.shape[1] > MAX_GROUP * cache.views["k"].shape[2]:
        return f"more than {MAX_GROUP} query heads of a KV head"
    return cache_blocks.refusal(PREFILL.platform, q.dtype, cache, window)


def decode_refusal(q: Tensor, cache: LayerCache, window: int | None, requests: int, new: New | None = None) -> str | None:
    """None, or the reason why Triton computes decodes of these queries [T, H, D] over this cache."""
    kv_heads = cache.views["k"].shape[2]
    if q.shape[1] > HEADS[-1] * kv_heads:
        return f"more than {HEADS[-1]} query heads of a KV head"
    if kv_heads > launch.device_units() or requests * kv_heads > MAX_COUNTERS:
        return "more KV heads than CTAs, or more requests than counters"
    few = cache_blocks.per_token_head(cache) or requests * kv_heads <= MAX_ITEMS * launch.device_units()
    if new is not None and not few:
        return "so many requests that writing and reading are better apart"
    if new is not None and new.rope.cos_sin.shape[1] % 8:
        return "rotated dimensions that are not a multiple of 8"
    given = (q,) if new is None else (q, new.k, new.v)
    if any(x.data_ptr() % 8 or x.stride(0) % 4 or x.stride()[1:] != (x.shape[2], 1) for x in given):
        return "heads that are not adjacent, or not at multiples of 8 bytes"
    return cache_blocks.refusal(DECODE.platform, q.dtype, cache, window)


def _prefills(
    q: Tensor, out: Tensor, cache: LayerCache, batch: ForwardBatch, first: int, scale: float, window: int | None
) -> None:
    if (reason := prefill_refusal(q, cache, window)) is not None:
        PREFILL.refused(reason)
    if reason is not None or (kernel := _prefill(q.device, cache_blocks.per_token_head(cache))) is None:
        prefills(q, out, cache, batch, first, scale, window)
    else:
        kernel(q, out, cache, batch, first, len(batch.query_lens), scale)


def _decode_attention(
    q: Tensor, out: Tensor, cache: LayerCache, batch: ForwardBatch, requests: int, scale: float, window: int | None,
    new: New | None = None,
) -> bool:  # fmt: skip
    """Run decodes by the CUDA kernel if it supports them; returns whether it did."""
    if (reason := decode_refusal(q, cache, window, requests, new)) is not None:
        DECODE.refused(reason)
        return False
    heads = next(heads for heads in HEADS if q.shape[1] <= heads * cache.views["k"].shape[2])
    kernel = _decode(q.device, heads, cache_blocks.per_token_head(cache))
    if kernel is None:
        return False
    kernel(q, out, cache, batch, requests, scale, new)
    return True


def _decode_or_triton(
    q: Tensor, out: Tensor, cache: LayerCache, batch: ForwardBatch, requests: int, longest: int, scale: float,
    window: int | None,
) -> None:  # fmt: skip
    if not _decode_attention(q, out, cache, batch, requests, scale, window):
        decode.decode_attention(q, out, cache, batch, requests, longest, scale, window)


def is_long(requests: int, longest: int) -> bool:
    """Whether decode_attention.cu is faster than Triton's kernel between launches of layer_megakernel.cu."""
    return requests * longest >= LONG


def decode_variant(requests: int, kv_heads: int, width: int, longest: int) -> int:
    """A key of the launches of decode steps with contexts up to `longest`: equal keys, equal launches."""
    return 2 * gpu.decode_variant(requests, kv_heads, width, longest) + is_long(requests, longest)


def attention(q: Tensor, cache: LayerCache, batch: ForwardBatch, scale: float, window: int | None) -> Tensor:
    return gpu.attention(q, cache, batch, scale, window, _decode_or_triton, _prefills)


def attend(
    q: Tensor, k: Tensor, v: Tensor, rope: Rope, cache: LayerCache, batch: ForwardBatch, scale: float, window: int | None
) -> Tensor:
    """`rope_write_kv`, then attention; fused in one launch if every request has one token."""
    if max(batch.query_lens) == 1:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        new, requests = New(k, v, rope, batch.slot_mapping), len(batch.query_lens)
        few = requests * k.shape[1] <= launch.device_units() and not is_long(requests, max(batch.context_lens))
        if not few and _decode_attention(q, out, cache, batch, requests, scale, window, new):
            return out
        return gpu.attend(q, k, v, rope, cache, batch, scale, window)
    return attention(gpu.rope_write_kv(q, k, v, rope, cache, batch.slot_mapping), cache, batch, scale, window)
