"""What parsers of tool calls give: parts of an answer, content and calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["CallParser", "NamedCall", "Part", "ToolCall", "undecided"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call, or with `name` None more of the last call's arguments. `arguments` is JSON text."""

    name: str | None
    arguments: str


Part = str | ToolCall


class CallParser(Protocol):
    """Text in, parts out; `finish` gives what was held back."""

    def feed(self, text: str) -> list[Part]: ...
    def finish(self) -> list[Part]: ...


class NamedCall:
    """The parser of a call whose function the request has named: all the text is its arguments, given out as it comes."""

    def __init__(self, name: str):
        self._name: str | None = name

    def feed(self, text: str) -> list[Part]:
        """More arguments."""
        if not text:
            return []
        name, self._name = self._name, None
        return [ToolCall(name, text)]

    def finish(self) -> list[Part]:
        """Nothing is ever held back."""
        return []


def undecided(text: str, marker: str) -> int:
    """The length of the longest end of `text` that `marker` begins with."""
    longest = min(len(text), len(marker) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(marker[:n])), 0)
