"""uvicorn's protocol, with bounds: it waits for ever for clients that neither send nor read, and takes heads of any length."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from octavo.server.error_responses import ApiError

__all__ = ["MAX_HEAD", "protocol_class"]

MAX_HEAD = 2**16  # bytes of a request that are not its body


def protocol_class(timeout: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, that closes connections which wait for a request's head, or for the client to read what was
    written, for `timeout` seconds (a head that comes in small pieces: for at most twice that); 0 waits for ever.

    A request line and headers of over MAX_HEAD bytes are answered 431; so is what surrounds the pieces of a chunked body, where
    it is more than that and the body together. Of what comes in one piece with the end of another request, nothing is counted.

    It costs nothing a token: reading is watched through the transport's flow control.
    """
    base: Any = HttpToolsProtocol  # typed as a class whose attributes may be None

    class Protocol(base):  # type: ignore[misc]
        _watch: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None
        _seen: Any = None  # the request after which this connection was found waiting; None: the first is awaited
        _excess = 0  # bytes of a request that are not its body, less those of its body

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if timeout:
                self._watch = self.loop.call_later(timeout, self._look)

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._watch, self._unread):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            if timeout:
                self._unread = self.loop.call_later(timeout, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._unread is not None:
                self._unread.cancel()

        def data_received(self, data: bytes) -> None:
            self._excess += len(data)
            super().data_received(data)
            if self._excess > MAX_HEAD and not self.transport.is_closing():
                self._refuse()

        def on_message_complete(self) -> None:
            self._excess = 0
            super().on_message_complete()

        def on_body(self, body: bytes) -> None:
            self._excess -= 2 * len(body)
            super().on_body(body)

        def _refuse(self) -> None:
            if self.cycle is None or self.cycle.response_complete:  # or an answer is being written
                told = ApiError(431, f"The request's head is over {MAX_HEAD >> 10} KiB; send less in its line and headers.")
                body = json.dumps(told.body()).encode()
                head = "HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\nconnection: close\r\n"
                self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            self.transport.close()

        def _look(self) -> None:
            waiting = self.cycle is None or self.cycle.response_complete
            if waiting and self.cycle is self._seen:
                self.transport.abort()  # closing would wait for what is written to be read
                return
            self._seen = self.cycle if waiting else self  # the protocol itself is no request
            self._watch = self.loop.call_later(timeout, self._look)

    return Protocol
