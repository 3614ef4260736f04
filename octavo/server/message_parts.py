"""Turns the deltas of a chat's message into a sequence of parts: reasoning, text, calls, each with a begin and an end.

OpenAI's Responses (output items) and Anthropic's Messages (content blocks) both stream such sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

__all__ = ["MessagePart", "MessageParts", "Step"]

Kind = Literal["reasoning", "text", "call"]


@dataclass(slots=True)
class MessagePart:
    """A part of an answer. `id` and `name` are a call's. `logprobs`: a text's, in the chat format."""

    kind: Kind
    number: int
    id: str = ""
    name: str = ""
    texts: list[str] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)

    @property
    def text(self) -> str:
        """What it says, or a call's arguments, so far."""
        return "".join(self.texts)


class Step(NamedTuple):
    """What happens to a part: it begins, `text` is added with its `logprobs`, it ends."""

    what: Literal["begin", "add", "end"]
    part: MessagePart
    text: str = ""
    logprobs: list[Any] = []  # noqa: RUF012 (never changed)


class MessageParts:
    """Reads the deltas of one choice. `calls`: how many calls there were."""

    def __init__(self) -> None:
        self.parts: list[MessagePart] = []
        self.calls = 0
        self._open: MessagePart | None = None
        self._blank = ""  # content that may be the white space between two other parts, which is none
        self._logprobs: list[Any] = []  # of content that is held back

    def add(self, message: dict[str, Any], logprobs: dict[str, Any] | None = None) -> Iterator[Step]:
        """The steps of one delta."""
        if reasoning := message.get("reasoning_content"):
            yield from self._add("reasoning", reasoning)
        if not reasoning and not message.get("tool_calls") and logprobs is not None:
            self._logprobs += logprobs["content"]
        calls = message.get("tool_calls", ())
        begun = next((place for place, call in enumerate(calls) if "id" in call), len(calls))
        for call in calls[:begun]:  # the rest of the call that is open, before content that follows it
            yield from self._add("call", call["function"]["arguments"])
        if content := message.get("content"):
            self._blank += content
            if (self._open is not None and self._open.kind == "text") or not self._blank.isspace():
                yield from self._add("text", self._blank)
        for call in calls[begun:]:
            function = call["function"]
            if "id" in call:
                self.calls += 1
                yield from self._begin("call", call["id"], function["name"])
            if function["arguments"]:
                yield from self._add("call", function["arguments"])

    def finish(self) -> Iterator[Step]:
        """The last steps. An answer without anything has one empty text."""
        if not self.parts:
            yield from self._add("text", self._blank)
        yield from self._end()

    def _add(self, kind: Kind, text: str) -> Iterator[Step]:
        if self._open is None or self._open.kind != kind:
            yield from self._begin(kind)
        assert self._open is not None
        logprobs: list[Any] = []
        if kind == "text":
            logprobs, self._logprobs, self._blank = self._logprobs, [], ""
        if text or logprobs:
            self._open.texts.append(text)
            self._open.logprobs += logprobs
            yield Step("add", self._open, text, logprobs)

    def _begin(self, kind: Kind, call_id: str = "", name: str = "") -> Iterator[Step]:
        yield from self._end()
        if kind != "text":
            self._blank, self._logprobs = "", []
        self._open = MessagePart(kind, len(self.parts), call_id, name)
        self.parts.append(self._open)
        yield Step("begin", self._open)

    def _end(self) -> Iterator[Step]:
        if self._open is not None:
            self._open.logprobs += self._logprobs if self._open.kind == "text" else []
            ended, self._open = self._open, None
            yield Step("end", ended)
