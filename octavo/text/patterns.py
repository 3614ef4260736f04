"""Matches many patterns against a growing sequence, in time that does not depend on their number.

It is the automaton of Aho and Corasick, "Efficient string matching: an aid to bibliographic search", 1975. A state is a prefix
of one or more patterns: after each symbol, the longest prefix that is a suffix of the sequence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, TypeVar

__all__ = ["START", "Patterns"]

T = TypeVar("T", bound=Hashable)
START = 0  # the state of the empty prefix


class Patterns(Generic[T]):
    """An automaton over `patterns`, which must not be empty, of hashable symbols. Matching does not change it.

    Building it takes time proportional to the total length of the patterns, and a symbol takes constant time on average.
    """

    def __init__(self, patterns: Iterable[Sequence[T]]):
        self._next: list[dict[T, int]] = [{}]
        self._depth = [0]
        self._completed: dict[int, Sequence[T]] = {}  # state -> the pattern that it completes
        for pattern in patterns:
            state = START
            for symbol in pattern:
                following = self._next[state].get(symbol)
                if following is None:
                    following = self._next[state][symbol] = len(self._next)
                    self._next.append({})
                    self._depth.append(self._depth[state] + 1)
                state = following
            self._completed[state] = pattern
        self._shorter = [START] * len(self._next)  # the longest proper suffix of a state that is a state (failure link)
        self._ends = [START] * len(self._next)  # the longest suffix of a state, or the state itself, that completes a pattern
        queue = deque([START])
        while queue:  # breadth-first, because a state needs its shorter suffixes
            state = queue.popleft()
            for symbol, following in self._next[state].items():
                self._shorter[following] = self.after(self._shorter[state], symbol) if state else START
                self._ends[following] = following if following in self._completed else self._ends[self._shorter[following]]
                queue.append(following)

    def after(self, state: int, symbol: T) -> int:
        """The state after one more symbol."""
        while (following := self._next[state].get(symbol)) is None and state:
            state = self._shorter[state]
        return following or START

    def ended(self, state: int) -> Sequence[T] | None:
        """The longest pattern that ends in this state; None if none does."""
        return self._completed[end] if (end := self._ends[state]) else None

    def all_ended(self, state: int) -> list[Sequence[T]]:
        """All patterns that end in this state, longest first."""
        found, end = [], self._ends[state]
        while end:
            found.append(self._completed[end])
            end = self._ends[self._shorter[end]]
        return found

    def end(self, state: int) -> int:
        """A state that identifies the set of patterns that end in `state`."""
        return self._ends[state]

    def begun(self, state: int) -> int:
        """The number of trailing symbols that are a proper prefix of a pattern, at most."""
        while state and not self._next[state]:
            state = self._shorter[state]
        return self._depth[state]
