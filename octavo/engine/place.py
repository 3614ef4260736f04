"""An engine process's place among the ranks of its engine, and the pipes between them.

Rank 0 has the API process's messages. Before each step it hands those that came on to the other ranks, so that every rank
schedules alike; what only a clock or a thread decides, rank 0 decides for all.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TypeVar, cast

__all__ = ["Place"]

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Rank `rank` of `size`. store: path of the file over which torch.distributed's processes find one another.

    links: pipes; rank 0 has one to each other rank, in their order, the others one to rank 0. first_device: the number of
    rank 0's accelerator.
    """

    rank: int = 0
    size: int = 1
    store: str = ""
    links: Sequence[Connection] = ()
    first_device: int = 0

    def share(self, value: T) -> T:
        """Rank 0's value on every rank; the others' is not looked at. Every rank calls it at the same place.

        EOFError where a rank has ended.
        """
        if self.size == 1:
            return value
        if self.rank:
            return cast("T", pickle.loads(self.links[0].recv_bytes()))
        data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
        for link in self.links:
            try:
                link.send_bytes(data)
            except BrokenPipeError:
                raise EOFError from None
        return value
