"""uvicorn's protocol with limits. uvicorn itself waits for ever for idle clients, and accepts heads of any length."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from octavo.server.error_responses import ApiError, error_body
from octavo.server.events import WRITER

__all__ = ["MAX_HEAD", "protocol_class"]

MAX_HEAD = 2**16  # bytes of a request besides its body


class ChunkWriter:
    """A Writer of octavo.server.events to the response of uvicorn's `cycle`.

    What is written within one turn of the event loop is sent by one system call, which takes as long as all else for a token. A
    process that keeps up with its engines has one token a turn for each stream; one that falls behind has several, and catches
    up.
    """

    __slots__ = ("_cycle", "_loop", "_written")

    def __init__(self, cycle: Any, loop: asyncio.AbstractEventLoop):
        self._cycle, self._loop = cycle, loop
        self._written: list[bytes] = []

    @property
    def ready(self) -> bool:
        cycle = self._cycle
        return cycle.chunked_encoding and not (cycle.flow.write_paused or cycle.disconnected or cycle.response_complete)

    def write(self, body: bytes) -> None:
        if not self._written:
            self._loop.call_soon(self.flush)
        self._written.append(body)

    def flush(self) -> None:
        if self._written:
            body = b"".join(self._written)
            self._written.clear()
            if not (self._cycle.disconnected or self._cycle.transport.is_closing()):
                self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))


def protocol_class(timeout: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, which closes a connection that waits for `timeout` seconds for a request's head, or for the client to
    read the response (up to twice that for a head that arrives in small pieces); 0 waits for ever.

    A request whose line and headers exceed MAX_HEAD bytes is answered 431. So is one with a chunked body whose framing exceeds
    that and the body together. Bytes that arrive in one piece with the end of another request are not counted.

    It costs nothing per token, because reading is watched through the transport's flow control.
    """
    base: Any = HttpToolsProtocol  # typed as a class whose attributes may be None

    class Protocol(base):  # type: ignore[misc]
        _watch: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None
        _seen: Any = None  # the request after which this connection was last found waiting; None: before the first
        _excess = 0  # bytes of a request besides its body, minus those of its body

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

        def on_headers_complete(self) -> None:
            super().on_headers_complete()
            if self.cycle is not None and self.cycle.scope is self.scope:  # else it was refused
                self.scope.setdefault("extensions", {})[WRITER] = ChunkWriter(self.cycle, self.loop)

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
            if self.cycle is None or self.cycle.response_complete:  # otherwise a response is being written
                error = ApiError(431, f"The request's head is over {MAX_HEAD >> 10} KiB; send less in its line and headers.")
                body = json.dumps(error_body(error, "")).encode()
                head = "HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\nconnection: close\r\n"
                self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            self.transport.close()

        def _look(self) -> None:
            waiting = self.cycle is None or self.cycle.response_complete
            if waiting and self.cycle is self._seen:
                self.transport.abort()  # `close` would wait for the client to read what is written
                return
            self._seen = self.cycle if waiting else self  # `self` equals no request
            self._watch = self.loop.call_later(timeout, self._look)

    return Protocol
