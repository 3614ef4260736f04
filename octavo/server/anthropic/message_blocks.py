"""The content blocks of the Messages API as the messages of a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from octavo.errors import InvalidRequest

__all__ = ["chat_messages", "continues", "system_message"]

# Claude Code's first block names its build and changes from request to request, which no cached prefix would survive.
_BILLING = "x-anthropic-billing-header:"


def system_message(system: str | Sequence[Any] | None, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The system message, if there is any: `system`, then the messages of that role, since templates read one, the first."""
    texts = _system_texts(system, "system")
    for number, message in enumerate(messages):
        if message.get("role") == "system":
            texts += _system_texts(message.get("content"), f"messages.{number}.content")
    parts = [{"type": "text", "text": text} for text in texts if not text.startswith(_BILLING)]
    return [{"role": "system", "content": parts[0]["text"] if len(parts) == 1 else parts}] if parts else []


def _system_texts(system: Any, where: str) -> list[str]:
    if system is None or isinstance(system, str):
        return [system] if system else []
    if not isinstance(system, list) or any(not isinstance(block, Mapping) or block.get("type") != "text" for block in system):
        raise InvalidRequest(f"{where} should be a text or a list of blocks of type text.", where)
    return [_string(block, "text", f"{where}.{number}") for number, block in enumerate(system)]


def chat_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages of users, assistants and tools. Raises InvalidRequest for what is not served."""
    found: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        role, where = message.get("role"), f"messages.{number}"
        if role not in ("user", "assistant", "system"):
            raise InvalidRequest(f"{where}.role should be 'user' or 'assistant', not {str(role)[:80]!r}.", f"{where}.role")
        if role == "system":
            continue
        content = message.get("content")
        if isinstance(content, str):
            found.append({"role": role, "content": content})
        elif isinstance(content, list):
            found += _assistant(content, where) if role == "assistant" else _user(content, where)
        else:
            raise InvalidRequest(f"{where}.content should be a text or a list of blocks.", f"{where}.content")
    return found


def continues(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last message is the beginning of the answer."""
    last = messages[-1] if messages else {}
    if last.get("role") == "assistant" and last.get("tool_calls"):
        raise InvalidRequest("The last message calls a tool; send its tool_result, too.", "messages")
    return last.get("role") == "assistant"


def _user(blocks: Sequence[Any], where: str) -> list[dict[str, Any]]:
    """A user's message. Results of tools are messages of their own, in the blocks' order."""
    found: list[dict[str, Any]] = []
    for number, block in enumerate(blocks):
        place = f"{where}.content.{number}"
        if _kind(block, place) == "tool_result":
            content = _result(block.get("content"), f"{place}.content")
            found.append({"role": "tool", "tool_call_id": _string(block, "tool_use_id", place), "content": content})
            continue
        if not found or found[-1]["role"] != "user":
            found.append({"role": "user", "content": []})
        found[-1]["content"].append(_part(block, place))
    return found or [{"role": "user", "content": ""}]


def _result(content: Any, where: str) -> Any:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise InvalidRequest(f"{where} should be a text or a list of blocks.", where)
    return [_part(block, f"{where}.{number}") for number, block in enumerate(content)]


def _part(block: Any, where: str) -> dict[str, Any]:
    kind = _kind(block, where)
    if kind == "text":
        return {"type": "text", "text": _string(block, "text", where)}
    if kind == "image":
        return {"type": "image_url", "image_url": {"url": _image(block.get("source"), f"{where}.source")}}
    raise _unserved(kind, where)


def _image(source: Any, where: str) -> str:
    kind = _kind(source, where)
    if kind == "url":
        return _string(source, "url", where)
    if kind != "base64":
        raise InvalidRequest(f"{where} is of type {kind[:80]!r}; send the image as base64, or its url.", where)
    return f"data:{_string(source, 'media_type', where)};base64,{_string(source, 'data', where)}"


def _assistant(blocks: Sequence[Any], where: str) -> list[dict[str, Any]]:
    """An assistant's message: its texts, its calls, and its thinking, which chat templates know as reasoning."""
    texts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    thinking: list[str] = []
    for number, block in enumerate(blocks):
        place = f"{where}.content.{number}"
        kind = _kind(block, place)
        if kind == "text":
            texts.append({"type": "text", "text": _string(block, "text", place)})
        elif kind == "thinking":
            thinking.append(_string(block, "thinking", place))
        elif kind == "tool_use":
            arguments = block.get("input", {})
            if not isinstance(arguments, dict):
                raise InvalidRequest(f"{place}.input should be an object.", f"{place}.input")
            function = {"name": _string(block, "name", place), "arguments": arguments}
            calls.append({"id": _string(block, "id", place), "type": "function", "function": function})
        elif kind != "redacted_thinking":  # which holds nothing that a model here could read
            raise _unserved(kind, place)
    message: dict[str, Any] = {"role": "assistant", "content": texts[0]["text"] if len(texts) == 1 else texts}
    message |= {"reasoning_content": "\n".join(thinking)} if thinking else {}
    return [message | ({"tool_calls": calls} if calls else {})]


def _kind(block: Any, where: str) -> str:
    kind = block.get("type") if isinstance(block, Mapping) else None
    if not isinstance(kind, str):
        raise InvalidRequest(f"{where} should be an object with a type.", where)
    return kind


def _unserved(kind: str, where: str) -> InvalidRequest:
    return InvalidRequest(f"{where} is of type {kind[:80]!r}, which is not served there; leave it out.", where)


def _string(block: Mapping[str, Any], name: str, where: str) -> str:
    if isinstance(value := block.get(name), str):
        return value
    raise InvalidRequest(f"{where}.{name} should be a string.", f"{where}.{name}")
