"""The media parts of chats, images and videos alike: finding them, and bounding their number."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from octavo.errors import InvalidRequest

__all__ = ["check_number", "given_parts"]


def given_parts(
    messages: Sequence[Mapping[str, Any]], types: Collection[str], sources: Sequence[str]
) -> Iterator[tuple[Any, str]]:
    """What the parts of these types name, in their order, and where each stands, such as messages.0.content.1.

    `sources`: the keys that may name it, of which the first that is there counts, or the `url` within it; None without one.
    """
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        for place, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, Mapping) and part.get("type") in types:
                given = next((part[key] for key in sources if part.get(key) is not None), None)
                yield (given.get("url") if isinstance(given, Mapping) else given), f"messages.{number}.content.{place}"


def check_number(number: int, limit: int | None, kind: str) -> None:
    """Raises InvalidRequest for more than `limit` parts of a request; `kind`: such as images."""
    if limit is not None and number > limit:
        raise InvalidRequest(
            f"A request may have {limit} {kind} here (--limit-mm-per-prompt), and this has {number}.", "messages"
        )
