"""Tool calls with JSON arguments between special tokens: DeepSeek's up to V3.1, and Kimi's.

The tokens are those of the models' chat templates and of Moonshot's tool_call_guidance.md. A call is returned once it is
complete; text that is no call is content, with its tokens. A token inside a JSON string is text, unless the string never ends:
then the text after its beginning is read again. So each character is read a few times at most, however the text is split.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from octavo.server.parsers.call import Part, ToolCall, as_object
from octavo.server.parsers.tag_scanner import TagScanner
from octavo.text.tool_prompt import CallForm

__all__ = ["TOKEN_FORMS", "TokenCalls", "TokenForm", "TokenSpelling"]

_NAME = r"[^\s<>{}\"`]+"
_NAMED = re.compile(rf"\s*({_NAME})\s*")
_FENCED = re.compile(rf"({_NAME})\s*```(?:json)?\s*")  # DeepSeek-V3's arguments, after the function's name
_ID = re.compile(rf"\s*((?:functions\.)?({_NAME}):\d+)\s*")


@dataclass(frozen=True)
class TokenForm:
    """The tokens of a model family."""

    blocks: tuple[str, ...]  # openings of a block of calls: the template's, then those that models write by mistake
    block_ends: tuple[str, ...]
    call: str
    call_end: str
    separator: str  # between a call's header and its arguments
    fenced: bool = False  # the arguments are in a code fence after the name
    kimi: bool = False  # the header is an id that contains the name: functions.NAME:NUMBER
    words: str = ""  # description of the tools, for templates that do not print them

    @cached_property
    def openers(self) -> tuple[str, ...]:
        """Where calls may begin. Some models omit the block."""
        return (*self.blocks, self.call)

    @cached_property
    def end_tokens(self) -> tuple[str, ...]:
        """The tokens that end a call: its end token, and those that can only follow one."""
        return (self.call_end, self.call, *self.block_ends)

    def read(self, body: str) -> ToolCall | None:
        """The call between its two tokens; None if it is none."""
        head, found, text = body.partition(self.separator)
        if not found:
            return None
        text, name, written = text.strip(), "", None
        if self.kimi and (match := _ID.fullmatch(head)):
            written, name = match[1], match[2]
        elif not self.kimi and (match := _FENCED.match(text)):
            name, text = match[1], text[match.end() :].removesuffix("```")
        elif match := _NAMED.fullmatch(head):
            name = match[1].removeprefix("functions.") if self.kimi else match[1]
        arguments = as_object(text) if name else None
        return None if arguments is None else ToolCall(name, arguments, written)

    def write(self, name: str, arguments: str, number: int) -> str:
        """One call in the templates' format."""
        if self.fenced:
            return f"{self.call}function{self.separator}{name}\n```json\n{arguments}\n```{self.call_end}"
        head = f"functions.{name}:{number}" if self.kimi else name
        return f"{self.call}{head}{self.separator}{arguments}{self.call_end}"


_DEEPSEEK = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>")
# From https://huggingface.co/deepseek-ai/DeepSeek-V3.1, section ToolCall.
_V31_WORDS = """## Tools
You have access to the following tools:

TOOLS
IMPORTANT: ALWAYS adhere to this exact format for tool use:
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>{{additional_tool_calls}}<｜tool▁calls▁end｜>

Where:

- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema
- For multiple tool calls, chain them directly without separators or spaces"""
_DEEPSEEK_BLOCK = (("<｜tool▁calls▁begin｜>",), ("<｜tool▁calls▁end｜>",))
TOKEN_FORMS = {  # each DeepSeek form reads the other's calls as well
    "deepseek_v3": TokenForm(*_DEEPSEEK_BLOCK, *_DEEPSEEK, fenced=True),
    "deepseek_v31": TokenForm(*_DEEPSEEK_BLOCK, *_DEEPSEEK, words=_V31_WORDS),
    "kimi_k2": TokenForm(
        ("<|tool_calls_section_begin|>", "<|tool_call_section_begin|>"),
        ("<|tool_calls_section_end|>", "<|tool_call_section_end|>"),
        *("<|tool_call_begin|>", "<|tool_call_end|>", "<|tool_call_argument_begin|>"),
        kimi=True,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSpelling(CallForm):
    """The family's call format as a CallForm."""

    form: TokenForm

    def spell(self, calls: Sequence[tuple[str, Any]]) -> str:
        texts = (one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for _, one in calls)
        between = "\n" if self.form.fenced else ""
        written = between.join(self.form.write(calls[at][0], text, at) for at, text in enumerate(texts))
        return f"{self.form.blocks[0]}{written}{self.form.block_ends[0]}"

    def words(self, tools: Sequence[Mapping[str, Any]]) -> str | None:
        listed = "".join(_listed(tool["function"]) for tool in tools)
        return self.form.words.replace("TOOLS\n", listed) or None


def _listed(function: Mapping[str, Any]) -> str:
    parameters = json.dumps(function.get("parameters") or {}, ensure_ascii=False)
    return f"### {function['name']}\nDescription: {function.get('description') or ''}\n\nParameters: {parameters}\n\n"


class TokenCalls:
    """The parser of one answer."""

    def __init__(self, form: TokenForm):
        self._form = form
        self._scan = TagScanner()
        self._state: Callable[[], bool] = self._content
        self._parts: list[Part] = []
        self._called = False  # whether the block had a call so far
        self._trim = False  # whether to drop blanks, which follow a call
        self._before = ""  # opening text of this call, which is content if it is no call
        self._body: list[str] = []  # text of this call so far
        self._trusts = True  # whether tokens inside JSON strings are text

    def feed(self, text: str) -> list[Part]:
        """The parts that are certain now."""
        self._scan.add(text)
        self._run()
        return self._taken()

    def finish(self) -> list[Part]:
        """What was held back."""
        if self._writing and not self._end_call(body := self._rest_of_body()):
            self._read_again(body)
            if self._writing and not self._end_call(body := self._rest_of_body()):
                self._add_content(self._before + body)
        rest = self._scan.take_raw() + self._scan.rest()
        self._add_content(rest.lstrip() if self._called else rest)
        self._called, self._trim, self._state = False, False, self._content
        return self._taken()

    @property
    def _writing(self) -> bool:
        return self._state in (self._call, self._string, self._escape)

    # The states. Each consumes what it can, and returns whether the next state may continue with the text.

    def _content(self) -> bool:
        if self._trim:
            self._scan.drop_blanks()
        found = self._scan.search(self._form.openers, self._add_content)
        if not found:
            return False
        self._called = False
        if found == self._form.call:
            return self._begin_call()
        self._scan.raw = [found]
        return self._go(self._between)

    def _between(self) -> bool:
        """In a block, between calls. The block's token and blanks are collected, because they are content without a call."""
        found = self._scan.expect((self._form.call, *self._form.block_ends, *self._form.blocks))
        if found is None:
            return False
        if found == self._form.call:
            return self._begin_call()
        if found in self._form.blocks:
            self._scan.raw.pop()
            self._leave()
            self._scan.raw = [found]
            return True
        self._leave()
        return self._go(self._content)

    def _call(self) -> bool:
        """In a call, outside of strings."""
        found = self._scan.search((*self._form.end_tokens, '"') if self._trusts else self._form.end_tokens, self._body.append)
        if found == '"':
            self._body.append(found)
            return self._go(self._string)
        if not found:
            return False
        body = "".join(self._body)
        if not self._end_call(body):
            if self._trusts and self._form.call_end in body:
                return self._read_again(body + found)
            self._add_content(self._before + body + (found if found == self._form.call_end else ""))
        if found == self._form.call:
            self._scan.raw.append(found)
            return self._begin_call()
        if found != self._form.call_end:
            self._scan.raw.append(found)
            self._leave()
            return self._go(self._content)
        return self._go(self._between)

    def _string(self) -> bool:
        found = self._scan.search(('"', "\\"), self._body.append)
        self._body.append(found)
        return bool(found) and self._go(self._call if found == '"' else self._escape)

    def _escape(self) -> bool:
        """After a backslash in a string."""
        escaped = self._scan.one()
        self._body.append(escaped)
        return bool(escaped) and self._go(self._string)

    # Helpers of the states.

    def _run(self) -> None:
        while self._state():
            pass

    def _go(self, state: Callable[[], bool]) -> bool:
        self._state = state
        return True

    def _begin_call(self) -> bool:
        """Starts a call after its token, which is the end of `raw` or stands alone."""
        self._before, self._body = self._scan.take_raw() or self._form.call, []
        return self._go(self._call)

    def _rest_of_body(self) -> str:
        body, self._body = "".join(self._body) + self._scan.rest(), []
        return body

    def _end_call(self, body: str) -> bool:
        """Returns whether `body` is a call, and adds it to the parts."""
        call = self._form.read(body)
        self._body = []
        if call is None:
            return False
        self._parts.append(call)
        self._called, self._before, self._state = True, "", self._between
        return True

    def _read_again(self, text: str) -> bool:
        """Reads the text after a call's token again with tokens in strings counted: an unclosed string hid the calls' ends."""
        rest = self._scan.rest()
        self._trusts, self._state = False, self._call
        self._scan.add(text)
        self._run()
        self._trusts = True
        self._scan.add(rest)
        return True

    def _leave(self) -> None:
        """Ends a block. The collected text belongs to its calls, or is content if there are none."""
        held = self._scan.take_raw()
        self._trim = self._called
        if not self._called:
            self._add_content(held)
        self._called = False

    def _add_content(self, text: str) -> None:
        self._trim = self._trim and not text
        if text:
            self._parts.append(text)

    def _taken(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts
