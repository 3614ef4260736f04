"""Stops a server: on SIGTERM, SIGINT, or the death of its engine."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import TYPE_CHECKING, Any

from octavo.frontend.nodes import STOPPED, TOGETHER_SECONDS
from octavo.server.console import say
from octavo.server.error_responses import ApiError

if TYPE_CHECKING:
    import uvicorn

    from octavo.server.serving import Served

__all__ = ["Ending"]

LAST_WORDS = 1.0  # seconds for clients to receive the errors of aborted answers


class Ending:
    """Cancels loading; on a running server, refuses new requests and lets running ones finish. A second signal stops at once.

    `exit_code` is 1 once the engine died, so that whoever watches the process starts it anew, and 130 where Ctrl-C stopped a
    loading. Where it died since another host was stopped, and this one is stopped, too, it is as if this one had been first.
    """

    def __init__(self, loading: asyncio.Future[Any], timeout: float):
        self.exit_code = 0
        self._hurried = False
        self._loading, self._timeout = loading, timeout
        self._server: uvicorn.Server | None = None
        self._served: Served | None = None
        self._signals = 0
        self._tasks: list[asyncio.Task[None]] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._signal, number)

    def begin_with(self, server: uvicorn.Server, served: Served) -> None:
        """From now on there is a server to stop."""
        self.exit_code = 0
        self._server, self._served = server, served
        self._tasks.append(asyncio.ensure_future(self._end_with_the_engine(server, served)))
        self._tasks.append(asyncio.ensure_future(_report_stalls(served)))
        if self._signals:  # a signal arrived before the server was ready
            self._drain_soon()

    def close(self) -> None:
        """Cancels the watching tasks."""
        for task in self._tasks:
            task.cancel()

    async def stopped_together(self, sentence: str) -> bool:
        """Whether the engine's end, of which this is the reason, is part of a stop of all hosts."""
        deadline = time.monotonic() + TOGETHER_SECONDS
        while sentence.endswith(STOPPED) and not self._signals and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        return sentence.endswith(STOPPED) and self._signals > 0

    def _signal(self, number: int) -> None:
        self._signals += 1
        if self._server is None:
            self.exit_code = 130 if number == signal.SIGINT else 0
            self._loading.cancel()
        elif self._signals == 1:
            self._drain_soon()
        else:
            self._hurried = True

    def _drain_soon(self) -> None:
        if self._server is not None and self._served is not None:
            self._tasks.append(asyncio.ensure_future(self._drain(self._server, self._served)))

    async def _drain(self, server: uvicorn.Server, served: Served) -> None:
        gate = served.gate
        gate.closing = True
        for engine in served.engine.alive:  # requests that a pause holds would wait for a /resume that is refused now
            engine.admission.fail(ApiError(503, "The server is shutting down; try another one.", code="shutting_down"))
        if gate.running:
            say(f"octavo: finishing {gate.running} running request{'s' * (gate.running > 1)}; Ctrl-C again stops at once.")
        deadline = time.monotonic() + self._timeout
        while gate.running and time.monotonic() < deadline and not self._hurried:
            await asyncio.sleep(0.02)
        cut = ApiError(503, "The server is shutting down and could not wait for the end of this answer.", code="shutting_down")
        deadline = time.monotonic() + LAST_WORDS
        while gate.running and time.monotonic() < deadline:
            served.engine.fail_running(cut)
            await asyncio.sleep(0.02)
        server.should_exit = True
        server.force_exit = self._hurried

    async def _end_with_the_engine(self, server: uvicorn.Server, served: Served) -> None:
        sentence = await served.engine.death()
        if await self.stopped_together(sentence):  # the signal ends the server
            return
        self.exit_code = 1
        say(f"octavo: {sentence} The server ends with exit code 1; start it again.")
        deadline = time.monotonic() + LAST_WORDS
        while served.gate.running and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        server.should_exit = True


async def _report_stalls(served: Served) -> None:
    """Reports on stderr when the engine stalls, again after each further engine_timeout, and when it continues."""
    reported = 0.0  # seconds of the stall when it was reported last
    while True:
        await asyncio.sleep(min(1.0, served.engine_timeout / 4) or 1.0)
        seconds = served.engine.silent_seconds
        if served.stalled and seconds - reported >= served.engine_timeout:
            say(f"octavo: the engine has had work for {seconds:.0f} s and made no step; /health says 503.")
            reported = seconds
            await served.engine.end_if_a_rank_hangs()
        elif reported and not served.stalled:
            say("octavo: the engine goes on.")
            reported = 0.0
