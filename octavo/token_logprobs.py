"""Log-probabilities of tokens, and those of a whole prompt in a form that crosses between processes at once.

A prompt of 32,768 tokens with 20 alternatives each has 700,000 of them. As objects of Python they are pickled in two seconds
and read in as many, in which neither the engine nor the API process does anything for other requests.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self, overload

__all__ = ["Logprob", "Logprobs", "PackedLogprobs"]


class Logprob(NamedTuple):
    """One token's log-probability (natural log, of the raw logits) and its rank; the most probable token has rank 1."""

    token_id: int
    logprob: float
    rank: int


Logprobs = Sequence[Logprob]  # the sampled token first, then the most probable ones in order


class PackedLogprobs(Sequence[Logprobs | None]):
    """Those of a prompt's tokens, one entry a token, None for the first. An entry is made when it is asked for."""

    def __init__(self) -> None:
        self._ends = array("q", (0,))  # of each entry's values; an entry without any is None
        self._ids, self._values, self._ranks = array("q"), array("d"), array("q")

    @classmethod
    def of(cls, entries: Sequence[Logprobs | None]) -> Self:
        made = cls()
        for entry in entries:
            if entry:
                ids, values, ranks = zip(*entry, strict=True)
                made._ids.extend(ids)
                made._values.extend(values)
                made._ranks.extend(ranks)
            made._ends.append(len(made._ids))
        return made

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Logprobs | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[Logprobs | None]: ...
    def __getitem__(self, index: int | slice) -> Logprobs | list[Logprobs | None] | None:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        begin, end = self._ends[number], self._ends[number + 1]
        return _Entry(self, begin, end) if end > begin else None

    def __iter__(self) -> Iterator[Logprobs | None]:
        return (self[number] for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and [entry and (*entry,) for entry in self] == [
            entry and (*entry,) for entry in other
        ]

    __hash__ = None  # type: ignore[assignment]


class _Entry(Sequence[Logprob]):
    """An entry of PackedLogprobs."""

    __slots__ = ("_begin", "_end", "_of")

    def __init__(self, of: PackedLogprobs, begin: int, end: int):
        self._of, self._begin, self._end = of, begin, end

    def __len__(self) -> int:
        return self._end - self._begin

    @overload
    def __getitem__(self, index: int) -> Logprob: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Logprob]: ...
    def __getitem__(self, index: int | slice) -> Logprob | Sequence[Logprob]:
        if isinstance(index, slice):
            return tuple(self)[index]
        at = range(self._begin, self._end)[index]
        return Logprob(self._of._ids[at], self._of._values[at], self._of._ranks[at])

    def __iter__(self) -> Iterator[Logprob]:
        columns = (column[self._begin : self._end] for column in (self._of._ids, self._of._values, self._of._ranks))
        return map(Logprob, *columns)
