"""Tool calls in what a model writes, in the formats of the model families.

A parser takes text as it comes and gives back what is plain content and what is a call. A call is given out once it is
whole, so that a call the model got wrong can still be shown as the content it then is.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from math import isfinite
from typing import Any, Protocol

from octavo.text.tool_prompt import PLAIN_CALLS, CallForm

__all__ = ["PARSERS", "CallParser", "Format", "NamedCall", "Part", "ToolCall", "json_parser", "undecided"]


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


@dataclass(frozen=True, slots=True)
class Format:
    """How a model family writes its calls."""

    opener: str  # where calls begin; empty: at the first character
    closer: str = ""  # where one call ends; empty: where its JSON ends
    bare: bool = False  # the opener may be left out if the answer begins with a JSON object
    special: bool = False  # the opener is a special token: text must keep those
    told: CallForm = PLAIN_CALLS  # how a model is told to write calls whose chat template says nothing of them


_IN_LIST = {"between": ", ", "closer": "]"}
PARSERS = {
    # qwen2, qwen3 and NousResearch's models
    "hermes": Format("<tool_call>", "</tool_call>", told=CallForm(before="<tool_call>\n", after="\n</tool_call>")),
    "llama3_json": Format("<|python_tag|>", bare=True, special=True, told=CallForm(between="; ", key="parameters")),
    # a JSON array, or since v11 name{...}
    "mistral": Format("[TOOL_CALLS]", special=True, told=CallForm("[TOOL_CALLS][", **_IN_LIST)),
    # what tool_choice "required" makes the model write, whatever its family
    "json": Format("", told=CallForm("[", **_IN_LIST, key="parameters")),
}
_BETWEEN = " \n\r\t;,[]"
_NAME = re.compile(r"\s*([\w.\-/]+)\s*(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")


class _NoNumber(ValueError):
    """NaN, or what is infinite: Python's reader takes it, and JSON has no word for it."""


def _refuse(word: str) -> float:
    raise _NoNumber(word)


def _finite(digits: str) -> float:
    return value if isfinite(value := float(digits)) else _refuse(digits)


_decode = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite).raw_decode


def json_parser(name: str) -> CallParser:
    """A parser for one answer, in one of PARSERS."""
    return _Parser(PARSERS[name])


class _Parser:
    def __init__(self, form: Format):
        self._form = form
        self._held = ""  # text that is not given out yet
        self._in_calls = not form.opener
        self._opening = ""  # the text that began this run of calls
        self._calls = 0  # calls in this run
        self._begun = False  # something was given out
        self._tried = 0  # characters of `_held` in which no call was found
        self._in_string = False  # of JSON, at that place: a marker there is an argument's text
        self._marks = re.compile(rf'\\.|["\n]|{re.escape(form.closer)}', re.DOTALL) if form.closer else None

    def feed(self, text: str) -> list[Part]:
        """The parts that are sure now."""
        self._held += text
        parts: list[Part] = []
        while True:
            if not self._in_calls:
                parts.append(self._content())
            if not self._in_calls or (part := self._call()) is None:
                break
            parts.append(part)
        parts = [part for part in parts if part]
        self._begun |= bool(parts)
        return parts

    def finish(self) -> list[Part]:
        """What is left: a call without its closer, or text that turned out to be content."""
        parts: list[Part] = []
        while self._in_calls and (taken := self._take()):
            parts.append(taken)
        while self._in_calls and (closer := self._form.closer) and closer in self._held:  # inside a string that never ended
            body, _, self._held = self._held.partition(closer)
            self._in_calls = False
            parts += [self._opening + body + closer, *self.feed("")]
        rest, self._held = self._held, ""
        if self._calls:
            rest = rest.strip(_BETWEEN)
        elif self._in_calls:
            rest, self._opening = self._opening + rest, ""
        return [*parts, rest] if rest else parts

    def _content(self) -> str:
        """Content up to where calls begin, or as far as they cannot have begun."""
        if self._calls:
            self._held = self._held.lstrip()  # blanks after a call belong to nobody
        if self._form.bare and not self._begun and (first := self._held.lstrip()[:1]) in ("", "{"):
            if first:
                self._enter("", self._held)
            return ""
        content, opener, rest = self._held.partition(self._form.opener)
        if opener:
            self._enter(opener, rest)
        else:
            keep = undecided(content, self._form.opener)
            content, self._held = content[: len(content) - keep], content[len(content) - keep :]
            self._calls = 0 if content else self._calls
        return content

    def _enter(self, opening: str, rest: str) -> None:
        self._in_calls, self._opening, self._held = True, opening, rest
        self._calls = self._tried = 0
        self._in_string = False

    def _call(self) -> Part | None:
        """The next part of a run of calls, or None when more text is needed."""
        closer = self._form.closer
        if not closer:
            closes = "}" in self._held[self._tried :]  # until a brace closes, parsing again is of no use
            self._tried = len(self._held)
            return self._take() if closes else None
        if (at := self._closer_at(closer)) is None:
            return None
        body, after = self._held[:at], self._held[at + len(closer) :]
        self._held = body
        call = self._take()
        self._in_calls, self._held = False, after
        return call or self._opening + body + closer

    def _closer_at(self, closer: str) -> int | None:
        """Where the closer stands outside of JSON's strings. Each character is looked at once, however the text comes."""
        assert self._marks is not None
        end = self._tried
        for mark in self._marks.finditer(self._held, self._tried):
            end = mark.end()
            if mark[0] == closer and not self._in_string:
                return mark.start()
            if mark[0] in ('"', "\n"):  # a string of JSON ends at its line's end at the latest
                self._in_string = mark[0] == '"' and not self._in_string
        self._tried = max(end, len(self._held) - len(closer) + 1)
        return None

    def _take(self) -> ToolCall | None:
        text = self._held.lstrip(_BETWEEN.replace("[", ""))
        if self._form.opener and text.startswith(self._form.opener):  # mistral repeats it before every call
            text = text[len(self._form.opener) :]
        if (taken := _take(text)) is None:
            return None
        call, self._held = taken
        self._calls += 1
        self._tried = 0
        return call


def _take(text: str) -> tuple[ToolCall, str] | None:
    """The first whole call in `text` and what follows it, or None if there is none (yet)."""
    text = text.lstrip(_BETWEEN)
    named = _NAME.match(text)
    try:
        value, end = _decode(text, named.end() if named else 0)
    except (ValueError, RecursionError):
        return None
    call = ToolCall(named[1], json.dumps(value, ensure_ascii=False)) if named else _as_call(value)
    return None if call is None else (call, text[end:])


def _as_call(value: Any) -> ToolCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if not isinstance(arguments, str):
        return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))
    try:
        _decode(arguments.strip())
    except _NoNumber:
        return None
    except (ValueError, RecursionError):
        pass  # text is what the model wrote, and a client may make something of it
    return ToolCall(value["name"], arguments)


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
