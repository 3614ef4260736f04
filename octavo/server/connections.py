"""Connections whose clients neither send nor read are closed: uvicorn's own protocol waits for them for ever."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

__all__ = ["protocol_class"]


def protocol_class(timeout: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, that closes connections which wait for a request's head, or for the client to read what was
    written, for `timeout` seconds (a head that comes in small pieces: for at most twice that); 0 waits for ever.

    It costs nothing a token: reading is watched through the transport's flow control.
    """
    if not timeout:
        return AutoHTTPProtocol
    base: Any = AutoHTTPProtocol

    class Protocol(base):  # type: ignore[misc]
        _watch: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None
        _seen: Any = None  # the request after which this connection was found waiting; None: the first is awaited

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._watch = self.loop.call_later(timeout, self._look)

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._watch, self._unread):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self.loop.call_later(timeout, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._unread is not None:
                self._unread.cancel()

        def _look(self) -> None:
            waiting = self.cycle is None or self.cycle.response_complete
            if waiting and self.cycle is self._seen:
                self.transport.abort()  # closing would wait for what is written to be read
                return
            self._seen = self.cycle if waiting else self  # the protocol itself is no request
            self._watch = self.loop.call_later(timeout, self._look)

    return Protocol
