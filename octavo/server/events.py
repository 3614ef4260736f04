"""The events of a streamed answer: how they are encoded, and sent as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, NamedTuple

from starlette.types import Send

from octavo.server.error_responses import as_api_error, error_body
from octavo.server.json_pieces import json_body

__all__ = ["Chunk", "Event", "fields_of", "head_of", "stream"]

EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # otherwise nginx would buffer tokens
]
_dump = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class Chunk(NamedTuple):
    """An event whose first fields are those of all chunks of a stream. head: `head_of` these fields, encoded once."""

    head: bytes
    rest: dict[str, Any]


Event = dict[str, Any] | Chunk


def head_of(fields: dict[str, Any]) -> bytes:
    """The beginning of a JSON object that has these fields and more."""
    return _dump(fields)[:-1].encode() + b","


def fields_of(event: Event) -> dict[str, Any]:
    """All fields of an event, for who reads it in this process."""
    return event if isinstance(event, dict) else {**json.loads(event.head[:-1] + b"}"), **event.rest}


async def stream(events: AsyncGenerator[Event, None], send: Send, path: str = "") -> None:
    """Sends `events` as server-sent events; those that have a type are named by it. An error before the first event is raised,
    so that it can set the status.
    """
    async with aclosing(events):
        first = await anext(events)
        await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
        await _send_event(send, first)
        try:
            async for event in events:
                await _send_event(send, event)
        except Exception as error:  # the status is already sent, so the error becomes an event
            await _send_event(send, error_body(as_api_error(error), path))
        end = b"" if isinstance(first, dict) and "type" in first else b"data: [DONE]\n\n"
        await send({"type": "http.response.body", "body": end, "more_body": False})


async def _send_event(send: Send, event: Event) -> None:
    if isinstance(event, Chunk):
        body = b"data: %b%b\n\n" % (event.head, _dump(event.rest)[1:].encode())
    elif (name := event.get("type")) is None:
        body = b"data: %b\n\n" % _dump(event).encode()
    else:  # what is no delta may repeat the whole answer
        data = _dump(event).encode() if "delta" in event else await json_body(event)
        body = b"event: %b\ndata: %b\n\n" % (name.encode(), data)
    await send({"type": "http.response.body", "body": body, "more_body": True})
