"""One running sequence of an AsyncEngine: from the engine's outputs to the deltas that its reader awaits."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from enum import Enum, auto

from octavo.errors import InvalidRequest, OctavoError
from octavo.frontend.outputs import Delta, OutputProcessor
from octavo.messages import TokenOutput

__all__ = ["End", "EngineStream"]

logger = logging.getLogger(__name__)


class End(Enum):
    """How a sequence stands after an output."""

    NOT_YET = auto()
    ENDED = auto()
    ABORT = auto()  # it has ended, which the engine does not know


@dataclass(slots=True)
class EngineStream:
    """Its output processor, and the queue for its deltas, which the n sequences of a request share."""

    processor: OutputProcessor
    queue: asyncio.Queue[Delta | OctavoError]

    def take(self, output: TokenOutput) -> End:
        """Queues an output's delta or error."""
        if output.error is not None:
            self.queue.put_nowait(InvalidRequest(output.error))
            return End.ENDED
        try:
            delta = self.processor.process(output)
        except Exception as error:  # an error in one stream must not cost the others their tokens
            logger.error("the tokens of a request cannot be turned into text", exc_info=error)
            self.queue.put_nowait(OctavoError("The tokens of this answer cannot be turned into text; the log says why."))
            return End.ABORT
        self.queue.put_nowait(delta)
        if delta.finish_reason is None:
            return End.NOT_YET
        return End.ABORT if output.finish_reason is None else End.ENDED  # by a stop string, which the engine does not know
