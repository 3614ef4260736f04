"""The items of the Responses API as the messages of a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from octavo.errors import InvalidRequest

__all__ = ["chat_messages"]

_TEXTS = frozenset(("input_text", "output_text"))  # refusal and text are read by chats, too


def chat_messages(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages of a conversation's items. Reasoning and calls become parts of the assistant's message that they belong to.

    Raises InvalidRequest for items that are not served.
    """
    reader = _Reader()
    for number, item in enumerate(items):
        reader.read(item, f"input.{number}")
    return reader.messages


class _Reader:
    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._turn: dict[str, Any] | None = None  # the assistant's message that a call may be added to

    def read(self, item: Mapping[str, Any], where: str) -> None:
        kind = item.get("type") or ("message" if "role" in item else None)
        if kind == "message":
            self._message(item, where)
        elif kind == "function_call":
            call = {name: _string(item, name, where) for name in ("call_id", "name", "arguments")}
            function = {"name": call["name"], "arguments": call["arguments"]}
            entry = {"id": call["call_id"], "type": "function", "function": function}
            self._assistant().setdefault("tool_calls", []).append(entry)
        elif kind == "function_call_output":
            self._turn = None
            output = _content(item.get("output"), f"{where}.output")
            self.messages.append({"role": "tool", "tool_call_id": _string(item, "call_id", where), "content": output})
        elif kind == "reasoning":
            if self._turn is not None and (self._turn.get("content") or "tool_calls" in self._turn):
                self._turn = None  # a further message of the assistant
            message = self._assistant()
            message["reasoning_content"] = message.get("reasoning_content", "") + _reasoning(item, where)
        else:
            raise InvalidRequest(
                f"{where} is an item of type {str(kind)[:80]!r}; served are message, function_call, function_call_output, "
                "reasoning and item_reference.",
                where,
            )

    def _message(self, item: Mapping[str, Any], where: str) -> None:
        role, content = _string(item, "role", where), _content(item.get("content"), f"{where}.content")
        if role != "assistant":
            self._turn = None
            self.messages.append({"role": role, "content": content})
            return
        if self._turn is not None and (self._turn.get("content") or "tool_calls" in self._turn):
            self._turn = None
        self._assistant()["content"] = content

    def _assistant(self) -> dict[str, Any]:
        if self._turn is None:
            self._turn = {"role": "assistant"}
            self.messages.append(self._turn)
        return self._turn


def _string(item: Mapping[str, Any], name: str, where: str) -> str:
    if isinstance(value := item.get(name), str):
        return value
    raise InvalidRequest(f"{where}.{name} should be a string.", f"{where}.{name}")


def _content(content: Any, where: str) -> Any:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{where} should be a text or a list of parts.", where)
    return [_part(part, f"{where}.{number}") for number, part in enumerate(content)]


def _part(part: Any, where: str) -> Any:
    """As chats read it; other types are theirs to read or to refuse."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _TEXTS:
        return {"type": "text", "text": _string(part, "text", where)}
    if kind != "input_image":
        return part
    if part.get("image_url") is None:
        raise InvalidRequest(f"{where} has no image_url; files are not kept here, so send a URL or a data: URL.", where)
    return {"type": "image_url", "image_url": part["image_url"]}


def _reasoning(item: Mapping[str, Any], where: str) -> str:
    """An item's reasoning; its summary, where another server has told no more."""
    for name in ("content", "summary"):
        if not (parts := item.get(name)):
            continue
        if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
            raise InvalidRequest(f"{where}.{name} should be a list of parts that have a text.", f"{where}.{name}")
        return "\n".join(_string(part, "text", f"{where}.{name}") for part in parts)
    return ""
