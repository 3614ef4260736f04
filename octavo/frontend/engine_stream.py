"""One running sequence of an AsyncEngine: from the engine's outputs to the deltas that its reader awaits."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from octavo.errors import InvalidRequest, OctavoError
from octavo.frontend.outputs import Delta, OutputProcessor
from octavo.messages import TokenOutput

__all__ = ["DeltaQueue", "End", "EngineStream", "Tap"]

logger = logging.getLogger(__name__)


class End(Enum):
    """How a sequence stands after an output."""

    NOT_YET = auto()
    ENDED = auto()
    ABORT = auto()  # it has ended, which the engine does not know


def _declined(delta: Delta) -> bool:
    return False


def _unseen(delta: Delta) -> None:
    pass


@dataclass(slots=True)
class Tap:
    """A shorter way for a request's deltas, past the generators through which its reader gets them: under load most of the
    event loop's time goes into resuming these.

    take: is offered each delta that ends no sequence while the reader waits for one, and says whether it took it. The reader
    gets the rest in order, and all errors. saw: is called with what was taken.
    """

    take: Callable[[Delta], bool] = _declined
    saw: Callable[[Delta], None] = _unseen

    def close(self) -> None:
        """Lets go of whom it called, who hold the tap: what they hold, images too, would else wait for Python's collector."""
        self.take, self.saw = _declined, _unseen


class DeltaQueue:
    """The deltas of a request, of all its sequences, and its error, until its one reader gets them."""

    __slots__ = ("_items", "_reader")

    def __init__(self) -> None:
        self._items: deque[Delta | OctavoError] = deque()
        self._reader: asyncio.Future[None] | None = None

    @property
    def awaited(self) -> bool:
        """Whether the reader has everything and waits for more."""
        return self._reader is not None and not self._items

    def put(self, item: Delta | OctavoError) -> None:
        self._items.append(item)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def get(self) -> Delta | OctavoError:
        """The next one, once it is there."""
        while not self._items:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self._items.popleft()


@dataclass(slots=True)
class EngineStream:
    """Its output processor, and where its deltas go, which the n sequences of a request share."""

    processor: OutputProcessor
    queue: DeltaQueue
    tap: Tap | None = None

    def take(self, output: TokenOutput) -> End:
        """Hands an output's delta or error to the tap or the reader."""
        if output.error is not None:
            self.queue.put(InvalidRequest(output.error))
            return End.ENDED
        try:
            delta = self.processor.process(output)
            if self._tapped(delta):
                return End.NOT_YET
        except OctavoError as error:  # the request's own, of what its answer repeats of it
            self.queue.put(error)
            return End.ABORT
        except Exception as error:  # an error in one stream must not cost the others their tokens
            logger.error("the tokens of a request cannot be turned into text", exc_info=error)
            self.queue.put(OctavoError("The tokens of this answer cannot be turned into text; the log says why."))
            return End.ABORT
        self.queue.put(delta)
        if delta.finish_reason is None:
            return End.NOT_YET
        return End.ABORT if output.finish_reason is None else End.ENDED  # by a stop string, which the engine does not know

    def _tapped(self, delta: Delta) -> bool:
        if self.tap is None or delta.finish_reason is not None or not self.queue.awaited or not self.tap.take(delta):
            return False
        self.tap.saw(delta)
        return True
