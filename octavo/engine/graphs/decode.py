"""Decode steps from captured CUDA graphs: the host launches one graph instead of hundreds of kernels.

A graph is captured for one batch size and one bound on the context length. The bound decides the number of attention splits
(split-KV); bounds with equal launches at a size share a graph. A step takes the next larger of both. Its padding rows have
length 0 and write to the scratch block, and their results are dropped.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from octavo import ops
from octavo.batch import ForwardBatch, Span, reads_pinned, to_device
from octavo.engine.graphs.block_tables import BlockTables
from octavo.errors import OctavoError
from octavo.models.interface import StageState
from octavo.platform import Platform

__all__ = ["LARGEST", "DecodeGraphs"]

CONTEXTS = (512, 4096, 32768)  # bounds on the longest context, beside the model's maximum
LARGEST = 512  # requests; a larger batch keeps the device busy without graphs
Forward = Callable[[ForwardBatch], tuple[Tensor, Tensor] | StageState]


@dataclass
class _Graph:
    replay: Callable[[], None]
    out: Tensor | StageState


class DecodeGraphs:
    """Graphs of `forward` for batches of one token per request, up to `max_num_seqs` requests and `max_model_len` tokens.

    `forward` returns logits [rows, vocab] and their argmax, int64 [rows], or, of a pipeline stage that is not the last, the
    next one's state. `variant(requests, longest context)` returns equal keys where the launches are equal. `warm_up` runs the
    other kernels that must be compiled before serving. `arrived` is called before each replay, for inputs of other sources.
    On a device that is only described, kernels are compiled and nothing is captured.
    """

    def __init__(
        self,
        forward: Forward,
        platform: Platform,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        scratch_block: int,
        variant: Callable[[int, int], Hashable],
        warm_up: Callable[[], None] = lambda: None,
        arrived: Callable[[], None] = lambda: None,
    ):
        self.arrived = arrived
        self.platform, self.block_size, self.scratch_slot = platform, block_size, scratch_block * block_size
        self.sizes = _sizes(min(max_num_seqs, LARGEST))
        self.contexts = [*(c for c in CONTEXTS if c < max_model_len), max_model_len]
        rows, width = self.sizes[-1], -(-max_model_len // block_size)
        device = platform.device
        # The tokens of the last replay, followed by the inputs that the host sends for the next one; see _sent.
        self.memory = torch.zeros(7 * rows, dtype=torch.int64, device=device)
        self.chosen = self.memory[:rows]
        self.tables = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self.known_tables = np.zeros((rows, width), np.int32)  # host copy of `tables`
        self.host_tables = BlockTables(width)
        self.starts = to_device(range(rows + 1), torch.int32, device)
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._forward = forward
        with ops.compile_ahead():
            warm_up()
            self._run_each_kernel(variant)
        if platform.is_described:
            return
        try:
            self._capture(variant)
        except torch.OutOfMemoryError:
            raise OctavoError(
                "no memory was left to capture graphs in: lower --gpu-memory-utilization or --max-num-seqs, "
                "or decode without graphs (--enforce-eager)."
            ) from None

    def _decode(self, size: int, context: int) -> Tensor | StageState:
        out = self._forward(self._batch(size, context))
        if isinstance(out, StageState):
            return out
        logits, tokens = out
        self.chosen[:size].copy_(tokens)
        return logits

    def _run_each_kernel(self, variant: Callable[[int, int], Hashable]) -> None:
        for size in self.sizes:
            if size & (size - 1) == 0 or size == self.sizes[-1]:  # the other sizes mostly launch the same kernels
                self._send(size, [], [], [], [], [])
                for context in {variant(size, context): context for context in self.contexts}.values():
                    self._decode(size, context)

    def _capture(self, variant: Callable[[int, int], Hashable]) -> None:
        pool = None
        for size in reversed(self.sizes):  # largest first, so that the smaller graphs fit into its memory pool
            self._send(size, [], [], [], [], [])
            made: dict[Hashable, _Graph] = {}
            for context in reversed(self.contexts):
                if (key := variant(size, context)) not in made:
                    self._decode(size, context)  # compiles kernels that are not compiled yet, which a capture could not
                    replay, out, pool = ops.capture(partial(self._decode, size, context), pool)
                    made[key] = _Graph(replay, out)
                self._graphs[size, context] = made[key]

    def __len__(self) -> int:
        """The number of captured graphs."""
        return len({id(graph) for graph in self._graphs.values()})

    def _sent(self, size: int) -> Tensor:
        """int64 [6 * size]: token ids, positions, rotary rows, slots, each row's token index in `memory`; then, as int32, the
        context lengths and the number of real rows."""
        return self.memory[len(self.chosen) : len(self.chosen) + 6 * size]

    def _batch(self, size: int, context: int) -> ForwardBatch:
        sent = self._sent(size)
        _, positions, rotary_rows, slots, place = sent[: 5 * size].view(5, size)
        lengths = sent[5 * size :].view(torch.int32)
        return ForwardBatch(
            self.memory[place], positions, rotary_rows, slots, self.starts[: size + 1], lengths[:size], self.tables[:size],
            [1] * size, [context] * size, self.block_size, lengths[size : size + 1],
        )  # fmt: skip

    def _send(
        self, size: int, ids: Sequence[int], last: Sequence[int], rotary_rows: Sequence[int], slots: Sequence[int],
        sources: Sequence[int],
    ) -> None:  # fmt: skip
        """One copy to the device. Rows past len(ids) are padding: length 0, written to the scratch block."""
        count, first = len(ids), len(self.chosen)
        host = torch.empty(6 * size, dtype=torch.int64, pin_memory=reads_pinned(self.platform.device))
        numbers, lengths = host[: 5 * size].view(5, size).numpy(), host[5 * size :].view(torch.int32).numpy()
        numbers[:, count:] = np.array([[0], [0], [0], [self.scratch_slot], [first]])
        for row, values in enumerate((ids, last, rotary_rows, slots, sources)):
            numbers[row, :count] = values
        places = numbers[4, :count]
        places[:] = np.where(places < 0, np.arange(first, first + count), places)
        lengths[:count], lengths[count:size], lengths[size:] = numbers[1, :count] + 1, 0, count
        self._sent(size).copy_(host, non_blocking=True)

    def _send_tables(self, spans: Sequence[Span], width: int) -> None:
        """Copies block tables to the device where they changed. A row changes once per block of tokens."""
        table = self.host_tables.of([span.block_ids for span in spans])[:, :width]
        known = self.known_tables[: len(spans), :width]
        if not np.array_equal(table, known):
            known[:] = table
            sent = torch.empty(table.shape, dtype=torch.int32, pin_memory=reads_pinned(self.platform.device))
            sent.numpy()[:] = table
            self.tables[: len(spans), :width].copy_(sent, non_blocking=True)

    def run(
        self, spans: Sequence[Span], tokens: Tensor | None, sources: Sequence[int]
    ) -> tuple[Tensor, Tensor] | StageState | None:
        """Logits [len(spans), vocab] of one token per span, and their argmax, int64 [len(spans)]; or the next stage's state.

        None where there are more spans than the largest graph has rows. The token of span i is tokens[sources[i]] where
        sources[i] is not negative. The results are valid until the next call.
        """
        count = len(spans)
        if count > self.sizes[-1] or (tokens is not None and len(tokens) > len(self.chosen)):
            return None
        size = self.sizes[bisect_left(self.sizes, count)]
        last, block = [span.start for span in spans], self.block_size
        context = self.contexts[bisect_left(self.contexts, max(last) + 1)]
        slots = [block_ids[p // block] * block + p % block for _, p, block_ids, _ in spans]
        rotary_rows = [p + delta for _, p, _, delta in spans]
        self._send(size, [token_ids[0] for token_ids, *_ in spans], last, rotary_rows, slots, sources)
        if tokens is not None and tokens.data_ptr() != self.chosen.data_ptr():
            self.chosen[: len(tokens)].copy_(tokens)
        self._send_tables(spans, max(last) // block + 1)
        graph = self._graphs[size, context]
        self.arrived()
        graph.replay()
        if isinstance(graph.out, StageState):
            return graph.out.part(count)
        return graph.out[:count], self.chosen[:count]


def _sizes(most: int) -> list[int]:
    """Batch sizes with little padding: at most an eighth from 8 on."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, LARGEST + 1, 64)]
    return [size for size in sizes if size < most] + [most]
