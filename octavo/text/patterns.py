"""Which of many patterns end where a sequence stands now, in time that does not grow with their number.

The automaton of Aho and Corasick, "Efficient string matching: an aid to bibliographic search", 1975. A state is a beginning of
one or more patterns; after any symbol, the state is the longest beginning that the sequence ends with.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, TypeVar

__all__ = ["START", "Patterns"]

T = TypeVar("T", bound=Hashable)
START = 0  # the state in which nothing has begun


class Patterns(Generic[T]):
    """An automaton over `patterns`, none of which is empty, of symbols that can be dictionary keys. Not changed by use.

    Making it takes time in proportion to all their lengths, and a symbol takes constant time on average.
    """

    def __init__(self, patterns: Iterable[Sequence[T]]):
        self._next: list[dict[T, int]] = [{}]
        self._depth = [0]
        self._own: dict[int, Sequence[T]] = {}  # the state at a pattern's end, and the pattern
        for pattern in patterns:
            state = START
            for symbol in pattern:
                following = self._next[state].get(symbol)
                if following is None:
                    following = self._next[state][symbol] = len(self._next)
                    self._next.append({})
                    self._depth.append(self._depth[state] + 1)
                state = following
            self._own[state] = pattern
        self._shorter = [START] * len(self._next)  # the longest beginning that a state ends with, but for itself
        self._ends = [START] * len(self._next)  # the longest state that is a pattern's end, itself or such an end of it
        queue = deque([START])
        while queue:  # the shallow ones first: a state needs those of its ends
            state = queue.popleft()
            for symbol, following in self._next[state].items():
                self._shorter[following] = self.after(self._shorter[state], symbol) if state else START
                self._ends[following] = following if following in self._own else self._ends[self._shorter[following]]
                queue.append(following)

    def after(self, state: int, symbol: T) -> int:
        """The state that follows."""
        while (following := self._next[state].get(symbol)) is None and state:
            state = self._shorter[state]
        return following or START

    def ended(self, state: int) -> Sequence[T] | None:
        """The longest pattern that ends here."""
        return self._own[end] if (end := self._ends[state]) else None

    def all_ended(self, state: int) -> list[Sequence[T]]:
        """All patterns that end here, the longest first."""
        found, end = [], self._ends[state]
        while end:
            found.append(self._own[end])
            end = self._ends[self._shorter[end]]
        return found

    def end(self, state: int) -> int:
        """A state in which the same patterns end, one for each such set."""
        return self._ends[state]

    def begun(self, state: int) -> int:
        """How many of the last symbols a pattern begins with that is not over: the most that one can."""
        while state and not self._next[state]:
            state = self._shorter[state]
        return self._depth[state]
