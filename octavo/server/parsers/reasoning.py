"""Splits the text that a model writes into an assistant's message: reasoning, content and tool calls."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable
from typing import Any

from octavo.server.parsers.call import CallParser, ToolCall, undecided
from octavo.server.parsers.token_calls import TOKEN_FORMS

__all__ = [
    "CLOSE",
    "OPEN",
    "REASONING_PARSERS",
    "MessageReader",
    "ThinkKeeper",
    "ThinkSplitter",
    "join_delta",
    "joined",
    "make_splitter",
]

OPEN, CLOSE = "<think>", "</think>"
REASONING_PARSERS = {  # value: whether the model starts thinking without an opening tag
    **{"qwen3": False, "deepseek_r1": True, "deepseek_v3": False, "glm45": False, "kimi_k2": False},
    **{"minimax_m2": True, "minimax_m2_append_think": True},
}
KEEPERS = frozenset({"minimax_m2_append_think"})
CALLS_END_THINKING = {"kimi_k2": TOKEN_FORMS["kimi_k2"].blocks[0]}  # it calls tools while thinking, and leaves it unclosed
_ALPHABET = string.ascii_letters + string.digits


def make_splitter(name: str, prompt: str) -> ThinkSplitter | ThinkKeeper:
    """The splitter of an answer to `prompt`. The end of the prompt shows whether thinking is open or over."""
    end = prompt.rstrip()
    inside = end.endswith(OPEN) or (REASONING_PARSERS[name] and not end.endswith(CLOSE))
    return ThinkKeeper(inside) if name in KEEPERS else ThinkSplitter(inside, CALLS_END_THINKING.get(name))


class ThinkSplitter:
    """Splits text at the think tags. `inside`: the prompt has opened the thinking. `calls`: a marker of tool calls that also
    ends the thinking, and is content.
    """

    def __init__(self, inside: bool, calls: str | None = None):
        self._inside, self._calls = inside, calls
        self._held = ""
        self._blanks: list[str] = []  # leading blanks, until it is known whether they belong to the text
        self._state = "start"

    @property
    def thinking(self) -> bool:
        """Whether the text so far ends within thinking."""
        return self._state == "thinking" or (self._state == "start" and self._inside)

    def feed(self, text: str) -> tuple[str, str]:
        """The reasoning and the content that are certain now."""
        if self._state == "content":
            return "", text
        if self._state == "between":
            return "", self._first_content(text)
        self._held += text
        if self._state == "start":
            self._begin()
        if self._state == "thinking":
            return self._think()
        return "", self._release() if self._state == "content" else ""

    def finish(self) -> tuple[str, str]:
        """What was held back."""
        rest = self._release()
        return (rest, "") if self._state == "thinking" or self._inside else ("", rest)

    def _begin(self) -> None:
        """Leaves the start state once the text has an opening tag or cannot have one."""
        text = self._held.lstrip()
        self._blanks.append(self._held[: len(self._held) - len(text)])
        self._held = text
        if text.startswith(OPEN):
            self._state, self._held = "thinking", text[len(OPEN) :]
            self._blanks.clear()
        elif not OPEN.startswith(text):
            self._state = "thinking" if self._inside else "content"

    def _think(self) -> tuple[str, str]:
        text = self._release()
        reasoning, closed, content = text.partition(CLOSE)
        if self._calls and self._calls in reasoning:
            reasoning, closed, content = text.partition(self._calls)
            content = closed + content
        if closed:
            self._state, self._inside = "between", False
            return reasoning, self._first_content(content)
        keep = max(undecided(reasoning, CLOSE), undecided(reasoning, self._calls or CLOSE))
        self._held = reasoning[len(reasoning) - keep :]
        return reasoning[: len(reasoning) - keep], ""

    def _first_content(self, text: str) -> str:
        """Content without the blank lines between it and the thinking."""
        text = text.lstrip("\n")
        self._state = "content" if text else "between"
        return text

    def _release(self) -> str:
        rest, self._held = "".join((*self._blanks, self._held)), ""
        self._blanks.clear()
        return rest


class ThinkKeeper:
    """Leaves thinking in the content between its tags, because MiniMax-M2 expects it back. Only later text may have calls."""

    def __init__(self, inside: bool):
        self._held = OPEN if inside else ""
        self._over = not inside

    def feed(self, text: str) -> tuple[str, str]:
        """The thinking with its tags, and the content, that are certain now."""
        if self._over:
            return "", text
        thinking, closed, content = (self._held + text).partition(CLOSE)
        self._over = bool(closed)
        keep = 0 if closed else undecided(thinking, CLOSE)
        self._held = thinking[len(thinking) - keep :]
        return thinking[: len(thinking) - keep] + closed, content

    def finish(self) -> tuple[str, str]:
        """What was held back."""
        rest, self._held = self._held, ""
        return rest, ""


class MessageReader:
    """Makes the deltas of one chat choice, in the format of OpenAI's streams."""

    def __init__(
        self,
        calls: CallParser | None,
        thinking: ThinkSplitter | ThinkKeeper | None,
        make_id: Callable[[str, int], str] | None = None,
        parallel: bool = True,
    ):
        """`make_id(function name, index of the call)`: the id of a call for which the model wrote none. `parallel`: whether
        calls behind the first are told."""
        self._parser, self._thinking, self._make_id, self._parallel = calls, thinking, make_id or _call_id, parallel
        self.calls = 0

    @property
    def splits(self) -> bool:
        """Whether thinking is split from the content."""
        return isinstance(self._thinking, ThinkSplitter)

    @property
    def thinking(self) -> bool:
        """Whether the text so far ends within thinking that is split from the content."""
        return isinstance(self._thinking, ThinkSplitter) and self._thinking.thinking

    def feed(self, text: str, final: bool) -> dict[str, Any]:
        """The additions of `text` to the message: content, reasoning_content, tool_calls. `final`: the last text."""
        if self._parser is None and self._thinking is None:
            return {"content": text}  # the common case: nothing to parse
        reasoning = ""
        if self._thinking is not None:
            reasoning, text = self._thinking.feed(text)
            if final:
                more = self._thinking.finish()
                reasoning, text = reasoning + more[0], text + more[1]
        delta = self._split(text, final)
        if reasoning and isinstance(self._thinking, ThinkKeeper):
            return {**delta, "content": reasoning + delta.get("content", "")}
        return {"reasoning_content": reasoning, **delta} if reasoning else delta

    def _split(self, text: str, final: bool) -> dict[str, Any]:
        if self._parser is None:
            return {"content": text} if text else {}
        parts = self._parser.feed(text) + (self._parser.finish() if final else [])
        content = "".join(part for part in parts if isinstance(part, str))
        calls = [self._call(part) for part in parts if isinstance(part, ToolCall)]
        calls = [call for call in calls if self._parallel or not call["index"]]
        return ({"content": content} if content else {}) | ({"tool_calls": calls} if calls else {})

    def _call(self, call: ToolCall) -> dict[str, Any]:
        if call.name is None:
            return {"index": self.calls - 1, "function": {"arguments": call.arguments}}
        self.calls += 1
        function = {"name": call.name, "arguments": call.arguments}
        call_id = call.id or self._make_id(call.name, self.calls - 1)
        return {"index": self.calls - 1, "id": call_id, "type": "function", "function": function}


def _call_id(name: str, place: int) -> str:
    # Mistral's templates refuse ids that are not nine letters and digits; other templates accept any id
    return "".join(secrets.choice(_ALPHABET) for _ in range(9))


def join_delta(message: dict[str, Any], delta: dict[str, Any]) -> None:
    """Adds a delta to a message that is not streamed. Texts stay lists until they are `joined`."""
    for key in ("content", "reasoning_content"):
        if delta.get(key):
            message.setdefault(key, []).append(delta[key])
    for call in delta.get("tool_calls", ()):
        calls = message.setdefault("tool_calls", [])
        if "id" in call:
            function = {"name": call["function"]["name"], "arguments": [call["function"]["arguments"]]}
            calls.append({"id": call["id"], "type": "function", "function": function})
        else:
            calls[-1]["function"]["arguments"].append(call["function"]["arguments"])


def joined(message: dict[str, Any]) -> dict[str, Any]:
    """The message of the added deltas: content, reasoning_content and tool_calls, those that are present."""
    out: dict[str, Any] = {key: "".join(message[key]) for key in ("content", "reasoning_content") if key in message}
    calls = [
        {**call, "function": {**call["function"], "arguments": "".join(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    return {**out, "tool_calls": calls} if calls else out
