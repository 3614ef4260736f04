"""Paged attention on a CPU by torch: one-token requests are batched into one product; each prefill is its own.

Keys and values are gathered by block, widened to FP32, and multiplied in FP32. Widened codes are smaller than their values by a
power of two, which is folded into the softmax scale for keys and into the output for values. The scales of the layer or its
heads are likewise folded into queries and the output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.batch import ForwardBatch, Key
from octavo.kvcache import LayerCache, Views, gather
from octavo.ops.cpu.widen import WIDEN_FACTOR, widen
from octavo.ops.reference import write_kv
from octavo.platform import FP8_MAX

__all__ = ["attention", "write_kv"]

GROUP_VALUES = 1 << 23  # key values gathered at a time; bounds memory for long contexts


def attention(q: Tensor, cache: LayerCache, batch: ForwardBatch, scale: float, window: int | None) -> Tensor:
    out, views = torch.empty_like(q), cache.views
    fp8 = views["k"].dtype if views["k"].dtype in FP8_MAX else None
    factor = WIDEN_FACTOR[fp8] if fp8 else 1.0
    by_layer = fp8 is not None and "k_scale" not in views
    repeats = q.shape[1] // views["k"].shape[2]

    def of_query_heads(scales: Tensor) -> Tensor:
        """[1 or H, 1, 1]"""
        return (scales if scales.numel() == 1 else scales.repeat_interleave(repeats)).view(-1, 1, 1)

    k_scale, v_scale = (of_query_heads(s) for s in (cache.k_scale, cache.v_scale))
    for rows, table, mask, empty in _groups(batch, views, window):
        blocks = gather(views, table.flatten())
        k, v = (_widened(blocks, name, table.shape[0]) for name in ("k", "v"))
        # [requests, tokens, heads, dim] -> heads before tokens
        group_q = q[rows].unflatten(0, (table.shape[0], -1)).transpose(1, 2).float()
        if by_layer:
            group_q = group_q * k_scale
        o = F.scaled_dot_product_attention(group_q, k, v, mask, scale=scale * factor, enable_gqa=True)
        if factor != 1.0:
            o *= factor
        if by_layer:
            o *= v_scale
        out[rows] = o.masked_fill_(empty, 0).transpose(1, 2).flatten(0, 1).to(q.dtype)
    return out


def _widened(blocks: Views, name: str, requests: int) -> Tensor:
    """Gathered blocks, in the requests' order, dequantized to FP32 [requests, heads, tokens, dim]."""

    def by_head(x: Tensor) -> Tensor:  # [blocks, block_size, heads, ...] -> [requests, heads, blocks, block_size, ...]
        return x.view(requests, -1, *x.shape[1:]).movedim(3, 1)

    view = blocks[name]
    if view.dtype not in FP8_MAX:
        return by_head(view).to(torch.float32, memory_format=torch.contiguous_format).flatten(2, 3)
    values = widen(by_head(view.view(torch.uint8)), view.dtype).flatten(2, 3)
    if (scales := blocks.get(f"{name}_scale")) is not None:
        values *= by_head(scales).flatten(2, 3).unsqueeze(-1)
    return values


Group = tuple[slice, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class _Groups(Key[list[Group]]):
    window: int | None
    values_per_token: int


def _groups(batch: ForwardBatch, views: Views, window: int | None) -> list[Group]:
    """(rows of the batch, block table, additive mask, mask of empty requests) of each product; shared by a step's layers."""
    _, _, heads, dim = views["k"].shape
    return batch.cache.get(_Groups(window, heads * dim), lambda: _make_groups(batch, window, heads * dim))


def _make_groups(batch: ForwardBatch, window: int | None, values_per_token: int) -> list[Group]:
    groups: list[Group] = []
    request, row, total = 0, 0, len(batch.query_lens)
    while request < total:
        query_len, longest = batch.query_lens[request], batch.context_lens[request]
        last = request + 1
        # Adjacent one-token requests share a product while padding to the longest context stays within GROUP_VALUES.
        while query_len == 1 and last < total and batch.query_lens[last] == 1:
            padded = max(longest, batch.context_lens[last])
            if padded * values_per_token * (last + 1 - request) > GROUP_VALUES:
                break
            longest, last = padded, last + 1
        width = max(1, -(-longest // batch.block_size))
        table = batch.block_tables[request:last, :width].long()
        context = batch.seq_lens[request:last].long().view(-1, 1, 1)
        empty = (context == 0).unsqueeze(1)
        at = context - query_len + torch.arange(query_len).view(1, -1, 1)
        keys = torch.arange(width * batch.block_size).view(1, 1, -1)
        hidden = keys > at
        if window is not None:
            hidden |= keys <= at - window
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf")).unsqueeze(1)
        groups.append((slice(row, row + query_len * (last - request)), table, mask, empty))
        row += query_len * (last - request)
        request = last
    return groups
