"""POST /v1/messages and /v1/messages/count_tokens. A message that is not streamed is the stream's blocks, joined."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from octavo.server.anthropic.message_request import CHAT_NAMES, CountTokensRequest, MessagesRequest
from octavo.server.chat import ChatJob, begin, count_tokens
from octavo.server.chat_pieces import Piece
from octavo.server.error_responses import renamed
from octavo.server.http import Answer
from octavo.server.message_parts import MessagePart, MessageParts, Step
from octavo.server.parsers.call import as_object
from octavo.server.serving import Served

__all__ = ["answer_message", "count_message_tokens"]

Event = dict[str, Any]
UNSIGNED = "unsigned"  # clients keep thinking only with a signature
_STOPS = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}


async def answer_message(served: Served, request: MessagesRequest, request_id: str) -> Answer:
    """Answers a request: the message, or the events of a stream."""
    served.check_model(request.model)
    with renamed(CHAT_NAMES):
        answer = _Message(await begin(served, request.chat, f"msg_{request_id}"))
    return answer.stream() if request.stream else await answer.whole()


async def count_message_tokens(served: Served, request: CountTokensRequest, _: str) -> Answer:
    """How many tokens the messages' prompt has."""
    served.check_model(request.model)
    with renamed(CHAT_NAMES):
        return {"input_tokens": await count_tokens(served, request.chat)}


class _Message:
    """One message in progress."""

    def __init__(self, job: ChatJob):
        self.job, self.parts = job, MessageParts()
        self.end: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}

    async def whole(self) -> dict[str, Any]:
        """The message, complete."""
        async with aclosing(self._steps()) as steps:
            async for _ in steps:
                pass
        return {**self._head(), "content": [_block(part) for part in self.parts.parts], **self.end, "usage": self._usage()}

    async def stream(self) -> AsyncGenerator[Event, None]:
        """The events of the stream."""
        begun = False
        async with aclosing(self._steps()) as steps:
            async for step in steps:
                if not begun:
                    begun = True
                    yield {"type": "message_start", "message": {**self._head(), "content": [], **self._start()}}
                    yield {"type": "ping"}
                for event in _events(step) if step is not None else ():
                    yield event
        yield {"type": "message_delta", "delta": self.end, "usage": self._usage()}
        yield {"type": "message_stop"}

    async def _steps(self) -> AsyncGenerator[Step | None, None]:
        """The steps of the message's parts; None for a piece that has none."""
        async with aclosing(self.job.pieces()) as pieces:
            async for piece in pieces:
                yield None
                for step in self.parts.add(piece.message):
                    yield step
                if piece.finish_reason is not None:
                    for step in self.parts.finish():
                        yield step
                    self.end = self._end(piece)

    def _end(self, piece: Piece) -> dict[str, Any]:
        reason = _STOPS.get(piece.finish_reason or "", "end_turn")
        if piece.finish_reason != "length" and self.parts.calls:
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if isinstance(piece.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": piece.stop_reason}
        return {"stop_reason": reason, "stop_sequence": None}

    def _head(self) -> dict[str, Any]:
        return {"id": self.job.head["id"], "type": "message", "role": "assistant", "model": self.job.head["model"]}

    def _start(self) -> dict[str, Any]:
        return {"stop_reason": None, "stop_sequence": None, "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        """Tokens that were found in the cache are not among the input's, as in Anthropic's API."""
        usage = self.job.usage
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_creation_input_tokens": 0,  # none is billed
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
        }


def _events(step: Step) -> Iterator[Event]:
    part = step.part
    if step.what == "begin":
        yield {"type": "content_block_start", "index": part.number, "content_block": _empty_block(part)}
    elif step.what == "add":
        kind, name = {
            "text": ("text_delta", "text"),
            "reasoning": ("thinking_delta", "thinking"),
            "call": ("input_json_delta", "partial_json"),
        }[part.kind]
        yield {"type": "content_block_delta", "index": part.number, "delta": {"type": kind, name: step.text}}
    else:
        if part.kind == "reasoning":
            signature = {"type": "signature_delta", "signature": UNSIGNED}
            yield {"type": "content_block_delta", "index": part.number, "delta": signature}
        yield {"type": "content_block_stop", "index": part.number}


def _empty_block(part: MessagePart) -> dict[str, Any]:
    if part.kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""} if part.kind == "text" else _call(part, {})


def _block(part: MessagePart) -> dict[str, Any]:
    if part.kind == "reasoning":
        return {"type": "thinking", "thinking": part.text, "signature": UNSIGNED}
    if part.kind == "text":
        return {"type": "text", "text": part.text}
    arguments = as_object(part.text)
    # what is no object, as where a call was cut off, cannot be told as one, and must not look like other arguments
    return _call(part, {"_unparsed": part.text} if arguments is None else json.loads(arguments))


def _call(part: MessagePart, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": part.id, "name": part.name, "input": arguments}
