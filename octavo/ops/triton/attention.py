"""Attention of a mixed batch: the requests at its front that bring one token each decode, the rest are prefills."""

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

WAVE = SHARING[128]  # programs of decode attention that a multiprocessor surely runs at a time
STAGED = 1 << 17  # positions; a longer context is laid out by itself


def prefills(
    q: Tensor, out: Tensor, cache: LayerCache, batch: ForwardBatch, first: int, scale: float, window: int | None
) -> None:
    """The rows of q and out [T, H, D] that belong to the requests from `first` on."""
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
    """`rope_write_kv`, then attention; in one launch where every request brings one token and all programs are there at once:
    in waves of them, what each does before it reads the cache is paid for again and again (5% of A at 256 requests)."""
    requests = len(batch.query_lens)
    if max(batch.query_lens) > 1 or requests * k.shape[1] > WAVE * device_units():
        return attention(rope_write_kv(q, k, v, rope, cache, batch.slot_mapping), cache, batch, scale, window)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    new = New(k, v, rope, batch.slot_mapping)
    decode_attention(q, out, cache, batch, requests, max(batch.context_lens), scale, window, new=new)
    return out


def _groups(contexts: Sequence[int], first: int) -> Iterator[tuple[int, int]]:
    """Prefills whose contexts are laid out at a time, so that shared prefixes, however many, take no more memory."""
    staged, start = 0, first
    for request in range(first, len(contexts)):
        if staged and staged + contexts[request] > STAGED:
            yield start, request
            staged, start = 0, request
        staged += contexts[request]
    if start < len(contexts):
        yield start, len(contexts)
