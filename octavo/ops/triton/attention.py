"""Attention of a mixed batch: one-token requests, which come first, use the decode kernel; the rest are prefills."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.kvcache import LayerCache
from octavo.ops.contract import Rope
from octavo.ops.triton.decode import SHARING, New, decode_attention
from octavo.ops.triton.launch import device_units
from octavo.ops.triton.prefill import prefill_attention
from octavo.ops.triton.rope import rope_write_kv

__all__ = ["attend", "attention", "prefills"]

WAVE = SHARING[128]  # CTAs of decode attention that are surely resident on an SM at a time
STAGED = 1 << 17  # positions staged at a time; a longer context is staged by itself


def prefills(
    q: Tensor, out: Tensor, cache: LayerCache, batch: ForwardBatch, first: int, scale: float, window: int | None
) -> None:
    """The rows of q and out [T, H, D] of the requests from `first` on."""
    for start, stop in _groups(batch.context_lens, first):
        prefill_attention(q, out, cache, batch, start, stop, scale, window)


def attention(
    q: Tensor, cache: LayerCache, batch: ForwardBatch, scale: float, window: int | None,
    decode: Callable[..., None] = decode_attention, prefill: Callable[..., None] = prefills,
) -> Tensor:  # fmt: skip
    q = q.contiguous()
    out = torch.empty_like(q)
    requests = len(batch.query_lens)
    decodes = next((i for i, n in enumerate(batch.query_lens) if n != 1), requests)
    if decodes:
        decode(q, out, cache, batch, decodes, max(batch.context_lens[:decodes]), scale, window)
    if decodes < requests:
        prefill(q, out, cache, batch, decodes, scale, window)
    return out


def attend(
    q: Tensor, k: Tensor, v: Tensor, rope: Rope, cache: LayerCache, batch: ForwardBatch, scale: float, window: int | None
) -> Tensor:
    """`rope_write_kv`, then attention. The two are fused in one launch if every request has one token and all CTAs are resident
    at once: with several waves of CTAs, each would repeat the work before its first cache read (5% of A at 256 requests).
    """
    requests = len(batch.query_lens)
    if max(batch.query_lens) > 1 or requests * k.shape[1] > WAVE * device_units():
        return attention(rope_write_kv(q, k, v, rope, cache, batch.slot_mapping), cache, batch, scale, window)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    new = New(k, v, rope, batch.slot_mapping)
    decode_attention(q, out, cache, batch, requests, max(batch.context_lens), scale, window, new=new)
    return out


def _groups(contexts: Sequence[int], first: int) -> Iterator[tuple[int, int]]:
    """Groups of prefills whose contexts are staged together. This bounds the staging memory, however many requests share a
    prefix.
    """
    staged, start = 0, first
    for request in range(first, len(contexts)):
        if staged and staged + contexts[request] > STAGED:
            yield start, request
            staged, start = 0, request
        staged += contexts[request]
    if start < len(contexts):
        yield start, len(contexts)
