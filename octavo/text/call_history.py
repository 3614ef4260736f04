"""Converts the calls of earlier turns to the form that a chat template reads, which its syntax tree shows.

Templates differ in the form of a call's arguments. Most print them by `tojson`, or loop over them, and need an object.
DeepSeek's concatenate them with text, and need text. DeepSeek-V3's also prints a message's calls only if it has no content.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import nodes

from octavo.text.chat_template import parse_template
from octavo.text.content_format import key_read

__all__ = ["as_read", "reads_calls"]


@lru_cache(maxsize=16)
def reads_calls(template: str) -> bool:
    """Whether the template reads the calls of a message."""
    tree = parse_template(template)
    return any(one.attr == "tool_calls" for one in tree.find_all(nodes.Getattr)) or any(
        one.value == "tool_calls" for one in tree.find_all(nodes.Const)
    )


def as_read(template: str, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Plain messages with calls' arguments, and the content beside calls, in the form that the template reads."""
    converted = [dict(message) for message in messages]
    for message in converted:
        if not message.get("tool_calls"):
            continue
        if _joins_arguments(template):
            message["tool_calls"] = [_with_text(call) for call in message["tool_calls"]]
        if not message["content"] and _asks_for_none(template):
            message["content"] = None
    return converted


@lru_cache(maxsize=16)
def _joins_arguments(template: str) -> bool:
    tree = parse_template(template)
    joined = [operand for sum_ in tree.find_all(nodes.Add) for operand in (sum_.left, sum_.right)]
    joined += [operand for parts in tree.find_all(nodes.Concat) for operand in parts.nodes]
    return any(key_read(operand) == "arguments" for operand in joined)


@lru_cache(maxsize=16)
def _asks_for_none(template: str) -> bool:
    return any(
        test.name == "none" and key_read(test.node) == "content" for test in parse_template(template).find_all(nodes.Test)
    )


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": text}}
