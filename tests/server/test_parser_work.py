"""Whatever a model writes, reading it is work in proportion to its length, streamed or whole, and the same in any pieces."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from cases import cases
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.server.parsers.argument_types import ArgumentTypes
from octavo.server.parsers.call import NamedCall
from octavo.server.parsers.reasoning import MessageReader, ThinkSplitter, join_delta, joined, make_splitter
from octavo.server.parsers.registry import make_parser
from octavo.server.parsers.token_calls import TOKEN_FORMS
from octavo.server.parsers.tools import PARSERS, json_parser
from octavo.server.parsers.xml_forms import FORMS

FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]abc", "</tool", "<think>", "</think>",
    '{"name": "f", "arguments": {"a": 1}}', '{"name": "f", "arguments": {"q": "</tool_call>"}}', '{"name": "f}', 'f{"x": "}"}',
    '"', "\\", "\n", " ", "{", "}", "f", "[", "]", ",", "x",
]  # fmt: skip
OF_FAMILY = {
    **{
        name: [
            *form.openers,
            *form.end_tokens,
            form.separator,
            form.call[:-2],
            "functions.f:1",
            ":2",
            "```json\n",
            "\n```",
            form.write("f", '{"a": "' + form.call_end + '"}', 3),
            form.write("f", '{"a": "', 4),
            form.call + "f" + form.separator,
        ]
        for name, form in TOKEN_FORMS.items()
    },
    "deepseek_v32": [
        *(tag for tag in dict.fromkeys((*FORMS["deepseek_v32"].within, *FORMS["deepseek_v32"].openers))),
        *('"f">', '"a" string="true">', '"b" string="false">', "</｜DSML｜parameter>", "</｜DSML", "\n\n", "true", "[1]"),
    ],
    "kimi thinking": ["<|tool_calls_section_begin|>", "<|tool_calls_section", TOKEN_FORMS["kimi_k2"].write("f", "{}", 0)],
}
ADVERSARIAL: dict[str, Callable[[int], str]] = {
    "blanks after a name": lambda n: "[TOOL_CALLS]a" + " " * n,
    "blanks": lambda n: " " * n,
    "blanks and a brace": lambda n: " " * n + "{",
    "line ends": lambda n: "\n" * n,
    "blanks in a call": lambda n: "<tool_call>" + " " * n + "</tool_call>",
    "a name": lambda n: "[TOOL_CALLS]" + "a" * n,
    "names": lambda n: "[TOOL_CALLS]" + "a " * (n // 2),
    "an id": lambda n: "[TOOL_CALLS]a[CALL_ID]" + "a" * n,
    "separators": lambda n: "[TOOL_CALLS]" + "[;,]" * (n // 4),
    "openers": lambda n: "<tool_call>" * (n // 11),
    "mistral's openers": lambda n: "[TOOL_CALLS]" * (n // 12),
    "halves of openers": lambda n: "<tool_cal" * (n // 9),
    "closers": lambda n: "<tool_call>" + "</tool_call>" * (n // 12),
    "halves of closers": lambda n: "<tool_call>" + "</tool_cal" * (n // 10),
    "strings without end": lambda n: '<tool_call>\n"</tool_call>' * (n // 25),
    "strings without end in a line": lambda n: '<tool_call>"</tool_call>"' * (n // 25),
    "one string without end": lambda n: '<tool_call>"' + "</tool_call><tool_call>" * (n // 23),
    "lines in a string": lambda n: '<tool_call>"' + "</tool_call>\n" * (n // 13),
    "quotes": lambda n: "<tool_call>" + '"' * n,
    "backslashes": lambda n: '<tool_call>{"a": "' + "\\" * n,
    "backslashes, no closer": lambda n: '[TOOL_CALLS]a{"a": "' + "\\" * n,
    "braces in a string": lambda n: '[TOOL_CALLS]a{"a": "' + "}" * n,
    "braces": lambda n: "[TOOL_CALLS]a" + "{" * n,
    "closing braces": lambda n: "[TOOL_CALLS]a{" + "}" * n,
    "deep objects": lambda n: "[TOOL_CALLS]a" + '{"a":' * (n // 5) + "}" * (n // 5),
    "deep lists": lambda n: '[TOOL_CALLS]a{"a":' + "[" * n,
    "numbers": lambda n: '[TOOL_CALLS]a{"a":' + "9" * n + "}",
    "small calls": lambda n: "[TOOL_CALLS]" + "a{}" * (n // 3),
    "small calls by name": lambda n: '[{"name":"f"}' + ',{"name":"f"}' * (n // 13),
    "calls with closers": lambda n: '<tool_call>{"name":"f"}</tool_call>' * (n // 35),
    "calls without closers": lambda n: "<tool_call>" + '{"name":"f"}' * (n // 12),
    "broken objects": lambda n: "[TOOL_CALLS]a{x}" + "a{x}" * (n // 4),
    "a long argument": lambda n: '<tool_call>{"name":"f","arguments":{"q":"' + "x" * n + '"}}</tool_call>',
    "think tags": lambda n: "<think>" * (n // 7),
    "halves of think tags": lambda n: "<think>" + "</thin" * (n // 6),
    "closed think tags": lambda n: "<think></think>" * (n // 15),
}
READERS: dict[str, Callable[[], MessageReader]] = {
    **{name: lambda name=name: MessageReader(json_parser(name), None) for name in PARSERS},  # type: ignore[misc]
    **{name: lambda name=name: MessageReader(make_parser(name, ArgumentTypes({})), None) for name in OF_FAMILY if "_" in name},  # type: ignore[misc]
    "kimi thinking": lambda: MessageReader(make_parser("kimi_k2", ArgumentTypes({})), make_splitter("kimi_k2", "<think>")),
    "named": lambda: MessageReader(NamedCall("f"), None),
    "thinking": lambda: MessageReader(None, ThinkSplitter(False)),
    "thinking already": lambda: MessageReader(None, ThinkSplitter(True)),
    "both": lambda: MessageReader(json_parser("hermes"), ThinkSplitter(False)),
}
LITTLE = 0.02  # seconds, of which nothing is to be said


def read(make: Callable[[], MessageReader], text: str, size: int) -> dict[str, Any]:
    reader, message = make(), dict[str, Any]()
    for at in range(0, len(text), size):
        join_delta(message, reader.feed(text[at : at + size], final=at + size >= len(text)))
    return joined(message)


def seconds(make: Callable[[], MessageReader], text: str, size: int) -> float:
    """This thread's own, the best of two; one is enough where it is little."""
    best = float("inf")
    for _ in range(2):
        if best >= LITTLE:
            start = time.thread_time()
            read(make, text, size)
            best = min(best, time.thread_time() - start)
    return best


@cases("size", [4, 10**9], ids=["streamed", "whole"])
@cases("reader", READERS)
def test_work_in_proportion_to_the_length(reader: str, size: int) -> None:
    """Four times the text is four times the work; where it was its square, 16,000 blanks took 4.4 s."""
    length = 2_000 if size < 10**9 else 8_000
    for name, text in ADVERSARIAL.items():
        if (more := seconds(READERS[reader], text(4 * length), size)) >= LITTLE:
            once = seconds(READERS[reader], text(length), size)
            assert more < 10 * once, (name, once, more)


@st.composite
def written(draw: st.DrawFn) -> tuple[str, str]:
    """A reader, and what it may have to read: mostly its family's tokens, in any order."""
    reader = draw(st.sampled_from(sorted(READERS)))
    own = OF_FAMILY.get(reader, FRAGMENTS)
    return reader, "".join(draw(st.lists(st.sampled_from(own) | st.sampled_from(FRAGMENTS), max_size=12)))


@settings(deadline=None, max_examples=500)
@given(written())
def test_the_same_in_pieces_of_every_size(what: tuple[str, str]) -> None:
    reader, text = what
    found = [read(READERS[reader], text, size) for size in (1, 3, 10**9)]
    for message in found:
        for call in message.get("tool_calls", ()):
            if call["id"].isalnum():  # Octavo's own
                del call["id"]
    assert found[0] == found[1] == found[2]
