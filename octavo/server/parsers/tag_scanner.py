"""Scans text that arrives in pieces, tag by tag. Between pieces it holds back at most the beginning of a tag."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache

from octavo.server.parsers.call import undecided

__all__ = ["TagScanner"]

_BLANKS = re.compile(r"\s*")
_QUOTES = " \t\"'"
_LONGEST = 64  # longer than any tag


class TagScanner:
    """`raw` collects consumed text (except by `search` and `drop_blanks`) until its meaning is certain."""

    def __init__(self) -> None:
        self.text, self.at = "", 0
        self.raw: list[str] = []
        self.word = 0  # index in `raw` where a name begins

    def add(self, text: str) -> None:
        """Appends text."""
        self.text, self.at = self.text[self.at :] + text, 0

    def rest(self) -> str:
        """Consumes and returns all remaining text."""
        rest, self.text, self.at = self.text[self.at :], "", 0
        return rest

    def take_raw(self) -> str:
        """Returns the collected text and clears it."""
        raw, self.raw = "".join(self.raw), []
        return raw

    def drop_blanks(self) -> None:
        """Consumes blanks without collecting them."""
        self.at = _end_of_blanks(self.text, self.at)

    def one(self) -> str:
        """Consumes one character; "" if there is none."""
        character = self.text[self.at : self.at + 1]
        self.at += len(character)
        return character

    def skip(self) -> bool:
        """Consumes blanks. Whether something follows them already."""
        end = _end_of_blanks(self.text, self.at)
        self.raw.append(self.text[self.at : end])
        self.at = end
        return end < len(self.text)

    def expect(self, tags: Iterable[str]) -> str | None:
        """Consumes the one of `tags` that comes next, after optional blanks; "" if none does, None if it is undecided."""
        return self.here(tags) if self.skip() else None

    def here(self, tags: Iterable[str]) -> str | None:
        """As `expect`, without blanks."""
        for tag in tags:
            if self.text.startswith(tag, self.at):
                self.raw.append(tag)
                self.at += len(tag)
                return tag
        rest = self.text[self.at : self.at + _LONGEST]
        return None if any(tag.startswith(rest) for tag in tags) else ""

    def take_word(self, end: str, stops: re.Pattern[str]) -> str | None:
        """Consumes a name and its `end`; "" if it is no name, None if it is undecided."""
        stop = stops.search(self.text, self.at)
        place = stop.start() if stop else len(self.text)
        self.raw.append(self.text[self.at : place])
        self.at = place
        if stop is None:
            return None
        word = "".join(self.raw[self.word :]).strip(_QUOTES)
        return word if not end else self.here((end,)) and word

    def search(self, tags: tuple[str, ...], take: Callable[[str], None]) -> str:
        """Consumes text up to and including the first of `tags`, or up to where one may begin; returns the tag, or ""."""
        match = _any_of(tags).search(self.text, self.at)
        if match is not None:
            place, found = match.start(), match[0]
        else:
            found = ""
            last = self.text[max(self.at, len(self.text) - _LONGEST) :]
            place = len(self.text) - max(undecided(last, tag) for tag in tags)
        if place > self.at:
            take(self.text[self.at : place])
        self.at = place + len(found)
        return found


@lru_cache(maxsize=32)
def _any_of(tags: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tags)))


def _end_of_blanks(text: str, start: int) -> int:
    found = _BLANKS.match(text, start)
    return found.end() if found else start
