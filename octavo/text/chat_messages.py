"""Converts a client's chat messages to the form that the chat template expects. Shared by the server and LLM.chat."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

from octavo.errors import InvalidRequest, OctavoError
from octavo.images import IMAGE_PARTS, VIDEO_PARTS

__all__ = [
    "CONTENT_FORMATS",
    "ContentFormat",
    "check_content_format",
    "has_images",
    "plain_messages",
    "without_images",
]

ContentFormat = Literal["string", "openai", "either"]
CONTENT_FORMATS = ("auto", "string", "openai")
_CONTENT = "a string or a list of parts like {'type': 'text', 'text': ...}"
_TEXTS = ("text", "input_text", "refusal")  # types of parts that are texts
_KINDS = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list", Mapping: "an object",
          type(None): "null"}  # fmt: skip


def check_content_format(name: str) -> str:
    """Returns `name`. Raises OctavoError for an unknown format."""
    if name not in CONTENT_FORMATS:
        raise OctavoError(f"chat-template-content-format '{name}' is not known; known are: {', '.join(CONTENT_FORMATS)}.")
    return name


def has_images(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a part of a message is an image or a video."""
    return any(_medium(part) for message in messages for part in _parts_of(message))


def without_images(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The messages with {"type": "image"} in the place of each image, and "video" of each video, which is all that a chat
    template reads of it: it may be megabytes of base64.
    """
    return [
        {**message, "content": [{"type": kind} if (kind := _medium(part)) else part for part in _parts_of(message)]}
        if any(map(_medium, _parts_of(message)))
        else message
        for message in messages
    ]


def plain_messages(
    messages: Sequence[Mapping[str, Any]],
    content: ContentFormat = "string",
    image_text: str | None = None,
    video_text: str | None = None,
) -> list[dict[str, Any]]:
    """The messages, with tool-call arguments as objects and content in one form. `string`: one string; `openai`: list of parts;
    `either`: as the client sent it. `image_text`, `video_text`: what stands for one in a string; None: they are refused.

    Raises InvalidRequest for invalid messages, and for content that is not served.
    """
    texts = {"image": image_text, "video": video_text}
    return [_plain(message, f"messages.{number}", content, texts) for number, message in enumerate(messages)]


_Texts = Mapping[str, str | None]


def _plain(message: Mapping[str, Any], where: str, form: ContentFormat, texts: _Texts) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"{where} needs a role, such as 'user'.", f"{where}.role")
    plain = {key: value for key, value in message.items() if value is not None}
    plain["role"] = "system" if role == "developer" else role  # OpenAI's newer name; templates know the older one
    if (
        reasoning := plain.get("reasoning_content", plain.get("reasoning"))
    ) is not None:  # templates read one name or the other
        plain = {"reasoning_content": reasoning, "reasoning": reasoning, **plain}
    plain["content"] = _content(message.get("content"), f"{where}.content", form, texts)
    if "tool_calls" in plain:
        calls = [_call(call, f"{where}.tool_calls") for call in _list(plain.pop("tool_calls"), f"{where}.tool_calls")]
        if calls:  # templates test for the key, and then print calls instead of content
            plain["tool_calls"] = calls
    return plain


def _content(content: Any, where: str, form: ContentFormat, texts: _Texts) -> str | list[dict[str, str]]:
    if content is None or isinstance(content, str):
        if form != "openai":
            return content or ""
        content = [content] if content else []
    parts = [_part(part, number, where, texts) for number, part in enumerate(_list(content, where, _CONTENT))]
    return parts if form != "string" else "\n".join(part.get("text") or texts.get(part["type"]) or "" for part in parts)


def _part(part: Any, number: int, where: str, texts: _Texts) -> dict[str, str]:
    """As templates read it, of the content `where`."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    medium = _medium(part)
    if medium is not None and texts[medium] is not None:
        return {"type": medium}
    if medium == "image":
        raise InvalidRequest(f"This model reads no images here, and {where} holds one; send text alone.", where)
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _TEXTS:
        text = part.get("text", part.get("refusal"))
        if isinstance(text, str):
            return {"type": "text", "text": text}
    if isinstance(kind, str) and kind.split("_")[0] in ("input", "video", "audio", "image"):
        raise InvalidRequest(f"{where} holds a part of type '{kind}', which is not served; leave it out.", where)
    told = _kind_of(part)
    if isinstance(part, Mapping):
        told = "a text without a text" if kind in _TEXTS else "an object without such a type"
    raise InvalidRequest(f"{where} should be {_CONTENT}, and its part {number} is {told}.", where)


def _parts_of(message: Any) -> Sequence[Any]:
    content = message.get("content") if isinstance(message, Mapping) else None
    return content if isinstance(content, list) else ()


def _medium(part: Any) -> str | None:
    """Which of the two the part is: "image", "video", or neither."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    return "image" if kind in IMAGE_PARTS else "video" if kind in VIDEO_PARTS else None


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequest(f"{where} should hold calls like {{'function': {{'name': ..., 'arguments': ...}}}}.", where)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):  # invalid arguments of an earlier answer stay text
            arguments = json.loads(arguments or "{}")
    return {**call, "function": {**function, "arguments": {} if arguments is None else arguments}}


def _list(value: Any, where: str, what: str = "a list") -> list[Any]:
    if not isinstance(value, list):
        raise InvalidRequest(f"{where} should be {what}, not {_kind_of(value)}.", where)
    return value


def _kind_of(value: Any) -> str:
    """What a value is, in words of JSON."""
    return next((name for kind, name in _KINDS.items() if isinstance(value, kind)), type(value).__name__)
