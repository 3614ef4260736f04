"""Decode steps from captured graphs: the host then launches one graph where it would launch hundreds of kernels.

A graph is of one batch size and one bound on the contexts' length, which decides how many parts attention is split into;
bounds that make no difference at a size share its graph. A step takes the next larger of both; the rows that are left over
write to the scratch block and are dropped.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from octavo.batch import ForwardBatch, Span
from octavo.errors import OctavoError
from octavo.platform import Platform

__all__ = ["DecodeGraphs"]

CONTEXTS = (512, 4096, 32768)  # bounds on the longest context, besides the model's own
LARGEST = 512  # requests; a larger batch keeps the device busy without graphs


@dataclass
class _Graph:
    replay: Callable[[], None]
    hidden: Tensor


class DecodeGraphs:
    """Graphs of `forward` for batches of one token a request, up to `max_num_seqs` requests and `max_model_len` tokens.

    `variant(requests, longest context)` is equal where `forward` launches the same.
    """

    def __init__(
        self,
        forward: Callable[[ForwardBatch], Tensor],
        platform: Platform,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        scratch_block: int,
        variant: Callable[[int, int], Hashable],
    ):
        self.platform, self.block_size, self.scratch_slot = platform, block_size, scratch_block * block_size
        self.sizes = _sizes(min(max_num_seqs, LARGEST))
        self.contexts = [*(c for c in CONTEXTS if c < max_model_len), max_model_len]
        rows, width = self.sizes[-1], -(-max_model_len // block_size)
        device = platform.device
        self.inputs = torch.zeros(3, rows, dtype=torch.int64, device=device)  # token ids, positions, slots
        self.lengths = torch.ones(rows, dtype=torch.int32, device=device)
        self.tables = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self.starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self.inputs[2] = self.scratch_slot
        try:
            self._capture(forward, variant)
        except torch.OutOfMemoryError:
            raise OctavoError(
                "no memory was left to capture graphs in: lower --gpu-memory-utilization or --max-num-seqs, "
                "or decode without graphs (--enforce-eager)."
            ) from None

    def _capture(self, forward: Callable[[ForwardBatch], Tensor], variant: Callable[[int, int], Hashable]) -> None:
        pool = None
        for size in reversed(self.sizes):  # the largest first: the others find room in the memory that it leaves
            made: dict[Hashable, _Graph] = {}
            for context in reversed(self.contexts):
                if (key := variant(size, context)) not in made:
                    batch = self._batch(size, context)
                    forward(batch)  # compiles what is not compiled yet, which a capture could not
                    replay, hidden, pool = self.platform.capture(lambda batch=batch: forward(batch), pool)  # type: ignore[misc]
                    made[key] = _Graph(replay, hidden)
                self._graphs[size, context] = made[key]

    def __len__(self) -> int:
        """Graphs that were captured."""
        return len({id(graph) for graph in self._graphs.values()})

    def _batch(self, size: int, context: int) -> ForwardBatch:
        ids, positions, slots = self.inputs[:, :size]
        return ForwardBatch(
            ids, positions, slots, self.starts[: size + 1], self.lengths[:size], self.tables[:size],
            [1] * size, [context] * size, self.block_size, {},
        )  # fmt: skip

    def run(self, spans: Sequence[Span], tokens: Tensor | None, sources: Sequence[int]) -> Tensor | None:
        """Hidden states [len(spans), hidden] of one token a span; None where there are more spans than any graph has.

        The token of span i is tokens[sources[i]] where sources[i] is not negative. What is returned lasts until the next call.
        """
        count = len(spans)
        if count > self.sizes[-1]:
            return None
        size = self.sizes[bisect_left(self.sizes, count)]
        last = [span.start for span in spans]
        context = self.contexts[bisect_left(self.contexts, max(last) + 1)]
        host = self._pinned((4, size), torch.int64)
        numbers = host.numpy()
        numbers[:, count:] = np.array([[0], [0], [self.scratch_slot], [-1]])
        numbers[0, :count] = [span.token_ids[0] for span in spans]
        numbers[1, :count] = last
        block = self.block_size
        numbers[2, :count] = [span.block_ids[p // block] * block + p % block for span, p in zip(spans, last, strict=True)]
        numbers[3, :count] = sources
        sent = host.to(self.platform.device, non_blocking=True)
        self.inputs[:, :size].copy_(sent[:3])
        if tokens is not None:
            given = sent[3]
            self.inputs[0, :size] = torch.where(given < 0, sent[0], tokens[given.clamp(min=0)])
        self.lengths[:size].copy_(sent[1] + 1)
        width = max(last) // self.block_size + 1
        table = self._pinned((size, width), torch.int32)
        rows = table.numpy()
        rows[:] = 0
        for row, span in zip(rows, spans, strict=False):
            held = min(len(span.block_ids), width)
            row[:held] = span.block_ids[:held]
        self.tables[:size, :width].copy_(table, non_blocking=True)
        graph = self._graphs[size, context]
        graph.replay()
        return graph.hidden[:count]

    def _pinned(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=not self.platform.is_cpu)


def _sizes(most: int) -> list[int]:
    """Batch sizes that waste little: an eighth at most from 8 on."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, LARGEST + 1, 64)]
    return [size for size in sizes if size < most] + [most]
