"""Attention of a mixed batch: the requests at its front that bring one token each decode, the rest are prefills."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.kvcache import Views
from octavo.ops.triton.decode import decode_attention
from octavo.ops.triton.prefill import prefill_attention

__all__ = ["attention"]


def attention(
    q: Tensor, views: Views, batch: ForwardBatch, scale: float, window: int | None, k_scale: float, v_scale: float
) -> Tensor:
    q = q.contiguous()
    out = torch.empty_like(q)
    requests = len(batch.query_lens)
    decodes = next((i for i, n in enumerate(batch.query_lens) if n != 1), requests)
    if decodes:
        longest = max(batch.context_lens[:decodes])
        decode_attention(q, out, views, batch, decodes, longest, scale, window, k_scale, v_scale)
    if decodes < requests:
        prefill_attention(q, out, views, batch, decodes, scale, window, k_scale, v_scale)
    return out
