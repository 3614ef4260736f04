"""Caches with their scales, and batches with rows that pad a graph, for tests of the ops."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from octavo.batch import ForwardBatch, StepCache
from octavo.kvcache import LayerCache, Views

__all__ = ["SCALES", "Scale", "layer_cache", "with_padding"]

Scale = float | Sequence[float]
# Of keys and of values: one a layer, one a head, and one of each; values that are no powers of two.
SCALES: dict[str, tuple[Scale, Scale]] = {
    "layer": (0.0371, 1.913),
    "heads": ([0.0131, 0.271], [0.733, 0.0173]),
    "keys by head": ([0.0131, 0.271], 0.0371),
    "values by head": (0.271, [0.733, 0.0173]),
}


def layer_cache(views: Views, k_scale: Scale = 1.0, v_scale: Scale = 1.0) -> LayerCache:
    """Views with a scale for the layer, or one for each of its heads."""
    device = views["k"].device
    return LayerCache(views, *(torch.tensor([s] if isinstance(s, float) else s, device=device) for s in (k_scale, v_scale)))


def with_padding(batch: ForwardBatch, rows: int, scratch_block: int, *, bound: int | None = None) -> ForwardBatch:
    """A batch of single tokens with `rows` more that have no context and go to the scratch block, as a decode graph has them.

    `bound`: what the host says of all contexts, as it does in a graph; None: it knows them.
    """
    assert set(batch.query_lens) == {1}

    def longer(x: torch.Tensor, value: int) -> torch.Tensor:
        return F.pad(x, (0, rows), value=value)

    count = len(batch.query_lens) + rows
    device = batch.input_ids.device
    return dataclasses.replace(
        batch,
        input_ids=longer(batch.input_ids, 0),
        positions=longer(batch.positions, 0),
        rotary_rows=longer(batch.rotary_rows, 0),
        slot_mapping=longer(batch.slot_mapping, scratch_block * batch.block_size),
        query_start_loc=torch.arange(count + 1, dtype=torch.int32, device=device),
        seq_lens=longer(batch.seq_lens, 0),
        block_tables=F.pad(batch.block_tables, (0, 0, 0, rows), value=scratch_block),
        query_lens=[1] * count,
        context_lens=[*batch.context_lens, *[0] * rows] if bound is None else [bound] * count,
        cache=StepCache(),
        live=torch.tensor([count - rows], dtype=torch.int32, device=device),
    )
