"""The tensors of one step, passed explicitly to every layer that needs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

__all__ = ["ForwardBatch", "Key", "Span", "StepCache", "build", "decodes_beside_prompts", "reads_pinned", "to_device"]

T = TypeVar("T")


class Span(NamedTuple):
    """One request's part in a step: its tokens [start, start + len(token_ids)) and the blocks that hold its context.

    A token's rotary row is its position plus `rotary_delta`, which is not 0 after inputs (such as images) whose rotary rows
    differ from their positions.
    """

    token_ids: Sequence[int]
    start: int
    block_ids: Sequence[int]
    rotary_delta: int = 0

    def slots(self, block_size: int) -> list[int]:
        """The slot of each token's key and value: block * block_size + offset."""
        positions = range(self.start, self.start + len(self.token_ids))
        return [self.block_ids[p // block_size] * block_size + p % block_size for p in positions]

    def table(self, width: int, padding: int) -> list[int]:
        """The request's row of the block tables, padded with the block `padding`."""
        return [*self.block_ids[:width], *[padding] * (width - len(self.block_ids))]


@dataclass(frozen=True)
class Key(Generic[T]):
    """Key of a T that an implementation computes once per step. Each kind is a frozen dataclass. Its fields are everything
    that the value depends on besides the batch. Keys of different classes differ."""


class StepCache:
    """Values computed once per step and used by every layer."""

    def __init__(self) -> None:
        self._made: dict[Key[Any], Any] = {}

    def get(self, key: Key[T], make: Callable[[], T]) -> T:
        """The value of `key`; `make` computes it the first time."""
        if key not in self._made:
            self._made[key] = make()
        found: T = self._made[key]
        return found


@dataclass(slots=True)
class ForwardBatch:
    """B requests and T tokens, prefill and decode mixed; a request's tokens are adjacent.

    input_ids, positions, rotary_rows, slot_mapping: int64 [T]. A token's position is its index in the context; its rotary
    row is the row of cosines and sines that rotates it. query_start_loc: int32 [B + 1]. seq_lens: int32 [B], context length
    including this step's tokens; 0 for a row that pads a graph, whose attention output is zeros. block_tables: int32
    [B, max blocks], rows padded with a block whose values do not count.
    query_lens and context_lens are the same numbers on the host, so that no layer waits for the device; in a graph
    context_lens are upper bounds.
    rotary_table: FP32 [rows, R], which rotary_rows index instead of the model's own table; None: the model's.
    live: int32 [1], the number of real tokens, which come before those that pad a graph; None: all are real.
    """

    input_ids: Tensor
    positions: Tensor
    rotary_rows: Tensor
    slot_mapping: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    query_lens: list[int]
    context_lens: list[int]
    block_size: int
    live: Tensor | None = None
    rotary_table: Tensor | None = None
    cache: StepCache = field(default_factory=StepCache)

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    def part(self, first: int, stop: int) -> ForwardBatch:
        """The requests [first, stop) as a batch, with views of this batch's tensors where possible. Not for graphs."""
        if (first, stop) == (0, len(self.query_lens)):
            return self
        assert self.live is None, "a graph's batch is one"
        start = sum(self.query_lens[:first])
        tokens, requests = slice(start, start + sum(self.query_lens[first:stop])), slice(first, stop)
        return ForwardBatch(
            self.input_ids[tokens], self.positions[tokens], self.rotary_rows[tokens], self.slot_mapping[tokens],
            self.query_start_loc[first : stop + 1] - start, self.seq_lens[requests], self.block_tables[requests],
            self.query_lens[requests], self.context_lens[requests], self.block_size, rotary_table=self.rotary_table,
        )  # fmt: skip


def to_device(values: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sends host numbers without waiting for the device, which reads them later from pinned memory."""
    return torch.tensor(values, dtype=dtype, pin_memory=reads_pinned(device)).to(device, non_blocking=True)


def reads_pinned(device: torch.device) -> bool:
    """Whether a device copies from pinned memory by itself, beside what the host does."""
    return device.type not in ("cpu", "meta")


def build(spans: Sequence[Span], block_size: int, device: torch.device) -> ForwardBatch:
    """The batch of `spans`, built on the host and moved to the device. Rows of the block tables are padded with block 0."""
    ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    slots: list[int] = []
    starts, contexts = [0], []
    for span in spans:
        stop = span.start + len(span.token_ids)
        ids.extend(span.token_ids)
        positions.extend(range(span.start, stop))
        rows.extend(range(span.start + span.rotary_delta, stop + span.rotary_delta))
        slots.extend(span.slots(block_size))
        starts.append(len(ids))
        contexts.append(stop)
    width = max((-(-length // block_size) for length in contexts), default=1)
    table = [span.table(width, 0) for span in spans]

    def tensor(values: object, dtype: torch.dtype) -> Tensor:
        return to_device(values, dtype, device)

    places = tensor(positions, torch.int64)
    return ForwardBatch(
        tensor(ids, torch.int64),
        places,
        places if rows == positions else tensor(rows, torch.int64),
        tensor(slots, torch.int64),
        tensor(starts, torch.int32),
        tensor(contexts, torch.int32),
        tensor(table, torch.int32),
        [stop - start for start, stop in pairwise(starts)],
        contexts,
        block_size,
    )


def decodes_beside_prompts(longest: int, block_size: int) -> list[list[Span]]:
    """Steps of one decode beside one prompt, none of more than `longest` tokens, that launch all kernels of such steps."""
    sizes = [((min(context, longest - 1), 1), (0, min(length, longest))) for context, length in ((1, 16), (1, 80), (4096, 80))]
    return [[Span([0] * n, at, [0] * -(-(at + n) // block_size)) for at, n in both] for both in sizes]
