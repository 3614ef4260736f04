"""Converts a client's chat messages to the form that the chat template expects. Shared by the server and LLM.chat."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

from octavo.errors import InvalidRequest, OctavoError

__all__ = ["CONTENT_FORMATS", "ContentFormat", "check_content_format", "plain_messages"]

ContentFormat = Literal["string", "openai", "either"]
CONTENT_FORMATS = ("auto", "string", "openai")


def check_content_format(name: str) -> str:
    """Returns `name`. Raises OctavoError for an unknown format."""
    if name not in CONTENT_FORMATS:
        raise OctavoError(f"chat-template-content-format '{name}' is not known; known are: {', '.join(CONTENT_FORMATS)}.")
    return name


def plain_messages(messages: Sequence[Mapping[str, Any]], content: ContentFormat = "string") -> list[dict[str, Any]]:
    """The messages, with tool-call arguments as objects and content in one form. `string`: one string; `openai`: list of parts;
    `either`: as the client sent it. Raises InvalidRequest for invalid messages, and for content other than text.
    """
    form = {"openai": _parts, "string": _text, "either": _as_sent}[content]
    return [_plain(message, f"messages.{number}", form) for number, message in enumerate(messages)]


def _plain(message: Mapping[str, Any], where: str, form: Callable[[Any, str], Any]) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"{where} needs a role, such as 'user'.", f"{where}.role")
    plain = {key: value for key, value in message.items() if value is not None}
    plain["role"] = "system" if role == "developer" else role  # OpenAI's newer name; templates know the older one
    plain["content"] = form(message.get("content"), f"{where}.content")
    if "tool_calls" in plain:
        calls = [_call(call, f"{where}.tool_calls") for call in _list(plain.pop("tool_calls"), f"{where}.tool_calls")]
        if calls:  # templates test for the key, and then print calls instead of content
            plain["tool_calls"] = calls
    return plain


def _text(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(_part(part, where) for part in _list(content, where))


def _parts(content: Any, where: str) -> list[dict[str, str]]:
    if content is None or isinstance(content, str):
        content = [content] if content else []
    return [{"type": "text", "text": _part(part, where)} for part in _list(content, where)]


def _as_sent(content: Any, where: str) -> str | list[dict[str, str]]:
    return _parts(content, where) if isinstance(content, list) else _text(content, where)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "refusal"):
        text = part.get("text", part.get("refusal"))
        if isinstance(text, str):
            return text
    if isinstance(kind, str) and kind.split("_")[0] in ("image", "input", "video", "audio"):
        raise InvalidRequest(
            f"Only text is served yet, of any model, and {where} holds a part of type '{kind}'; leave it out.", where
        )
    raise InvalidRequest(f"{where} should be a string or a list of parts like {{'type': 'text', 'text': ...}}.", where)


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequest(f"{where} should hold calls like {{'function': {{'name': ..., 'arguments': ...}}}}.", where)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):  # invalid arguments of an earlier answer stay text
            arguments = json.loads(arguments or "{}")
    return {**call, "function": {**function, "arguments": {} if arguments is None else arguments}}


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidRequest(f"{where} should be a list, not {type(value).__name__}.", where)
    return value
