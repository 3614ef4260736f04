"""What parsers of tool calls give: parts of an answer, content and calls."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import isfinite
from typing import Any, Protocol

__all__ = ["CallParser", "NamedCall", "NoNumber", "Part", "ToolCall", "as_object", "decode", "undecided"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call, or with `name` None more of the last call's arguments. `arguments` is JSON text, `id` the model's own, if any."""

    name: str | None
    arguments: str
    id: str | None = None


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


class NoNumber(ValueError):
    """NaN, or what is infinite: Python's reader takes it, and JSON has no word for it."""


def _refuse(word: str) -> float:
    raise NoNumber(word)


def _finite(digits: str) -> float:
    return value if isfinite(value := float(digits)) else _refuse(digits)


decode: Any = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite).raw_decode  # ValueError, RecursionError


def as_object(text: str) -> str | None:
    """The JSON object that all of `text` is, as it is written; none at all is an empty one. None for what is no object."""
    text = text.strip()
    try:
        value, end = decode(text) if text else ({}, 0)
    except (ValueError, RecursionError):
        return None
    return (text or "{}") if isinstance(value, dict) and end == len(text) else None
