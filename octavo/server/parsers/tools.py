"""Tool calls in what a model writes, in the formats of the model families.

A parser takes text as it comes and gives back what is plain content and what is a call. A call is given out once it is
whole, so that a call the model got wrong can still be shown as the content it then is.
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
_BLANKS: Any = re.compile(r"\s*+").match
_OBJECT = re.compile(r'\\.|["{}]', re.DOTALL)  # what tells where a JSON object ends


def json_parser(name: str) -> CallParser:
    """A parser for one answer, in one of PARSERS."""
    return _Parser(PARSERS[name])


class _Parser:
    """Each character is looked at once, or twice where a string of JSON turns out to have no end, however the text comes.

    The markers of a format are looked for outside of JSON's strings only: inside, they are an argument's text.
    """

    def __init__(self, form: Format):
        self._form = form
        self._tail = ""  # text that was not looked at: what comes may make it a marker
        self._held: list[str] = []  # text that was, and is not given out yet
        self._length = 0  # of what is held
        self._in_calls = not form.opener
        self._opening = ""  # the text that began this run of calls
        self._calls = 0  # calls in this run
        self._begun = False  # something was given out, or is sure to be content
        self._in_string = False
        self._cut: int | None = None  # where in what is held the line's first closer in a string stands
        self._unguarded = 0  # where in what is read strings begin to be trusted
        self._depth = 0  # of the JSON object that is being written
        self._hopeless = False  # no call can come of this run any more
        self._head = re.compile(  # of a call; possessive: what one part has taken, no other part tries
            rf"[ \n\r\t;,\]]*+(?:{re.escape(form.opener)})?[ \n\r\t;,\[\]]*+"  # mistral repeats the opener before every call
            r"(?:([\w.\-/]++)\s*+(?:\[CALL_ID\]\w++)?(?:\[ARGS\])?\s*+)?(?=\{)"
        )
        self._marks = re.compile(rf'\\.|["\n]|{re.escape(form.closer)}', re.DOTALL)

    def feed(self, text: str) -> list[Part]:
        """The parts that are sure now."""
        data, self._tail = self._tail + text, ""
        return self._read(data, 0)

    def _read(self, data: str, unguarded: int) -> list[Part]:
        """Up to `unguarded` a closer is one in a string too."""
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
        """What is left: a call without its closer, or text that turned out to be content."""
        parts: list[Part] = []
        rest, at, self._tail = self._take_held() + self._tail, 0, ""
        if self._in_calls and (cut := self._cut) is not None and self._call(rest, 0) is None:
            after = rest[cut + len(self._form.closer) :]
            parts += [self._close(rest[:cut]), *self._read(after, len(after))]
            rest, self._tail = self._take_held() + self._tail, ""
        self._cut = None
        while self._in_calls and self._form.closer and (taken := self._call(rest, at)) is not None:
            part, at = taken
            parts.append(part)
            self._calls += 1
        rest = rest[at:]
        if self._calls:
            rest = rest.strip(_BETWEEN)
        elif self._in_calls:
            rest, self._opening = self._opening + rest, ""
        return [part for part in (*parts, rest) if part]

    def _content(self, data: str, at: int, parts: list[Part]) -> int:
        """Gives out content up to where calls begin, or as far as they cannot have begun; where to go on."""
        if self._calls:  # blanks after a call belong to nobody
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
        """Looks for the closer of a call, and gives it out if it is there; where to go on, and in what."""
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
            elif mark[0] == "\n":  # a string of JSON ends at its line's end at the latest
                if self._in_string and self._cut is not None:
                    return self._end_at_cut(data, at, mark.start(), parts)
                self._in_string, self._cut = False, None
        end = max(end, len(data) - len(closer) + 1)
        self._hold(data[at:end])
        self._tail = data[end:]
        return data, len(data)

    def _end_at_cut(self, data: str, at: int, line: int, parts: list[Part]) -> tuple[str, int]:
        """Ends the call at the first closer that stood in a string of a line with a string that has no end: the line ends at
        `line` of the data, and no string in it is trusted any more."""
        assert self._cut is not None
        before = self._length
        if before:  # else the data is long, and is not copied
            held = self._take_held()
            data, at, line = held + data[at:], 0, before + line - at
        cut = at + self._cut
        parts.append(self._close(data[at:cut]))
        self._unguarded = line
        return data, cut + len(self._form.closer)

    def _close(self, body: str) -> Part:
        """What stood before a closer: a call, or content after all."""
        self._in_calls, self._cut = False, None
        if (taken := self._call(body, 0)) is None:
            return self._opening + body + self._form.closer
        self._calls += 1
        return taken[0]

    def _to_end_of_object(self, data: str, at: int, parts: list[Part]) -> int:
        """Looks for the end of a call's JSON object, and gives the call out if it is there; where to go on."""
        end = at
        if not self._depth:
            begin = -1 if self._hopeless else data.find("{", at)
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
        end = len(data) - (end < len(data) and data.endswith("\\"))  # what it escapes is still to come
        self._hold(data[at:end])
        self._tail = data[end:]
        return len(data)

    def _end_object(self, parts: list[Part]) -> None:
        text = self._take_held()
        if (taken := self._call(text, 0)) is None:  # no call, and nothing that follows makes it one
            self._hold(text)
            self._hopeless = True
            return
        parts.append(taken[0])
        self._calls += 1

    def _call(self, text: str, at: int) -> tuple[ToolCall, int] | None:
        """The first call in `text` from `at` on and where it ends, or None if there is none."""
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
        pass  # text is what the model wrote, and a client may make something of it
    return ToolCall(value["name"], arguments)
