"""Device copy of the token ids of requests with penalties, so penalties can be applied before the host has read the last
token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.batch import to_device
from octavo.engine.sampling_row import SamplingRow

__all__ = ["Histories", "History"]

LEAST_CAPACITY, LEAST_SLOTS = 256, 8


class History(NamedTuple):
    """Token ids of some rows of a step.

    at: the rows' indices in the step. ids: int64 [rows, longest]. tokens, prompt: int64 [rows, 1], how many ids of each row are
    valid, and how many of those are the prompt.
    """

    at: list[int]
    ids: Tensor
    tokens: Tensor
    prompt: Tensor


@dataclass(slots=True)
class _Place:
    """Location of a request's token ids: the buffer (by row capacity), the row in it, and the number of valid ids."""

    capacity: int
    slot: int
    length: int = 0


class Histories:
    """One row of device memory per request. A row's capacity is a power of two.

    Rows of equal capacity share a buffer, so that one long request does not widen the rows of all others.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._ids: dict[int, Tensor] = {}  # int64 [slots, capacity], by capacity
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        self._places: dict[str, _Place] = {}

    def of(self, at: Sequence[int], requests: Sequence[str], rows: Sequence[SamplingRow]) -> list[History]:
        """Histories of `requests`, which are rows `at` of a step. `add` must have received their pending tokens."""
        groups: defaultdict[int, list[int]] = defaultdict(list)
        lengths = [len(row.token_ids) + row.num_pending for row in rows]
        for i, (request, row, length) in enumerate(zip(requests, rows, lengths, strict=True)):
            place = self._with_capacity(request, length + 1)
            if place.length != length:
                assert not row.num_pending, "the host knows all tokens of a request that asks for the first time"
                self._ids[place.capacity][place.slot, :length] = to_device(row.token_ids, torch.int64, self.device)
                place.length = length
            groups[place.capacity].append(i)
        found = []
        for capacity, members in groups.items():
            valid = [lengths[i] for i in members]
            host = [self._places[requests[i]].slot for i in members], valid, [rows[i].num_prompt_tokens for i in members]
            slots, tokens, prompt = to_device(host, torch.int64, self.device)
            ids = self._ids[capacity][slots, : max(valid)]
            found.append(History([at[i] for i in members], ids, tokens.unsqueeze(1), prompt.unsqueeze(1)))
        return found

    def add(self, requests: Sequence[str], tokens: Tensor) -> None:
        """Appends one token per request, int64 [requests]. The values may be known to the device only."""
        groups: defaultdict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for i, request in enumerate(requests):
            place = self._places[request]
            groups[place.capacity].append((i, place.slot, place.length))
            place.length += 1
        for capacity, members in groups.items():
            which, slots, ends = to_device(list(zip(*members, strict=True)), torch.int64, self.device)
            self._ids[capacity][slots, ends] = tokens[which]

    def forget(self, request: str) -> None:
        """Frees the request's row. An unknown request is no error."""
        if (place := self._places.pop(request, None)) is not None:
            self._free[place.capacity].append(place.slot)

    def _with_capacity(self, request: str, tokens: int) -> _Place:
        """The request's row, with capacity for `tokens`. Growing moves the ids to a larger row."""
        old = self._places.get(request)
        if old is not None and old.capacity >= tokens:
            return old
        capacity = max(LEAST_CAPACITY, 1 << (tokens - 1).bit_length())
        if not self._free[capacity]:
            ids = self._ids.get(capacity, torch.empty(0, capacity, dtype=torch.int64, device=self.device))
            slots = max(LEAST_SLOTS, 2 * len(ids))
            self._ids[capacity] = torch.cat(
                [ids, torch.zeros(slots - len(ids), capacity, dtype=torch.int64, device=self.device)]
            )
            self._free[capacity] += range(len(ids), slots)
        place = _Place(capacity, self._free[capacity].pop())
        if old is not None:
            self._ids[capacity][place.slot, : old.length] = self._ids[old.capacity][old.slot, : old.length]
            place.length = old.length
            self.forget(request)
        self._places[request] = place
        return place
