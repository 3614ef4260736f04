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
        self.pulse.meet()
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
        self.pulse.meet()
        if self.rank:
            return cast("T", pipes.receive(self.links[0]))
        try:
            pipes.send(self.links, value)
        except BrokenPipeError:
            raise EOFError from None
        return value
