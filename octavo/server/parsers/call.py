"""The output of tool-call parsers: parts of an answer, which are content or calls."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import isfinite
from typing import Any, Protocol

__all__ = ["CallParser", "NamedCall", "NoNumber", "Part", "ToolCall", "as_object", "decode", "undecided"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call; with `name` None, more of the last call's arguments. `arguments` is JSON text, `id` the model's, if any."""

    name: str | None
    arguments: str
    id: str | None = None


Part = str | ToolCall


class CallParser(Protocol):
    """Takes text and returns parts. `finish` returns what was held back."""

    def feed(self, text: str) -> list[Part]: ...
    def finish(self) -> list[Part]: ...


class NamedCall:
    """The parser for a function named by the request: all text is its arguments, returned as it comes."""

    def __init__(self, name: str):
        self._name: str | None = name

    def feed(self, text: str) -> list[Part]:
        """Returns the text as arguments."""
        if not text:
            return []
        name, self._name = self._name, None
        return [ToolCall(name, text)]

    def finish(self) -> list[Part]:
        """Nothing is held back."""
        return []


def undecided(text: str, marker: str) -> int:
    """The length of the longest suffix of `text` that is a prefix of `marker`."""
    longest = min(len(text), len(marker) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(marker[:n])), 0)


class NoNumber(ValueError):
    """NaN or infinity, which Python's reader accepts and JSON cannot express."""


def _refuse(word: str) -> float:
    raise NoNumber(word)


def _finite(digits: str) -> float:
    return value if isfinite(value := float(digits)) else _refuse(digits)


decode: Any = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite).raw_decode  # ValueError, RecursionError


def as_object(text: str) -> str | None:
    """`text` unchanged if all of it is one JSON object; "{}" for empty text; None for anything else."""
    text = text.strip()
    try:
        value, end = decode(text) if text else ({}, 0)
    except (ValueError, RecursionError):
        return None
    return (text or "{}") if isinstance(value, dict) and end == len(text) else None
