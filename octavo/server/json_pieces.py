"""JSON of large answers, encoded piece by piece: the library's encoder holds the interpreter's lock until it is done."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

__all__ = ["json_body"]

SLICE = 64  # entries of a list, each with its 20 alternatives at most: a few milliseconds
TURN = 2**16  # characters between two turns of the event loop
_dump = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


async def json_body(answer: dict[str, Any]) -> bytes:
    """The JSON of an answer. Other streams go on meanwhile."""
    pieces, length = [], 0
    for piece in _pieces(answer):
        pieces.append(piece.encode())
        if (length := length + len(piece)) > TURN:
            length = 0
            await asyncio.sleep(0)
    return b"".join(pieces)


def _pieces(answer: dict[str, Any]) -> Iterator[str]:
    """What grows with an answer is its choices, and the lists in them."""
    for number, (key, value) in enumerate(answer.items()):
        yield f"{',' if number else '{'}{_dump(key)}:"
        if isinstance(value, dict):
            yield from _pieces(value)
        elif key == "choices" and value:
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
