"""The tags of the model families' tool calls, from their chat templates."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from octavo.server.parsers.argument_types import STRING
from octavo.text.tool_prompt import CallForm

__all__ = ["FORMS", "Spelling", "XmlForm"]


@dataclass(frozen=True)
class XmlForm:
    """The tags of a family. A tag that ends with `=` is followed by a name."""

    block: str  # opening of a block of calls
    block_end: str
    call: str  # before a function's name; empty: the name follows the block's tag
    call_end: str
    key: str  # before a parameter's name
    key_end: str
    value: str  # before its value; empty: the value follows the name's end
    value_end: str
    lines: bool = False  # a value is on separate lines
    bare: bool = False  # the model may omit the block's tag
    typed: bool = False  # an attribute after a parameter's name says whether its value is a string: string="true"
    gap: str = ""  # between content and block; part of the block
    special: bool = False  # the tags contain a special token, which detokenization must keep

    @cached_property
    def openers(self) -> tuple[str, ...]:
        """Where a call may begin outside of a block."""
        gapped = (self.gap + self.block,) if self.gap else ()  # first, because of two matches at one offset the first wins
        return (*gapped, self.block, self.call) if self.bare else (*gapped, self.block)

    @cached_property
    def within(self) -> tuple[str, ...]:
        """The tags that may follow a value: the next parameter, an end, or the opening of another call."""
        return tuple(dict.fromkeys(tag for tag in (self.key, self.call_end, self.block_end, self.block, self.call) if tag))

    @cached_property
    def value_ends(self) -> tuple[str, ...]:
        """The ends of a value: its end tag or, because models forget it, the call's end or a line that begins a parameter."""
        forgotten = () if self.call_end == self.block_end else (self.call_end,)
        return (self.value_end, *forgotten, "\n" + self.key)

    @cached_property
    def names_end(self) -> tuple[str, re.Pattern[str]]:
        """The end of a function's name, and the characters that no name contains. GLM's ends at a blank or a tag."""
        return (">", re.compile(r"[<>\n]")) if self.call else ("", re.compile(r"[<\s]"))

    @cached_property
    def keys_end(self) -> tuple[str, re.Pattern[str]]:
        """As `names_end`, for a parameter's name."""
        return self.key_end, re.compile(r"[<>\n]" if self.key_end == ">" else r"[<\n]")

    def key_of(self, word: str) -> tuple[str, frozenset[str] | None]:
        """A parameter's name, and the types that `word` declares: string, any JSON (empty), or None for no declaration."""
        if self.typed and (match := _TYPED.fullmatch(word)):
            return match[1], STRING if match[2] == "true" else frozenset()
        return word, None


_TYPED = re.compile(r"([^\"']*+)[\"']\s++string\s*+=\s*+[\"']?(true|false)")
FORMS = {
    "qwen3_coder": XmlForm(
        *("<tool_call>", "</tool_call>", "<function=", "</function>"),
        *("<parameter=", ">", "", "</parameter>"),
        lines=True,
        bare=True,
    ),
    "glm45": XmlForm(
        *("<tool_call>", "</tool_call>", "", "</tool_call>"),
        *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    "minimax_m2": XmlForm(
        *("<minimax:tool_call>", "</minimax:tool_call>", "<invoke name=", "</invoke>"),
        *("<parameter name=", ">", "", "</parameter>"),
    ),
    "deepseek_v32": XmlForm(
        *("<｜DSML｜function_calls>", "</｜DSML｜function_calls>", "<｜DSML｜invoke name=", "</｜DSML｜invoke>"),
        *("<｜DSML｜parameter name=", ">", "", "</｜DSML｜parameter>"),
        typed=True,
        gap="\n\n",
        special=True,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling(CallForm):
    """The family's call format as a CallForm."""

    form: XmlForm

    def spell(self, calls: Sequence[tuple[str, Any]]) -> str:
        return "\n".join(_spelled(self.form, name, arguments) for name, arguments in calls)


def _spelled(form: XmlForm, name: str, arguments: Any) -> str:
    """One call. Arguments of an earlier turn that are no object (the answer was cut off) are written unchanged."""
    quote = '"' if form.key.endswith(" name=") else ""
    lines = [form.block, f"{form.call}{quote}{name}{quote}>"] if form.call else [f"{form.block}{name}"]
    if not isinstance(arguments, Mapping):
        lines.append(str(arguments))
        arguments = {}
    for key, value in arguments.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text = f"\n{text}\n" if form.lines else text
        between = f"\n{form.value}" if form.value else ""
        kind = f' string="{"true" if isinstance(value, str) else "false"}"' if form.typed else ""
        lines.append(f"{form.key}{quote}{key}{quote}{kind}{form.key_end}{between}{text}{form.value_end}")
    lines += [form.call_end, form.block_end] if form.call else [form.block_end]
    return "\n".join(lines)
