"""Tools for chat templates that do not print them: writes tools, and the calls of earlier turns, into the messages.

A template counts as printing tools if it prints them for a plain conversation. A model cannot call tools that it never saw.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import nodes

from octavo.errors import InvalidRequest, OctavoError
from octavo.text.call_history import as_read, reads_calls
from octavo.text.chat_template import parse_template, render_chat

__all__ = ["PLAIN_CALLS", "CallForm", "render_tools", "shows_tools", "spell_calls"]

Content = str | list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class CallForm:
    """The format in which a model should write calls: JSON objects with the name and, under `key`, the arguments."""

    opener: str = ""  # before all calls
    before: str = ""  # before each call
    after: str = ""
    between: str = "\n"
    closer: str = ""
    key: str = "arguments"
    named: str | None = None  # the only function to call; just its arguments are written

    def spell(self, calls: Sequence[tuple[str, Any]]) -> str:
        """Formats calls, each a name and its arguments."""
        spelled = (f"{self.before}{_json({'name': name, self.key: arguments})}{self.after}" for name, arguments in calls)
        return f"{self.opener}{self.between.join(spelled)}{self.closer}"

    def words(self, tools: Sequence[Mapping[str, Any]]) -> str | None:
        """The tool description that the family was trained on, if known; None: use Octavo's."""
        return None


PLAIN_CALLS = CallForm(key="parameters")


@lru_cache(maxsize=16)
def shows_tools(template: str) -> bool:
    """Whether the template prints the tools that it is given."""
    if not any(name.name == "tools" for name in parse_template(template).find_all(nodes.Name)):
        return False
    mark = f"f{secrets.token_hex(8)}"
    parameters = {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}, "required": ["x"]}
    tool = {"type": "function", "function": {"name": mark, "description": "x", "parameters": parameters}}
    system, user = ({"role": role, "content": "x"} for role in ("system", "user"))
    refused = False
    for messages in ([user], [system, user]):
        try:
            if mark in render_chat(template, messages, {"bos_token": "", "eos_token": ""}, [tool]):
                return True
        except OctavoError:  # the template requires other messages, so this is undecided
            refused = True
    return refused


def spell_calls(template: str, messages: Sequence[Mapping[str, Any]], form: CallForm) -> list[dict[str, Any]]:
    """Plain messages with calls in the form that the template reads. Calls that it would not print are added to the content."""
    if reads_calls(template):
        return as_read(template, messages)
    spelled = []
    for message in messages:
        rest = {key: value for key, value in message.items() if key != "tool_calls"}
        if calls := message.get("tool_calls"):
            text = form.spell([(call["function"]["name"], call["function"]["arguments"]) for call in calls])
            rest["content"] = _joined(rest["content"], text, "\n")
        spelled.append(rest)
    return spelled


def render_tools(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    form: CallForm,
    **switches: Any,
) -> str:
    """As render_chat, for a template that does not print tools. The tools are appended to the system message or, where the
    template does not print that, put before the user's first message.
    """
    text = _description(tools, form)
    refusal: InvalidRequest | None = None
    for placed in (_in_system(messages, text), _in_first_of_user(messages, text)):
        try:
            rendered = render_chat(template, placed, special_tokens, tools, add_generation_prompt, **switches)
        except InvalidRequest as error:
            refusal = error
            continue
        if text in rendered:
            return rendered
    raise refusal or InvalidRequest(
        "The chat template prints no tools, and no message that they could stand in; leave tools out, "
        "or start the server with a --chat-template that prints them.",
        "tools",
    )


def _description(tools: Sequence[Mapping[str, Any]], form: CallForm) -> str:
    if form.named is None and (words := form.words(tools)) is not None:
        return words
    listed = "\n".join(_json(tool) for tool in tools)
    if form.named is not None:
        how = f"Call {form.named} now: answer with its arguments alone, as a JSON object."
    else:
        example = form.spell([("<name of the function>", {"<name of an argument>": "<value>"})])
        how = f"To call functions, answer with nothing but the calls, written so:\n{example}"
    return f"You can call these functions:\n{listed}\n\n{how}"


def _in_system(messages: Sequence[Mapping[str, Any]], text: str) -> list[Mapping[str, Any]]:
    if not messages or messages[0]["role"] != "system":
        parts = any(isinstance(message["content"], list) for message in messages)
        return [{"role": "system", "content": _parts(text) if parts else text}, *messages]
    return [{**messages[0], "content": _joined(messages[0]["content"], text, "\n\n")}, *messages[1:]]


def _in_first_of_user(messages: Sequence[Mapping[str, Any]], text: str) -> list[Mapping[str, Any]]:
    at = next((at for at, message in enumerate(messages) if message["role"] == "user"), None)
    if at is None:
        return list(messages)
    content: Content = messages[at]["content"]
    first = text + "\n\n"
    changed = {**messages[at], "content": first + content if isinstance(content, str) else [*_parts(first), *content]}
    return [*messages[:at], changed, *messages[at + 1 :]]


def _joined(content: Content, text: str, between: str) -> Content:
    if isinstance(content, str):
        return f"{content}{between}{text}" if content else text
    return [*content, *_parts(between + text if content else text)]


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
