"""Short prefills from captured CUDA graphs, where the kernels take less time than the host needs to launch them.

A graph is captured for the first tokens of one request, up to a size. A shorter prompt is padded at its end: causal attention
hides the padding from it, and the padding's keys and values go to the scratch block.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from octavo import ops
from octavo.batch import ForwardBatch, Span, reads_pinned, to_device
from octavo.models.interface import StageState
from octavo.platform import Platform

__all__ = ["PrefillGraphs"]

SIZES = (64, 128, 256, 512)  # tokens; kernels of longer prompts take longer than their launches


class PrefillGraphs:
    """Graphs of `forward`, which takes a batch of one request and the index of its last token, int64 [1], and returns logits
    [1, vocab] and their argmax, int64 [1], or, of a pipeline stage that is not the last, the next one's state. arrived: as
    DecodeGraphs'. Within compile_ahead `run_each_kernel` is called, and then `capture`.
    """

    def __init__(
        self,
        forward: Callable[[ForwardBatch, Tensor], tuple[Tensor, Tensor] | StageState],
        platform: Platform,
        block_size: int,
        most_tokens: int,
        scratch_block: int,
        arrived: Callable[[], None] = lambda: None,
    ):
        self.arrived = arrived
        self.platform, self.block_size, self.scratch_block = platform, block_size, scratch_block
        self.forward, self.sizes = forward, [size for size in SIZES if size <= most_tokens]
        if not self.sizes:
            return
        largest, device = self.sizes[-1], platform.device
        # Token ids, rotary rows, slots, the last token's index and, as int32, the number of real tokens.
        self.sent = torch.zeros(3 * largest + 2, dtype=torch.int64, device=device)
        self.table = torch.full((1, -(-largest // block_size)), scratch_block, dtype=torch.int32, device=device)
        self._graphs: dict[int, tuple[Callable[[], None], tuple[Tensor, Tensor] | StageState]] = {}
        self._batches: list[ForwardBatch] = []  # kept alive, because replays read their tensors and cached values

    def run_each_kernel(self) -> None:
        for size in self.sizes:
            self.forward(*self._batch(size))

    def capture(self) -> None:
        """Captures a graph of each size, but on a device that is only described."""
        if self.platform.is_described:
            return
        pool = None
        for size in reversed(self.sizes):
            self._send(Span([0] * size, 0, [self.scratch_block] * self.table.shape[1]))
            batch, last = self._batch(size)
            self.forward(batch, last)  # fills the batch's step cache, which a capture could not
            replay, out, pool = ops.capture(partial(self.forward, batch, last), pool)
            self._graphs[size] = replay, out
            self._batches.append(batch)

    def _batch(self, size: int) -> tuple[ForwardBatch, Tensor]:
        device = self.platform.device
        ids, rotary_rows, slots = self.sent[: 3 * size].view(3, size)
        last, live = self.sent[3 * size : 3 * size + 1], self.sent[3 * size + 1 : 3 * size + 2].view(torch.int32)[:1]
        batch = ForwardBatch(
            ids, to_device(range(size), torch.int64, device), rotary_rows, slots,
            torch.tensor([0, size], dtype=torch.int32, device=device), torch.tensor([size], dtype=torch.int32, device=device),
            self.table, [size], [size], self.block_size, live,
        )  # fmt: skip
        return batch, last

    def _send(self, span: Span) -> int:
        """Copies the prompt to the device and returns the size of its graph."""
        count = len(span.token_ids)
        size = self.sizes[bisect_left(self.sizes, count)]
        rest = [0] * (size - count)
        rotary_rows = range(span.rotary_delta, span.rotary_delta + count)
        slots = [*span.slots(self.block_size), *[self.scratch_block * self.block_size] * (size - count)]
        self._copy(self.sent[: 3 * size + 2], [*span.token_ids, *rest, *rotary_rows, *rest, *slots, count - 1, count])
        self._copy(self.table[0], span.table(self.table.shape[1], self.scratch_block))
        return size

    def _copy(self, to: Tensor, values: Sequence[int]) -> None:
        host = torch.tensor(values, dtype=to.dtype, pin_memory=reads_pinned(self.platform.device))
        to.copy_(host, non_blocking=True)

    def run(self, span: Span) -> tuple[Tensor, Tensor] | StageState | None:
        """Logits [1, vocab] after the last token of a prompt, and their argmax, or the next stage's state: valid until the next
        call.

        None where no graph is large enough.
        """
        if span.start or not self.sizes or len(span.token_ids) > self.sizes[-1]:
            return None
        replay, out = self._graphs[self._send(span)]
        self.arrived()
        replay()
        return out.part(len(span.token_ids)) if isinstance(out, StageState) else out
