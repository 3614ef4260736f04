"""The tokens of requests with penalties, on the device: a step's penalties need no token whose value the host does not know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from octavo.batch import to_device

if TYPE_CHECKING:
    from octavo.engine.sampler import SamplingRow

__all__ = ["Histories", "History"]

LEAST_SLOTS, LEAST_TOKENS = 8, 256


class History(NamedTuple):
    """Tokens of some requests, int64 [rows, longest], and of each, int64 [rows, 1], how many there are and of its prompt."""

    ids: Tensor
    tokens: Tensor
    prompt: Tensor

    @classmethod
    def of(cls, rows: Sequence[SamplingRow], device: torch.device) -> History:
        """Of rows whose tokens the host knows."""
        lengths = [len(row.token_ids) for row in rows]
        ids = [[*row.token_ids, *[0] * (max(lengths) - len(row.token_ids))] for row in rows]
        return cls(to_device(ids, torch.int64, device), *_counts(lengths, rows, device))


def _counts(lengths: Sequence[int], rows: Sequence[SamplingRow], device: torch.device) -> tuple[Tensor, Tensor]:
    both = to_device([lengths, [row.num_prompt_tokens for row in rows]], torch.int64, device).unsqueeze(2)
    return both[0], both[1]


class Histories:
    """A row of memory for each request that asked, as long as the longest of them needs."""

    def __init__(self, device: torch.device):
        self._ids = torch.empty(0, 0, dtype=torch.int64, device=device)
        self._places: dict[str, tuple[int, int]] = {}  # row and tokens of a request
        self._free: list[int] = []

    def of(self, requests: Sequence[str], rows: Sequence[SamplingRow]) -> History:
        """Of `requests`; `add` was given the tokens of theirs that are pending."""
        device, lengths = self._ids.device, [len(row.token_ids) + row.num_pending for row in rows]
        self._reserve(requests, max(lengths) + 1)
        for request, row, length in zip(requests, rows, lengths, strict=True):
            slot, written = self._places[request]
            if written != length:
                assert not row.num_pending, "the host knows all tokens of a request that asks for the first time"
                self._ids[slot, :length] = to_device(row.token_ids, torch.int64, device)
                self._places[request] = slot, length
        slots = to_device([self._places[request][0] for request in requests], torch.int64, device)
        return History(self._ids[slots, : max(lengths)], *_counts(lengths, rows, device))

    def add(self, requests: Sequence[str], tokens: Tensor) -> None:
        """One more token of each request, int64 [requests], which only the device may know yet."""
        at = to_device([self._places[request] for request in requests], torch.int64, self._ids.device)
        self._ids[at[:, 0], at[:, 1]] = tokens
        for request in requests:
            slot, length = self._places[request]
            self._places[request] = slot, length + 1

    def forget(self, request: str) -> None:
        """One that is not known is no error."""
        if (place := self._places.pop(request, None)) is not None:
            self._free.append(place[0])

    def _reserve(self, requests: Sequence[str], tokens: int) -> None:
        """A row for each request, and room for so many tokens in each."""
        unknown = [request for request in requests if request not in self._places]
        slots, room = self._ids.shape
        needed = len(self._places) + len(unknown)
        if needed > slots or tokens > room:
            size = max(_power_of_2(needed, LEAST_SLOTS), slots), max(_power_of_2(tokens, LEAST_TOKENS), room)
            ids = torch.zeros(size, dtype=torch.int64, device=self._ids.device)
            ids[:slots, :room] = self._ids
            self._ids = ids
            self._free += range(slots, size[0])
        for request in unknown:
            self._places[request] = self._free.pop(), 0


def _power_of_2(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())
