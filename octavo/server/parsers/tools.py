"""JSON tool calls in the formats of the model families.

A parser takes text as it arrives and returns content and calls. A call is returned once it is complete, so that a malformed
call can still be returned as content.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from octavo.server.parsers.call import CallParser, NoNumber, Part, ToolCall, decode, undecided
from octavo.text.tool_prompt import PLAIN_CALLS, CallForm

__all__ = ["PARSERS", "Format", "json_parser"]


@dataclass(frozen=True, slots=True)
class Format:
    """The call format of a model family."""

    opener: str  # opening of the calls; empty: they begin at the first character
    closer: str = ""  # end of a call; empty: the end of its JSON
    bare: bool = False  # the opener may be missing if the answer begins with a JSON object
    special: bool = False  # the opener is a special token, which detokenization must keep
    call_form: CallForm = PLAIN_CALLS  # the format described to a model whose chat template does not describe it


_IN_LIST = {"between": ", ", "closer": "]"}
PARSERS = {
    # qwen2, qwen3 and NousResearch's models
    "hermes": Format("<tool_call>", "</tool_call>", call_form=CallForm(before="<tool_call>\n", after="\n</tool_call>")),
    "llama3_json": Format("<|python_tag|>", bare=True, special=True, call_form=CallForm(between="; ", key="parameters")),
    # a JSON array, or since v11 name{...}
    "mistral": Format("[TOOL_CALLS]", special=True, call_form=CallForm("[TOOL_CALLS][", **_IN_LIST)),
    # the format that tool_choice "required" enforces for every family
    "json": Format("", call_form=CallForm("[", **_IN_LIST, key="parameters")),
}
_BETWEEN = " \n\r\t;,[]"
_BLANKS: Any = re.compile(r"\s*+").match
_OBJECT = re.compile(r'\\.|["{}]', re.DOTALL)  # tokens that determine the end of a JSON object


def json_parser(name: str) -> CallParser:
    """A parser for one answer, in a format of PARSERS."""
    return _Parser(PARSERS[name])


class _Parser:
    """Reads each character once, or twice where a JSON string turns out to be unclosed, however the text is split.

    Markers are recognized outside of JSON strings only: inside, they are part of an argument.
    """

    def __init__(self, form: Format):
        self._form = form
        self._tail = ""  # unread text, which the next text may complete to a marker
        self._held: list[str] = []  # read text that is not returned yet
        self._length = 0  # of the held text
        self._in_calls = not form.opener
        self._opening = ""  # the text that began this run of calls
        self._calls = 0  # calls in this run
        self._begun = False  # whether content or a call is certain
        self._in_string = False
        self._cut: int | None = None  # offset in the held text of the line's first closer inside a string
        self._unguarded = 0  # offset from which closers inside strings are text
        self._depth = 0  # nesting depth of the JSON object being read
        self._no_more_calls = False  # whether no call can follow in this run
        self._head = re.compile(  # header of a call; possessive quantifiers, to avoid backtracking
            rf"[ \n\r\t;,\]]*+(?:{re.escape(form.opener)})?[ \n\r\t;,\[\]]*+"  # mistral repeats the opener before every call
            r"(?:([\w.\-/]++)\s*+(?:\[CALL_ID\]\w++)?(?:\[ARGS\])?\s*+)?(?=\{)"
        )
        self._marks = re.compile(rf'\\.|["\n]|{re.escape(form.closer)}', re.DOTALL)

    def feed(self, text: str) -> list[Part]:
        """The parts that are certain now."""
        data, self._tail = self._tail + text, ""
        return self._read(data, 0)

    def _read(self, data: str, unguarded: int) -> list[Part]:
        """Before offset `unguarded` a closer ends the call even inside a string."""
        at, parts, self._unguarded = 0, list[Part](), unguarded
        while at < len(data):
            if not self._in_calls:
                at = self._content(data, at, parts)
            elif self._form.closer:
                data, at = self._to_closer(data, at, parts)
            else:
                at = self._to_end_of_object(data, at, parts)
        parts = [part for part in parts if part]
        self._begun |= bool(parts)
        return parts

    def finish(self) -> list[Part]:
        """The rest: a call without its closer, or content."""
        parts: list[Part] = []
        rest, at, self._tail = self._take_held() + self._tail, 0, ""
        if self._in_calls and (cut := self._cut) is not None and self._call(rest, 0) is None:
            after = rest[cut + len(self._form.closer) :]
            parts += [self._close(rest[:cut]), *self._read(after, len(after))]
            rest, self._tail = self._take_held() + self._tail, ""
        self._cut = None
        while self._in_calls and self._form.closer and (parsed := self._call(rest, at)) is not None:
            part, at = parsed
            parts.append(part)
            self._calls += 1
        rest = rest[at:]
        if self._calls:
            rest = rest.strip(_BETWEEN)
        elif self._in_calls:
            rest, self._opening = self._opening + rest, ""
        return [part for part in (*parts, rest) if part]

    def _content(self, data: str, at: int, parts: list[Part]) -> int:
        """Returns content up to where calls begin or may begin, and the offset to continue from."""
        if self._calls:  # blanks after a call are dropped
            at = _BLANKS(data, at).end()
        if self._form.bare and not self._begun:
            first: int = _BLANKS(data, at).end()
            if first == len(data):
                self._hold(data[at:])
                return first
            if data[first] == "{":
                self._enter("")
                return at
            self._begun = True
            parts.append(self._take_held())
        opener = self._form.opener
        where = data.find(opener, at)
        if where >= 0:
            parts.append(data[at:where])
            self._enter(opener)
            return where + len(opener)
        where = len(data) - undecided(data[max(at, len(data) - len(opener)) :], opener)
        self._tail = data[where:]
        self._calls = 0 if where > at else self._calls
        parts.append(data[at:where])
        return len(data)

    def _enter(self, opening: str) -> None:
        self._in_calls, self._opening, self._calls = True, opening, 0
        self._in_string, self._cut = False, None

    def _to_closer(self, data: str, at: int, parts: list[Part]) -> tuple[str, int]:
        """Looks for the closer of a call and adds the call. Returns the text and the offset to continue from."""
        closer, end = self._form.closer, at
        for mark in self._marks.finditer(data, at):
            end = mark.end()
            if mark[0] == closer and not (self._in_string and mark.start() >= self._unguarded):
                self._hold(data[at : mark.start()])
                parts.append(self._close(self._take_held()))
                return data, end
            if mark[0] == closer:
                self._cut = self._length + mark.start() - at if self._cut is None else self._cut
            elif mark[0] == '"':
                self._in_string = not self._in_string
            elif mark[0] == "\n":  # a JSON string cannot contain a line end
                if self._in_string and self._cut is not None:
                    return self._end_at_cut(data, at, mark.start(), parts)
                self._in_string, self._cut = False, None
        end = max(end, len(data) - len(closer) + 1)
        self._hold(data[at:end])
        self._tail = data[end:]
        return data, len(data)

    def _end_at_cut(self, data: str, at: int, line: int, parts: list[Part]) -> tuple[str, int]:
        """Ends the call at the first closer inside a string of a line with an unclosed string. The line ends at offset `line`
        of the data, and closers inside its strings count from now on."""
        assert self._cut is not None
        before = self._length
        if before:  # otherwise the data, which may be long, need not be copied
            held = self._take_held()
            data, at, line = held + data[at:], 0, before + line - at
        cut = at + self._cut
        parts.append(self._close(data[at:cut]))
        self._unguarded = line
        return data, cut + len(self._form.closer)

    def _close(self, body: str) -> Part:
        """The text before a closer, as a call or as content."""
        self._in_calls, self._cut = False, None
        if (parsed := self._call(body, 0)) is None:
            return self._opening + body + self._form.closer
        self._calls += 1
        return parsed[0]

    def _to_end_of_object(self, data: str, at: int, parts: list[Part]) -> int:
        """Looks for the end of a call's JSON object and adds the call. Returns the offset to continue from."""
        end = at
        if not self._depth:
            begin = -1 if self._no_more_calls else data.find("{", at)
            if begin < 0:
                self._hold(data[at:])
                return len(data)
            end, self._depth = begin + 1, 1
        for mark in _OBJECT.finditer(data, end):
            end = mark.end()
            if mark[0] == '"':
                self._in_string = not self._in_string
            elif mark[0] in ("{", "}") and not self._in_string:
                self._depth += 1 if mark[0] == "{" else -1
                if not self._depth:
                    self._hold(data[at:end])
                    self._end_object(parts)
                    return end
        end = len(data) - (end < len(data) and data.endswith("\\"))  # the escaped character has not arrived yet
        self._hold(data[at:end])
        self._tail = data[end:]
        return len(data)

    def _end_object(self, parts: list[Part]) -> None:
        text = self._take_held()
        if (parsed := self._call(text, 0)) is None:  # no call, and no further text can make it one
            self._hold(text)
            self._no_more_calls = True
            return
        parts.append(parsed[0])
        self._calls += 1

    def _call(self, text: str, at: int) -> tuple[ToolCall, int] | None:
        """The first call in `text` from `at` on and its end, or None."""
        if (head := self._head.match(text, at)) is None:
            return None
        try:
            value, end = decode(text, head.end())
            call = ToolCall(head[1], json.dumps(value, ensure_ascii=False)) if head[1] else _as_call(value)
        except (ValueError, RecursionError):
            return None
        return None if call is None else (call, end)

    def _hold(self, text: str) -> None:
        self._held.append(text)
        self._length += len(text)

    def _take_held(self) -> str:
        text = "".join(self._held)
        self._held, self._length = [], 0
        return text


def _as_call(value: Any) -> ToolCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if not isinstance(arguments, str):
        return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))
    try:
        decode(arguments.strip())
    except NoNumber:
        return None
    except (ValueError, RecursionError):
        pass  # arguments that are no JSON are returned as the model wrote them
    return ToolCall(value["name"], arguments)
