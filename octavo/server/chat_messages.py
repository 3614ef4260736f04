"""Messages of a chat as clients send them, in the plain form that chat templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from octavo.errors import InvalidRequest

__all__ = ["plain_messages"]


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each message with its content as one string and the arguments of its tool calls as objects."""
    return [_plain(message, f"messages.{number}") for number, message in enumerate(messages)]


def _plain(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"{where} needs a role, such as 'user'.", f"{where}.role")
    plain = {key: value for key, value in message.items() if value is not None}
    plain["role"] = "system" if role == "developer" else role  # OpenAI's newer word; templates know the older one
    plain["content"] = _text(message.get("content"), f"{where}.content")
    if "tool_calls" in plain:
        plain["tool_calls"] = [_call(call, f"{where}.tool_calls") for call in _list(plain["tool_calls"], f"{where}.tool_calls")]
    return plain


def _text(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(_part(part, where) for part in _list(content, where))


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "refusal"):
        text = part.get("text", part.get("refusal"))
        if isinstance(text, str):
            return text
    if isinstance(kind, str) and kind.split("_")[0] in ("image", "input", "video", "audio"):
        raise InvalidRequest(f"This model reads text only; {where} holds a part of type '{kind}'.", where)
    raise InvalidRequest(f"{where} should be a string or a list of parts like {{'type': 'text', 'text': ...}}.", where)


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequest(f"{where} should hold calls like {{'function': {{'name': ..., 'arguments': ...}}}}.", where)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):  # what a model once wrote wrongly, a template prints as it is
            arguments = json.loads(arguments or "{}")
    return {**call, "function": {**function, "arguments": {} if arguments is None else arguments}}


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidRequest(f"{where} should be a list, not {type(value).__name__}.", where)
    return value
