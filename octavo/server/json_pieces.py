"""Encodes JSON of large answers in pieces, because the encoder holds the interpreter's lock until it is done."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["Later", "json_body"]

SLICE = 64  # list entries per piece, each with at most 20 alternatives: a few milliseconds
GROWING = frozenset(("choices", "output", "content"))  # lists of objects that have long lists
TURN = 2**16  # characters after which other tasks of the event loop get a turn


class Later:
    """A value that is made when it is written. All of a long answer's together would hold up the event loop."""

    __slots__ = ("_given", "_make")

    def __init__(self, make: Callable[..., Any], *given: Any):
        self._make, self._given = make, given

    def made(self) -> Any:
        return self._make(*self._given)


def _made(value: Any) -> Any:
    if isinstance(value, Later):
        return value.made()
    raise TypeError(f"{type(value).__name__} is no JSON")


_dump = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=_made).encode


async def json_body(answer: dict[str, Any]) -> bytes:
    """The JSON of an answer. Yields to other streams in between."""
    pieces, length = [], 0
    for piece in _pieces(answer):
        pieces.append(piece.encode())
        if (length := length + len(piece)) > TURN:
            length = 0
            await asyncio.sleep(0)
    return b"".join(pieces)


def _pieces(answer: dict[str, Any]) -> Iterator[str]:
    """Splits the parts that grow with an answer: its choices or items, and the lists in them."""
    for number, (key, value) in enumerate(answer.items()):
        yield f"{',' if number else '{'}{_dump(key)}:"
        if isinstance(value, dict):
            yield from _pieces(value)
        elif key in GROWING and isinstance(value, list) and value and isinstance(value[0], dict):
            for place, one in enumerate(value):
                yield "," if place else "["
                yield from _pieces(one)
            yield "]"
        elif isinstance(value, list):
            for start in range(0, len(value), SLICE):
                yield ("," if start else "[") + _dump(value[start : start + SLICE])[1:-1]
            yield "]" if value else "[]"
        else:
            yield _dump(value)
    yield "}" if answer else "{}"
