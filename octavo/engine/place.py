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
    """How far a rank's main thread has come, for another thread to read. Of ranks that stand still the one with the smallest
    numbers is the one that the others wait for: all of them take the same turns, and within one those of a stage make the same
    exchanges.

    steps: that it has begun. turns: meetings of all ranks that it has come to, and for each pass through the stages of a
    pipeline one a stage. exchanges: collectives, and messages between ranks, that it has come to in this turn.
    """

    steps: int = 0
    turns: int = 0
    exchanges: int = 0
    _left: int = 0  # turns of the present pass that are other stages'

    def exchange(self) -> None:
        """To be called before each exchange within a stage."""
        self.exchanges += 1

    def meet(self) -> None:
        """To be called before each exchange of all ranks."""
        self._advance(self._left + 1)

    def enter(self, stage: int, stages: int) -> None:
        """To be called before a pass through a pipeline waits for the stage before it."""
        self._advance(self._left + stage)
        self._left = stages - stage

    def pass_on(self) -> None:
        """To be called when a stage has done its part of a pass."""
        self._advance(self._left)

    def _advance(self, turns: int) -> None:
        self._left = 0
        if turns:
            self.turns, self.exchanges = self.turns + turns, 0


@dataclass(frozen=True)
class Place:
    """Rank `rank` of `size`. store: path of the file over which torch.distributed's processes find one another on one host.

    links: to the ranks that this one hands messages on to: rank 0's are of its host and, over the network, the first of each
    other host, whose own are the others there. source: from whom a rank over 0 has them. device: the number of this rank's
    accelerator. address: of rank 0's host where there are several, and interface: the network interface between them. pulse: of
    this process.
    """

    rank: int = 0
    size: int = 1
    store: str = ""
    links: Sequence[Connection] = ()
    source: Connection | None = None
    device: int = 0
    address: str = ""
    interface: str = ""
    pulse: Pulse = field(default_factory=Pulse)

    def wait_for_all(self) -> None:
        """Rank 0 waits here until every other rank has come here. EOFError where one has ended."""
        self.pulse.meet()
        try:
            for link in self.links:
                link.recv_bytes()
            if self.source is not None:
                self.source.send_bytes(b"here")
        except ConnectionError:
            raise EOFError from None

    def share(self, value: T) -> T:
        """Rank 0's value on every rank; the others' is not looked at. Every rank calls it at the same place.

        EOFError where a rank has ended.
        """
        if self.size == 1:
            return value
        self.pulse.meet()
        try:
            if self.source is not None:
                value = cast("T", pipes.receive(self.source))
            pipes.send(self.links, value)
        except ConnectionError:  # a broken pipe; a host that is gone
            raise EOFError from None
        return value
