"""An engine process's place among the ranks of its engine, and the pipes between them.

Rank 0 has the API process's messages. Before each step it hands those that came on to the other ranks, so that every rank
schedules alike; what only a clock or a thread decides, rank 0 decides for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TypeVar, cast

from octavo import pipes

__all__ = ["Place", "Pulse"]

T = TypeVar("T")


@dataclass
class Pulse:
    """How far a rank's main thread has come, for another thread to read. All ranks do the same in the same order, so of those
    that stand still the one with the smaller numbers is the one that the others wait for.

    steps: that it has begun. exchanges: collectives, and messages between ranks, that it has come to.
    """

    steps: int = 0
    exchanges: int = 0

    def exchange(self) -> None:
        """To be called before each exchange."""
        self.exchanges += 1


@dataclass(frozen=True)
class Place:
    """Rank `rank` of `size`. store: path of the file over which torch.distributed's processes find one another.

    links: pipes; rank 0 has one to each other rank, in their order, the others one to rank 0. first_device: the number of
    rank 0's accelerator. pulse: of this process.
    """

    rank: int = 0
    size: int = 1
    store: str = ""
    links: Sequence[Connection] = ()
    first_device: int = 0
    pulse: Pulse = field(default_factory=Pulse)

    def wait_for_all(self) -> None:
        """Rank 0 waits here until every other rank has come here. EOFError where one has ended."""
        self.pulse.exchange()
        for link in self.links:
            if self.rank:
                link.send_bytes(b"here")
            else:
                link.recv_bytes()

    def share(self, value: T) -> T:
        """Rank 0's value on every rank; the others' is not looked at. Every rank calls it at the same place.

        EOFError where a rank has ended.
        """
        if self.size == 1:
            return value
        self.pulse.exchange()
        if self.rank:
            return cast("T", pipes.receive(self.links[0]))
        try:
            pipes.send(self.links, value)
        except BrokenPipeError:
            raise EOFError from None
        return value
