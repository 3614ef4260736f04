"""The output items of a response, and the events of its stream that tell of them."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

from octavo.server.message_parts import MessagePart, MessageParts, Step

__all__ = ["ResponseItems"]

_REASONING, _TEXT, _CALL = "response.reasoning_text", "response.output_text", "response.function_call_arguments"
_PREFIXES = {"reasoning": "rs", "text": "msg", "call": "fc"}


class ResponseItems:
    """Makes items and events of a message's deltas. Events lack their sequence_number."""

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []
        self._parts = MessageParts()
        self._id = ""  # of the open item

    def add(self, message: dict[str, Any], logprobs: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        """The events of one delta."""
        for step in self._parts.add(message, logprobs):
            yield from self._events(step, "completed")

    def finish(self, status: str) -> Iterator[dict[str, Any]]:
        """The last events. `status`: of the item that is open."""
        for step in self._parts.finish():
            yield from self._events(step, status)

    def _events(self, step: Step, status: str) -> Iterator[dict[str, Any]]:
        part = step.part
        if step.what == "begin":
            self._id = f"{_PREFIXES[part.kind]}_{secrets.token_hex(16)}"
            item = {**self._item(part, "in_progress"), **({} if part.kind == "call" else {"content": []})}
            yield {"type": "response.output_item.added", "output_index": part.number, "item": item}
            if part.kind != "call":
                yield {"type": "response.content_part.added", **self._place(part), "part": _content(part)}
        elif step.what == "add":
            logprobs = {"logprobs": step.logprobs} if part.kind == "text" else {}
            yield {"type": f"{_event(part)}.delta", **self._place(part), "delta": step.text, **logprobs}
        else:
            yield from self._ended(part, status)

    def _ended(self, part: MessagePart, status: str) -> Iterator[dict[str, Any]]:
        told: dict[str, Any] = {"text": part.text}
        if part.kind == "call":
            told = {"name": part.name, "arguments": part.text}
        elif part.kind == "text":
            told["logprobs"] = part.logprobs
        yield {"type": f"{_event(part)}.done", **self._place(part), **told}
        if part.kind != "call":
            yield {"type": "response.content_part.done", **self._place(part), "part": _content(part)}
        item = self._item(part, status)
        self.done.append(item)
        yield {"type": "response.output_item.done", "output_index": part.number, "item": item}

    def _place(self, part: MessagePart) -> dict[str, Any]:
        content = {} if part.kind == "call" else {"content_index": 0}
        return {"item_id": self._id, "output_index": part.number, **content}

    def _item(self, part: MessagePart, status: str) -> dict[str, Any]:
        if part.kind == "call":
            call = {"call_id": part.id, "name": part.name, "arguments": part.text}
            return {"id": self._id, "type": "function_call", "status": status, **call}
        if part.kind == "text":
            return {"id": self._id, "type": "message", "status": status, "role": "assistant", "content": [_content(part)]}
        reasoning = {"summary": [], "content": [_content(part)], "encrypted_content": None}
        return {"id": self._id, "type": "reasoning", "status": status, **reasoning}


def _event(part: MessagePart) -> str:
    return {"reasoning": _REASONING, "text": _TEXT, "call": _CALL}[part.kind]


def _content(part: MessagePart) -> dict[str, Any]:
    if part.kind == "reasoning":
        return {"type": "reasoning_text", "text": part.text}
    return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": list(part.logprobs)}
