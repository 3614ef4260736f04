"""Calls between special tokens: DeepSeek's up to V3.1 and Kimi's, whole and in random pieces, always with the same result."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from server.api_client import Client
from server.fake_engine import FakeEngine

from octavo.server.parsers.argument_types import ArgumentTypes
from octavo.server.parsers.call import ToolCall
from octavo.server.parsers.registry import choose_parser, make_parser
from octavo.server.parsers.token_calls import TOKEN_FORMS
from octavo.server.serve import make_served

MakeClient = Callable[..., Client]
A, B = '{"city": "Zürich 🎈", "n": [1, {"x": "}"}, null, 1.50]}', '{"q": "a; \\"b\\" \\\\"}'
# As the chat templates write them.
DS, DE, DB, DC, SEP = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
)
KS, KE, KB, KC, KA = (
    *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>"),
    "<|tool_call_argument_begin|>",
)


def v3(name: str, arguments: str, number: int = 0) -> str:
    return f"{DB}function{SEP}{name}\n```json\n{arguments}\n```{DC}"


def v31(name: str, arguments: str, number: int = 0) -> str:
    return f"{DB}{name}{SEP}{arguments}{DC}"


def kimi(name: str, arguments: str, number: int = 0) -> str:
    return f"{KB}functions.{name}:{number}{KA}{arguments}{KC}"


WRITERS = {"deepseek_v3": (DS, v3, DE), "deepseek_v31": (DS, v31, DE), "kimi_k2": (KS, kimi, KE)}


def read(name: str, text: str, seed: int = 0) -> list[Any]:
    """The parts of `text`: whole for seed 0, in pieces of one character for 1, in random pieces for others."""
    parser, rng, at = make_parser(name, ArgumentTypes({})), random.Random(seed), 0
    found: list[Any] = []
    while at < len(text):
        size = {0: len(text), 1: 1}.get(seed) or rng.randrange(1, 20)
        found += parser.feed(text[at : at + size])
        at += size
    found += parser.finish()
    assert parser.finish() == []
    joined: list[Any] = []
    for part in found:
        if isinstance(part, ToolCall):
            joined.append((part.name, part.arguments, part.id) if part.id else (part.name, part.arguments))
        elif joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def cases(name: str) -> list[tuple[str, list[Any]]]:
    """Texts of a family, and what they are."""
    begin, write, end = WRITERS[name]
    form = TOKEN_FORMS[name]

    def called(function: str, arguments: str, number: int = 0) -> Any:
        return (function, arguments, f"functions.{function}:{number}") if form.kimi else (function, arguments)

    f, g = write("f", A), write("ns.get-it", B, 1)
    made = [called("f", A), called("ns.get-it", B, 1)]
    half = f[: f.index("Zür") + 3]
    hidden = write("f", json.dumps({"text": f"{form.call_end}{end}{begin}{form.call}", "deep": [{"a": '"'}]}))
    return [
        ("plain < text", ["plain < text"]),
        ("", []),
        (f"Let me see.\n{begin}{f}{g}{end}", ["Let me see.\n", *made]),
        (f"{begin}\n{f}\n{g}\n{end}\n done", [*made, "done"]),
        (begin + write("f", "{}") + end, [called("f", "{}")]),
        (begin + write("f", "") + end, [called("f", "{}")]),
        (f"{begin}{f}{end} and {begin}{g}{end}", [made[0], "and ", made[1]]),
        # a token in a string is text
        (begin + hidden + end, [called("f", hidden[hidden.index("{") : hidden.rindex("}") + 1])]),
        # tokens that are missing
        (f"Well. {f}{g}", ["Well. ", *made]),
        (f"{begin}{f}", [made[0]]),
        (begin + f.removesuffix(form.call_end), [made[0]]),
        (begin + f.removesuffix(form.call_end) + end + "x", [made[0], "x"]),
        (begin + f.removesuffix(form.call_end) + g + end, made),
        (begin + begin + f + end, [begin, made[0]]),
        # no call
        (f"{begin} is a token", [f"{begin} is a token"]),
        (f"a {begin}{end} b", [f"a {begin}{end} b"]),
        (begin[:-3], [begin[:-3]]),
        (begin + half, [begin + half]),
        (begin + half + form.call_end + g + end, [begin + half + form.call_end, made[1]]),
        (f"{begin}{form.call}so{form.call_end}{end}!", [f"{begin}{form.call}so{form.call_end}{end}!"]),
        (begin + write("f", "[1]") + g + end, [begin + write("f", "[1]"), made[1]]),
        (begin + f + write("f", '{"x": NaN}') + end, [made[0], write("f", '{"x": NaN}')]),
        (begin + write("f", A + " so") + end, [begin + write("f", A + " so") + end]),
        (begin + write("two words", A) + end, [begin + write("two words", A) + end]),
        (begin + write("f", '{"x": ' + "[" * 10**5) + end, [begin + write("f", '{"x": ' + "[" * 10**5) + end]),
    ]


@pytest.mark.parametrize("name", WRITERS)
def test_written_in_every_way(name: str) -> None:
    assert set(WRITERS) == set(TOKEN_FORMS)
    for text, parts in cases(name):
        for seed in range(6 if len(text) < 10**4 else 1):
            assert read(name, text, seed) == parts, (seed, text[:500])


def test_names_and_ids() -> None:
    """Each of DeepSeek's forms reads the other; Kimi's id says the name, and what is no id is the name."""
    assert read("deepseek_v3", DS + v31("f", A) + DE) == read("deepseek_v31", DS + v3("f", A) + DE) == [("f", A)]
    section = "<|tool_call_section_begin|>{}<|tool_call_section_end|>"  # as Kimi writes it at times
    for head, name, call_id in (
        ("functions.f:3", "f", "functions.f:3"),
        (" functions.ns.f:12\n", "ns.f", "functions.ns.f:12"),
        ("f:0", "f", "f:0"),
        ("f", "f", None),
        ("functions.f", "f", None),
    ):
        parser = make_parser("kimi_k2", ArgumentTypes({}))
        text = section.format(f"{KB}{head}{KA} {A}\n{KC}")
        assert [*parser.feed(text), *parser.finish()] == [ToolCall(name, A, call_id)]


@pytest.mark.parametrize("size", [1, 5, 10**6])
@pytest.mark.parametrize("name", WRITERS)
def test_hostile_text_takes_linear_time(name: str, size: int) -> None:
    """What is held between two pieces but a call stays short; 100,000 characters of each kind at once take no half second."""
    form, (begin, write, _) = TOKEN_FORMS[name], WRITERS[name]
    long = {1: 600, 5: 2_000}.get(size, 100_000)
    head = write("f", '{"a": "').partition('"a')[0] + '"a": "'
    bits = (
        " ",
        "\n",
        "a",
        '"',
        "\\",
        "`",
        ":1",
        "functions.",
        "{",
        "[",
        '{"',
        *form.openers,
        *form.end_tokens,
        form.separator,
        head,
    )
    for start in ("", begin, form.call, form.call + "f", form.call + "functions.f:", form.call + "f" + form.separator, head):
        for bit in (*bits, form.call[:-1], f'{form.call}"{form.call_end}', write("f", "{}"), write("f", "{")):
            text = start + bit * (long // len(bit))
            made, begun = make_parser(name, ArgumentTypes({})), time.thread_time()
            for i in range(0, len(text), size):
                made.feed(text[i : i + size])
            made.finish()
            assert time.thread_time() - begun < 0.5, (start, bit)


TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("f", "g")]


@pytest.mark.parametrize("name", WRITERS)
def test_a_chat_with_calls(make_client: MakeClient, name: str) -> None:
    begin, write, end = WRITERS[name]
    client = make_client(f"Wait.{begin}{write('f', A, 7)}{write('g', B, 8)}{end}", tool_parser=name)
    choice = client.chat(tools=TOOLS)["choices"][0]
    assert not client.engine.calls[-1][1].skip_special_tokens
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Wait."
    calls = choice["message"]["tool_calls"]
    assert [one["function"] for one in calls] == [{"name": "f", "arguments": A}, {"name": "g", "arguments": B}]
    assert len({one["id"] for one in calls}) == 2
    if name == "kimi_k2":  # its template prints ids, and the model has learnt them so
        assert [one["id"] for one in calls] == ["functions.f:7", "functions.g:8"]

    deltas = [event["choices"][0]["delta"] for event in client.events("/v1/chat/completions", tools=TOOLS)]
    assert "".join(delta.get("content", "") for delta in deltas) == "Wait."
    streamed = [one for delta in deltas for one in delta.get("tool_calls", [])]
    assert [(one["index"], one["function"]) for one in streamed] == [(i, one["function"]) for i, one in enumerate(calls)]


@pytest.mark.parametrize("name", WRITERS)
def test_forced_calls_are_json_in_every_family(make_client: MakeClient, name: str) -> None:
    """A grammar makes the model write JSON. Kimi's ids count the calls of the conversation, as its own do."""
    made = {"id": "x", "type": "function", "function": {"name": "g", "arguments": "{}"}}
    before = [{"role": "assistant", "tool_calls": [made, made]}, {"role": "tool", "tool_call_id": "x", "content": "1"}]
    how: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}, *before], "tools": TOOLS}
    one = f'{{"name": "f", "parameters": {A}}}'
    client = make_client(f"[{one}, {one}]", tool_parser=name)
    required = client.chat(**how, tool_choice="required")["choices"][0]["message"]["tool_calls"]
    assert [one["function"]["name"] for one in required] == ["f", "f"]
    client = make_client(A, tool_parser=name)
    named = client.chat(**how, tool_choice={"type": "function", "function": {"name": "f"}})["choices"][0]["message"]
    assert [one["function"] for one in named["tool_calls"]] == [{"name": "f", "arguments": A}]
    if name == "kimi_k2":
        assert [one["id"] for one in (*required, *named["tool_calls"])] == [f"functions.f:{i}" for i in (2, 3, 2)]


def test_choosing_the_parser_of_a_template() -> None:
    assert choose_parser(None, f"{DS}{DB}' + tool['type'] + '{SEP}' + name + '\\n' + '```json'", "deepseek_v3") == "deepseek_v3"
    assert choose_parser(None, f"{DS}{DB}' + name + '{SEP}' + arguments", "deepseek_v32") == "deepseek_v31"
    assert choose_parser(None, f"{KS}{KB}{{{{ id }}}}{KA}", "x") == "kimi_k2"
    chosen = {"deepseek_v3": "deepseek_v3", "deepseek_v32": "deepseek_v32", "kimi_k2": "kimi_k2", "kimi_k25": "kimi_k2"}
    for model_type, name in chosen.items():
        assert choose_parser(None, "{{ messages }}", model_type) == name


@pytest.mark.parametrize(
    ("model_type", "name", "end", "written"),
    [
        ("deepseek_v3", "deepseek_v3", "<｜Assistant｜>", "<think>\nwhy</think>\n\n"),  # R1, at first
        ("deepseek_v3", "deepseek_v3", "<｜Assistant｜><think>\n", "\nwhy</think>\n\n"),  # R1 today, V3.1
        ("deepseek_v32", "deepseek_v31", "<｜Assistant｜><think>", "\nwhy</think>"),
        ("kimi_k2", "kimi_k2", "<|im_middle|>", "<think>\nwhy</think>"),
        ("kimi_k25", "kimi_k2", "<|im_middle|><think>", "\nwhy</think>"),
    ],
)
def test_the_model_type_chooses(model_type: str, name: str, end: str, written: str) -> None:
    begin, write, close = WRITERS[name]
    engine = FakeEngine(f"{written}So.{begin}{write('f', A)}{close}")
    engine.info = replace(engine.info, model_type=model_type)
    shown = TOKEN_FORMS[name].separator + ("```json" if TOKEN_FORMS[name].fenced else "")
    client = Client(engine, make_served(engine, ["m"], f"{{#{shown}#}}{{{{ tools }}}}{end}"))  # type: ignore[arg-type]
    message = client.chat(tools=TOOLS)["choices"][0]["message"]
    assert message["reasoning_content"] == "\nwhy"
    assert message["content"] == "So."
    assert [one["function"] for one in message["tool_calls"]] == [{"name": "f", "arguments": A}]
