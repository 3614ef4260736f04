"""Which requests may enter an engine: all, none yet (it is being reloaded, or was paused), or none (it sleeps)."""

from __future__ import annotations

import asyncio

from octavo.errors import OctavoError

__all__ = ["Admission"]


class Admission:
    """`hold` and `release` come in pairs. A request that is held waits in `enter`."""

    def __init__(self) -> None:
        self.refusal: OctavoError | None = None  # what a request gets that may not enter, nor wait
        self._holds = 0
        self._waiting: set[asyncio.Future[None]] = set()

    @property
    def held(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    async def enter(self) -> None:
        """Waits while requests are held. Raises the refusal, or the error of `fail`."""
        if self.refusal is not None:
            raise self.refusal
        while self._holds:
            waiting = asyncio.get_running_loop().create_future()
            self._waiting.add(waiting)
            try:
                await waiting
            finally:
                self._waiting.discard(waiting)
            if self.refusal is not None:
                raise self.refusal

    def hold(self) -> None:
        self._holds += 1

    def release(self) -> None:
        self._holds -= 1
        if not self._holds:
            self._wake()

    def refuse(self, error: OctavoError | None, waiting: bool = True) -> None:
        """From now on requests get `error`, and with `waiting` those that wait, too; None lets them enter again."""
        self.refusal = error
        if waiting:
            self._wake()

    def fail(self, error: OctavoError) -> None:
        """Ends the requests that wait now."""
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_exception(error)

    def _wake(self) -> None:
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
