"""Decode steps on a CPU: each batch size is recorded the first time it runs and replayed after that.

There is no padding as in CUDA graphs, because padding rows would cost time on a CPU. A recording costs none: making it
computes the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from octavo import ops
from octavo.batch import ForwardBatch, Span

__all__ = ["RecordedSteps"]

LARGEST = 32  # requests; in larger steps the overhead that a recording saves is small


@dataclass
class _Recording:
    replay: Callable[[], None]
    logits: Tensor
    tokens: Tensor


class RecordedSteps:
    """Recordings of `forward` for batches of one token per request, up to `max_num_seqs` requests and `max_model_len` tokens.

    `forward` returns logits [rows, vocab] and their argmax, int64 [rows].
    """

    def __init__(
        self, forward: Callable[[ForwardBatch], tuple[Tensor, Tensor]], block_size: int, max_num_seqs: int, max_model_len: int
    ):
        rows, width = min(max_num_seqs, LARGEST), -(-max_model_len // block_size)
        self.forward, self.block_size, self.max_model_len = forward, block_size, max_model_len
        # Input buffers whose addresses the recordings keep; numpy and torch share the memory.
        self.ids, self.positions, self.rotary_rows, self.slots = np.zeros((4, rows), np.int64)
        self.lengths, self.tables = np.zeros(rows, np.int32), np.zeros((rows, width), np.int32)
        self.starts = np.arange(rows + 1, dtype=np.int32)
        self._recordings: dict[int, _Recording] = {}
        self._arena: object = None

    def __len__(self) -> int:
        return len(self._recordings)

    def _batch(self, size: int) -> ForwardBatch:
        arrays = (a[:size] for a in (self.ids, self.positions, self.rotary_rows, self.slots, self.lengths, self.tables))
        ids, positions, rows, slots, lengths, tables = map(torch.from_numpy, arrays)
        starts, longest = torch.from_numpy(self.starts[: size + 1]), [self.max_model_len] * size
        return ForwardBatch(ids, positions, rows, slots, starts, lengths, tables, [1] * size, longest, self.block_size)

    def run(self, spans: Sequence[Span], tokens: Tensor | None, sources: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """Logits [len(spans), vocab] of one token per span, and their argmax, int64 [len(spans)].

        None where there are more spans than LARGEST. The token of span i is tokens[sources[i]] where sources[i] is not
        negative. The results are valid until the next call.
        """
        size, block = len(spans), self.block_size
        if size > len(self.lengths):
            return None
        known = [] if tokens is None else tokens.tolist()
        last = [span.start for span in spans]
        self.ids[:size] = [known[at] if at >= 0 else span.token_ids[0] for span, at in zip(spans, sources, strict=True)]
        self.positions[:size] = last
        self.rotary_rows[:size] = [span.start + span.rotary_delta for span in spans]
        self.slots[:size] = [span.block_ids[p // block] * block + p % block for span, p in zip(spans, last, strict=True)]
        self.lengths[:size] = self.positions[:size] + 1
        width = self.tables.shape[1]
        for row, span in zip(self.tables, spans, strict=False):
            held = min(len(span.block_ids), width)
            row[:held] = span.block_ids[:held]
        if (recording := self._recordings.get(size)) is None:
            replay, out, self._arena = ops.capture(partial(self.forward, self._batch(size)), self._arena)
            recording = self._recordings[size] = _Recording(replay, *out)
        else:
            recording.replay()
        return recording.logits, recording.tokens
