"""Block tables of decode steps on the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, TypeAlias

import numpy as np

__all__ = ["BlockTables"]

KEPT = 4  # tables: the parts of the requests that a pipeline's steps take in turn
Table: TypeAlias = "np.ndarray[Any, np.dtype[np.int32]]"


@dataclass
class _Known:
    lists: list[Sequence[int]]
    lengths: list[int]  # how much of each list the table has
    table: Table


class BlockTables:
    """Tables of `width` blocks a request. Lists of blocks are long, and few of them grow in a step: what the last tables have
    of the same lists is not read again.
    """

    def __init__(self, width: int):
        self.width, self._known = width, deque[_Known](maxlen=KEPT)

    def of(self, lists: list[Sequence[int]]) -> Table:
        """int32 [len(lists), width]: each row the first blocks of a list, 0 behind them. A list may grow between calls; what it
        has stays. The table is valid until the next call."""
        lengths = list(map(len, lists))
        known = next((one for one in self._known if len(one.lists) == len(lists) and all(map(is_, one.lists, lists))), None)
        if known is None:
            known = _Known(lists, [0] * len(lists), np.zeros((len(lists), self.width), np.int32))
            self._known.appendleft(known)
        if lengths != known.lengths:
            for row, (before, now) in enumerate(zip(known.lengths, lengths, strict=True)):
                if before < self.width and before < now:
                    new = lists[row][before : self.width]
                    known.table[row, before : before + len(new)] = new
            known.lengths = lengths
        return known.table
