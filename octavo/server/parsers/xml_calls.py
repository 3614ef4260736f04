"""Tool calls with arguments as plain text between tags: Qwen3-Coder's, GLM's, MiniMax's and DeepSeek-V3.2's.

The formats are those of the models' chat templates. A call is returned once its first parameter or its end shows that it is
one. After that, strings are streamed, and other values returned once they are complete. Text that is no call is content, and so
is stray text between parameters. A call that is cut off is left incomplete, as OpenAI does: closing its JSON could change what
the model meant. Each character is read a few times at most, however the text is split.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from octavo.server.parsers.argument_types import STRING, ArgumentTypes, as_json
from octavo.server.parsers.call import Part, ToolCall
from octavo.server.parsers.tag_scanner import TagScanner
from octavo.server.parsers.xml_forms import XmlForm

__all__ = ["XmlCalls"]


class XmlCalls:
    """The parser of one answer. `types`: the parameter types of the request's tools."""

    def __init__(self, form: XmlForm, types: ArgumentTypes):
        self._form, self._types = form, types
        self._state: Callable[[], bool] = self._content
        self._scan = TagScanner()
        self._bare = False  # whether this call has no block
        self._trim = False  # whether to drop blanks, which follow a call
        self._parts: list[Part] = []
        self._name = self._key = self._end_tag = ""
        self._keys: set[str] = set()  # names of this call's parameters so far
        self._kinds = STRING  # possible types of this parameter
        self._whole: list[str] | None = None  # a non-string value so far
        self._fresh = False  # whether the value is still empty
        self._break = ""  # a held line break, which belongs to the value's end tag if that follows

    def feed(self, text: str) -> list[Part]:
        """The parts that are certain now."""
        self._scan.add(text)
        while self._state():
            pass
        return self._taken()

    def finish(self) -> list[Part]:
        """What was held back."""
        rest = self._scan.rest()
        state, self._state = self._state, self._content
        if state == self._closing and self._end_tag.startswith("</"):
            self._end_value()
            self._add_content(rest)
            self._add_arguments("}" if self._end_tag == self._form.call_end else "")
        elif state in (self._value, self._closing):
            self._write(self._scan.take_raw() + rest)
            left = "".join(self._whole or ()) + self._break
            self._add_arguments(left if self._whole is not None else json.dumps(left)[1:-1])
        else:
            rest = self._scan.take_raw() + rest
            self._add_content(rest.lstrip() if self._trim or state in (self._between, self._after) else rest)
        self._trim = False
        return self._taken()

    # The states. Each consumes what it can, and returns whether the next state may continue with the text.

    def _content(self) -> bool:
        if self._trim:
            self._scan.drop_blanks()
        found = self._scan.search(self._form.openers, self._add_content)
        if not found:
            return False
        self._open(found)
        return True

    def _open(self, tag: str) -> None:
        self._scan.raw = [tag]
        self._bare = self._form.bare and tag == self._form.call
        self._begin_word(self._function if tag == self._form.call else self._head)

    def _head(self) -> bool:
        """Between a block's tag and its call's tag."""
        if not self._form.call:
            return self._scan.skip() and self._begin_word(self._function)
        found = self._scan.expect((self._form.call,))
        if found is None:
            return False
        return self._begin_word(self._function) if found else self._no_call()

    def _function(self) -> bool:
        found = self._scan.take_word(*self._form.names_end)
        if not found:
            return found is not None and self._no_call()
        self._name = found
        if self._bare and not self._types.knows(found):
            return self._no_call()  # probably prose about the format
        return self._go(self._first)

    def _first(self) -> bool:
        """After a function's name: the next tag shows whether this is a call."""
        found = self._scan.expect((self._form.key, self._form.call_end))
        if not found:
            return found is not None and self._no_call()
        self._parts.append(ToolCall(self._name, "{"))
        self._keys = set()
        return self._follow(found)

    def _no_call(self) -> bool:
        self._add_raw()
        return self._go(self._content)

    def _between(self) -> bool:
        """After a parameter."""
        found = self._scan.expect(self._form.within)
        if found is None:
            return False
        return self._follow(found) if found else self._go(self._garbage)

    def _follow(self, tag: str) -> bool:
        form = self._form
        if tag == form.key:
            self._scan.raw = [tag]
            return self._begin_word(self._parameter)
        self._add_arguments("}")
        self._scan.raw, self._trim = [], True
        if tag == form.block_end:
            return self._go(self._content)
        if tag == form.call_end:
            return self._go(self._after)
        self._open(tag)
        return True

    def _garbage(self) -> bool:
        """Stray text where only tags are expected."""
        self._add_raw()
        found = self._scan.search(self._form.within, self._add_content)
        self._scan.at -= len(found)
        return bool(found) and self._go(self._between)

    def _parameter(self) -> bool:
        found = self._scan.take_word(*self._form.keys_end)
        if not found:
            return found is not None and self._go(self._garbage)
        return self._begin_key(found)

    def _gap(self) -> bool:
        """Between a parameter's name and its value."""
        found = self._scan.expect((self._form.value,))
        if found is None:
            return False
        return self._begin_value() if found else self._go(self._garbage)

    def _begin_key(self, word: str) -> bool:
        self._key, said = self._form.key_of(word)
        listed = self._types.of(self._name, self._key)
        self._kinds = STRING if said == STRING else (listed or said or frozenset())
        return self._go(self._gap) if self._form.value else self._begin_value()

    def _begin_value(self) -> bool:
        self._add_arguments((", " if self._keys else "") + json.dumps(self._key, ensure_ascii=False) + ": ")
        self._keys.add(self._key)
        self._whole = [] if self._kinds != STRING else None
        if self._whole is None:
            self._add_arguments('"')
        self._scan.raw, self._break, self._fresh = [], "", True
        return self._go(self._value)

    def _value(self) -> bool:
        self._end_tag = self._scan.search(self._form.value_ends, self._write)
        if not self._end_tag:
            return False
        self._scan.raw = [self._end_tag]
        return self._begin_word(self._closing)

    def _closing(self) -> bool:
        """After a possible end of the value, which is confirmed by the tag that follows."""
        form = self._form
        if not self._end_tag.startswith("</"):
            return self._closing_by_key()
        after = form.within if self._end_tag == form.value_end else (form.block_end, form.call)
        found = self._scan.expect(after)
        if found is None:
            return False
        if not found:
            return self._text_after_all()
        self._end_value()
        return self._follow(found)

    def _closing_by_key(self) -> bool:
        """After a line that begins like a parameter. It is one if the function declares it and the call has it not yet."""
        found = self._scan.take_word(*self._form.keys_end)
        if found is None:
            return False
        key, _ = self._form.key_of(found)
        if key in self._keys or not self._types.declares(self._name, key):
            return self._text_after_all()
        self._end_value()
        return self._begin_key(found)

    def _text_after_all(self) -> bool:
        self._write(self._scan.take_raw())
        return self._go(self._value)

    def _after(self) -> bool:
        """After a call, in its block."""
        found = self._scan.expect(tuple(tag for tag in (self._form.call, self._form.block_end, self._form.block) if tag))
        if found is None:
            return False
        self._scan.raw = []
        if found in ("", self._form.block_end):
            return self._go(self._content)
        self._open(found)
        self._bare = False
        return True

    # Helpers of the states.

    def _go(self, state: Callable[[], bool]) -> bool:
        self._state = state
        return True

    def _begin_word(self, state: Callable[[], bool]) -> bool:
        self._scan.word = len(self._scan.raw)
        return self._go(state)

    def _add_content(self, text: str) -> None:
        self._trim = self._trim and not text
        self._parts.append(text)

    def _add_raw(self) -> None:
        self._add_content(self._scan.take_raw())

    def _add_arguments(self, arguments: str) -> None:
        self._parts.append(ToolCall(None, arguments))

    def _write(self, text: str) -> None:
        """Adds text to the value."""
        if self._form.lines and text:
            if self._fresh:
                text = text.removeprefix("\n")
            text = self._break + text
            self._break = "\n" if text.endswith("\n") else ""
            text = text[: len(text) - len(self._break)]
            self._fresh = False
        if self._whole is not None:
            self._whole.append(text)
        else:
            self._add_arguments(json.dumps(text, ensure_ascii=False)[1:-1])

    def _end_value(self) -> None:
        if self._whole is None:
            self._add_arguments('"')
        else:
            self._add_arguments(as_json("".join(self._whole), self._kinds))
        self._scan.raw = []

    def _taken(self) -> list[Part]:
        """The parts so far, with adjacent ones of one kind joined."""
        parts, self._parts = self._parts, []
        runs: list[tuple[bool, str | None, list[str]]] = []
        for part in parts:
            called = isinstance(part, ToolCall)
            name, text = (part.name, part.arguments) if isinstance(part, ToolCall) else (None, part)
            if name is None and not text:
                continue
            if name is not None or not runs or runs[-1][0] != called:
                runs.append((called, name, []))
            runs[-1][2].append(text)
        return [ToolCall(name, "".join(texts)) if called else "".join(texts) for called, name, texts in runs]
