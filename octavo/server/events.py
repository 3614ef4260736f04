"""The events of a streamed answer: how they are encoded, and sent as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from json.encoder import encode_basestring_ascii
from typing import Any, NamedTuple, Protocol

from starlette.types import Scope, Send

from octavo.server.error_responses import as_api_error, error_body
from octavo.server.json_pieces import json_body

__all__ = ["MARK", "WRITER", "Chunk", "Event", "EventStream", "Frame", "Writer", "encoded", "fields_of", "head_of", "stream"]

EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # otherwise nginx would buffer tokens
]
WRITER = "octavo.writer"  # the ASGI extension by which octavo.server.connections offers a Writer
MARK = "\ue000"  # stands for the text in the event that a Frame is made of
_dump = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class Writer(Protocol):
    """Writes to the body of a response that has begun, past ASGI's `send`: that passes every middleware, which takes as long
    as all else that is done for a token."""

    @property
    def ready(self) -> bool:
        """Whether the client reads as fast as it is written to; if not, `send` waits for it."""

    def write(self, body: bytes) -> None:
        """Adds to the body, soon. Only to be called while `ready`."""

    def flush(self) -> None:
        """Adds at once what was written, as is to be done before `send`."""


class Chunk(NamedTuple):
    """An event whose first fields are those of all chunks of a stream. head: `head_of` these fields, encoded once."""

    head: bytes
    rest: dict[str, Any]


Event = dict[str, Any] | Chunk


class EventStream(NamedTuple):
    """A streamed answer. open: is called once the first event is sent; from then on events may also be written directly,
    whenever whoever reads `events` waits for the next one."""

    events: AsyncGenerator[Event, None]
    open: Callable[[Writer], None]


class Frame:
    """The events of a stream that differ in their text alone: what is around it, encoded once. example: one whose text is
    MARK."""

    def __init__(self, example: Chunk):
        self._around = encoded(example).split(
            _dump(MARK).encode()
        )  # within a string a backslash is escaped, so it is not found

    def event(self, text: str) -> bytes:
        """As `encoded` the event with this text."""
        return encode_basestring_ascii(text).encode().join(self._around)


def head_of(fields: dict[str, Any]) -> bytes:
    """The beginning of a JSON object that has these fields and more."""
    return _dump(fields)[:-1].encode() + b","


def fields_of(event: Event) -> dict[str, Any]:
    """All fields of an event, for who reads it in this process."""
    return event if isinstance(event, dict) else {**json.loads(event.head[:-1] + b"}"), **event.rest}


def encoded(chunk: Chunk) -> bytes:
    """A chunk as a server-sent event."""
    return b"data: %b%b\n\n" % (chunk.head, _dump(chunk.rest)[1:].encode())


async def stream(answer: EventStream | AsyncGenerator[Event, None], scope: Scope, send: Send) -> None:
    """Sends events as server-sent events; those that have a type are named by it. An error before the first event is raised,
    so that it can set the status.
    """
    events = answer.events if isinstance(answer, EventStream) else answer
    writer: Writer | None = scope.get("extensions", {}).get(WRITER)

    async def write(body: bytes, more: bool = True) -> None:
        if more and writer is not None and writer.ready:
            writer.write(body)
            return
        if writer is not None:
            writer.flush()
        await send({"type": "http.response.body", "body": body, "more_body": more})

    async with aclosing(events):
        first = await anext(events)
        await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
        await write(await _body(first))
        if writer is not None and isinstance(answer, EventStream):
            answer.open(writer)
        try:
            async for event in events:
                await write(await _body(event))
        except Exception as error:  # the status is already sent, so the error becomes an event
            await write(await _body(error_body(as_api_error(error), scope["path"])))
        end = b"" if isinstance(first, dict) and "type" in first else b"data: [DONE]\n\n"
        await write(end, more=False)


async def _body(event: Event) -> bytes:
    if isinstance(event, Chunk):
        return encoded(event)
    if (name := event.get("type")) is None:
        return b"data: %b\n\n" % (await json_body(event) if event.get("choices") else _dump(event).encode())
    data = _dump(event).encode() if "delta" in event else await json_body(event)  # what is no delta may repeat the whole answer
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data)
