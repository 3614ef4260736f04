"""Calls written between tags: printed by templates of the families' formats and read back, whole and in pieces of all sizes."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cases import cases
from server.api_client import Client
from server.fake_engine import FakeEngine

from octavo.server.parsers.argument_types import ArgumentTypes, as_json
from octavo.server.parsers.call import Part, ToolCall
from octavo.server.parsers.registry import choose_parser, make_parser
from octavo.server.parsers.xml_calls import XmlCalls
from octavo.server.parsers.xml_forms import FORMS
from octavo.server.serve import make_served
from octavo.text.chat_prompt import render_conversation

# The assistant's turn as the template of each family prints it; of the rest of the templates nothing matters here.
TEMPLATES = {
    "qwen3_coder": (
        "{%- for m in messages if m.role == 'assistant' -%}{{ m.content }}"
        "{%- for call in m.tool_calls -%}{{ '\n<tool_call>\n<function=' + call.function.name + '>\n' }}"
        "{%- for key, value in call.function.arguments.items() -%}{{ '<parameter=' + key + '>\n' }}"
        "{{- value if value is string else value | tojson if value is mapping or value is sequence else value | string }}"
        "{{- '\n</parameter>\n' }}{%- endfor -%}{{ '</function>\n</tool_call>' }}{%- endfor -%}{%- endfor -%}"
    ),
    "glm45": (
        "{%- for m in messages if m.role == 'assistant' -%}{{ m.content }}"
        "{%- for call in m.tool_calls -%}{{ '\n<tool_call>' + call.function.name + '\n' }}"
        "{%- for key, value in call.function.arguments.items() -%}{{ '<arg_key>' + key + '</arg_key>\n<arg_value>' }}"
        "{{- value if value is string else value | tojson }}{{- '</arg_value>\n' }}{%- endfor -%}"
        "{{ '</tool_call>' }}{%- endfor -%}{%- endfor -%}"
    ),
    "minimax_m2": (
        "{%- for m in messages if m.role == 'assistant' -%}{{ m.content }}"
        "{%- if m.tool_calls -%}{{ '\n<minimax:tool_call>\n' }}"
        "{%- for call in m.tool_calls -%}{{ '<invoke name=\"' + call.function.name + '\">' }}"
        "{%- for key, value in call.function.arguments.items() -%}{{ '<parameter name=\"' + key + '\">' }}"
        "{{- value if value is string else value | tojson }}{{- '</parameter>\n' }}{%- endfor -%}"
        "{{ '</invoke>\n' }}{%- endfor -%}{{ '</minimax:tool_call>' }}{%- endif -%}{%- endfor -%}"
    ),
    "deepseek_v32": (
        "{%- for m in messages if m.role == 'assistant' -%}{{ m.content }}"
        "{%- if m.tool_calls -%}{{ '\n\n<｜DSML｜function_calls>\n' }}"
        "{%- for call in m.tool_calls -%}{{ '<｜DSML｜invoke name=\"' + call.function.name + '\">\n' }}"
        "{%- for key, value in call.function.arguments.items() -%}{{ '<｜DSML｜parameter name=\"' + key + '\" string=\"' }}"
        "{{- 'true' if value is string else 'false' }}{{- '\">' }}"
        "{{- value if value is string else value | tojson }}{{- '</｜DSML｜parameter>\n' }}{%- endfor -%}"
        "{{ '</｜DSML｜invoke>\n' }}{%- endfor -%}{{ '</｜DSML｜function_calls>' }}{%- endif -%}{%- endfor -%}"
    ),
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "more": {"type": "string", "description": "d"},
        "count": {"type": "integer"},
        "ratio": {"type": "number"},
        "yes": {"type": "boolean"},
        "box": {"$ref": "#/$defs/Box"},
        "items": {"type": "array", "items": {"type": "integer"}},
        "none": {"type": "null"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "either": {"type": ["integer", "string"]},
        "mode": {"enum": ["fast", "5"]},
        "any": {},
    },
    "$defs": {"Box": {"allOf": [{"type": "object", "properties": {"x": {}}}]}},
}
TOOLS = {"f": SCHEMA, "g": {"type": "object", "properties": {}}, "ns.get-it": None}
TAGS = sorted({tag for form in FORMS.values() for tag in (*form.within, *form.openers, form.value_end, form.block_end)})


def parser(name: str) -> XmlCalls:
    made = make_parser(name, ArgumentTypes(TOOLS))
    assert isinstance(made, XmlCalls)
    return made


def read(name: str, text: str, size: int) -> list[Any]:
    made = parser(name)
    parts = [part for i in range(0, len(text), size) for part in made.feed(text[i : i + size])]
    parts += made.finish()
    assert made.finish() == []
    return joined(parts)


def joined(parts: list[Part]) -> list[Any]:
    found: list[Any] = []
    calls: list[list[str]] = []
    for part in parts:
        if isinstance(part, str):
            if found and isinstance(found[-1], str):
                found[-1] += part
            else:
                found.append(part)
        elif part.name is None:
            calls[-1][1] += part.arguments
        else:
            calls.append([part.name, part.arguments])
            found.append(calls[-1])
    return [part if isinstance(part, str) else tuple(part) for part in found]


def render(name: str, content: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
    made = [{"function": {"name": function, "arguments": arguments}} for function, arguments in calls]
    return render_conversation(TEMPLATES[name], [{"role": "assistant", "content": content, "tool_calls": made}], {})


def values(rng: random.Random) -> dict[str, Any]:
    def text() -> str:
        bits = ["a", "Zürich 🎈", "\n", " ", '"', "\\", "<", ">", "</", "{", "5", "null", "\t", "</b>", "True", *TAGS]
        made = "".join(rng.choice(bits) for _ in range(rng.randrange(8)))
        for end in (
            "</parameter>",
            "</arg_value>",
            "\n<",
            "</function>",
            "</invoke>",
            "</｜DSML｜parameter>",
            "</｜DSML｜invoke>",
        ):  # what ends a value in some places
            made = made.replace(end, "")
        return made

    made = {
        "text": text(),
        "count": rng.randrange(-(10**20), 10**20),
        "ratio": rng.choice([0.5, -2.25, 3, 1e-9]),
        "yes": rng.random() < 0.5,
        "box": {"x": [text() for _ in range(2)], "y": {"z": None}},
        "items": [rng.randrange(9) for _ in range(rng.randrange(3))],
        "none": None,
        "maybe": rng.choice([None, "some", "5"]),
        "either": rng.choice([7, "seven"]),
        "mode": rng.choice(["fast", "5"]),
        "any": rng.choice([1, {"a": 1}, "word", [True], None]),
        "more": rng.choice(["", "\n", "\n\n", " x ", "line\n", "\nline", '"quoted"']),
    }
    keys = rng.sample(sorted(made), rng.randrange(len(made) + 1))
    return {key: made[key] for key in keys}


@cases("size", [1, 3, 7, 10_000])
@cases("name", FORMS)
def test_what_the_template_prints_is_read_back(name: str, size: int) -> None:
    rng = random.Random(size)
    for _ in range(40):
        calls = [(rng.choice(["f", "f", "g", "ns.get-it"]), values(rng)) for _ in range(rng.randrange(1, 4))]
        calls = [(function, arguments if function == "f" else {}) for function, arguments in calls]
        content = rng.choice(["", "Let me <see>: 1 < 2", "<tool"])
        text = render(name, content, calls)
        found = read(name, text, size)
        said = "".join(part for part in found if isinstance(part, str))
        assert said.strip() == content, text
        assert [(f, json.loads(a)) for f, a in (p for p in found if not isinstance(p, str))] == calls, text


@cases("size", [1, 4, 10_000])
@cases("name", FORMS)
def test_tags_inside_a_string_are_text(name: str, size: int) -> None:
    """Each tag of every family alone, at both ends of lines and values, and JSON's own marks."""
    for tag in TAGS:
        for said in (tag, f"a {tag} b", f"{tag}\n", f"  {tag}{tag}x", f'"{tag}" \\', f"{tag}nope>{tag}"):
            if said.rstrip().endswith(FORMS[name].value_end):
                continue  # followed by the value's own end it is one: the format has no way to say it
            arguments = {"text": said, "more": said}
            found = read(name, render(name, "", [("f", arguments)]), size)
            assert [json.loads(part[1]) for part in found if not isinstance(part, str)] == [arguments], said


def test_a_forgotten_end_is_where_the_next_parameter_begins() -> None:
    """One that the function has and the call does not have yet; else it is text."""
    for key, arguments in (("text", {"more": "x", "text": "y"}), ("more", {"more": "x\n<parameter=more>\ny"})):
        written = (
            f"<tool_call>\n<function=f>\n<parameter=more>\nx\n<parameter={key}>\ny\n</parameter>\n</function>\n</tool_call>"
        )
        assert [json.loads(part[1]) for part in read("qwen3_coder", written, 3)] == [arguments]


def q(*parameters: tuple[str, str], name: str = "f") -> str:
    written = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={name}>\n{written}</function>\n</tool_call>"


D = '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n{}\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'
P = '<｜DSML｜parameter name="{}" string="{}">{}</｜DSML｜parameter>'
CASES: dict[str, list[tuple[str, list[Any]]]] = {
    "qwen3_coder": [
        ("plain text", ["plain text"]),
        ("", []),
        (f"Well. {q(('text', 'x'))}", ["Well. ", ("f", '{"text": "x"}')]),
        (f"{q()}\n{q(name='g')}\n bye ", [("f", "{}"), ("g", "{}"), "bye "]),
        (q(("a", "1"), name="unknown"), [("unknown", '{"a": 1}')]),
        # one line, and several calls in one block
        ("<tool_call><function=f><parameter=count>5</parameter></function></tool_call>", [("f", '{"count": 5}')]),
        ("<tool_call><function=f></function><function=g></function></tool_call>", [("f", "{}"), ("g", "{}")]),
        # the block's tag is left out
        ("Hm <function=f>\n</function>\n</tool_call> x", ["Hm ", ("f", "{}"), "x"]),
        ("<function=unknown>\n</function>", ["<function=unknown>\n</function>"]),
        # no call
        ("<tool_call> is a tag", ["<tool_call> is a tag"]),
        ('<tool_call>\n{"name": "f"}\n</tool_call>', ['<tool_call>\n{"name": "f"}\n</tool_call>']),
        ("<tool_call>\n<function=f>\nhow?", ["<tool_call>\n<function=f>\nhow?"]),
        ("<tool_call><function=>", ["<tool_call><function=>"]),
        ("<tool_call><tool_call>\n<function=f></function>", ["<tool_call>", ("f", "{}")]),
        ("<tool_call>\n<function=f", ["<tool_call>\n<function=f"]),
        ("<tool_call>\n<function=f>\n<par", ["<tool_call>\n<function=f>\n<par"]),
        # ends that are missing
        ("<function=f><parameter=count>5</parameter></function>", [("f", '{"count": 5}')]),
        ("<tool_call><function=f><parameter=count>5</parameter></tool_call>", [("f", '{"count": 5}')]),
        ("<tool_call><function=f><parameter=count>5\n</function>\n</tool_call>x", [("f", '{"count": 5}'), "x"]),
        (
            "<tool_call><function=f><parameter=text>\nDallas\n<parameter=count>\n5\n</parameter></function>",
            [("f", '{"text": "Dallas", "count": 5}')],
        ),
        (
            f"<tool_call><function=f><parameter=count>5</parameter>{q(('yes', 'true'))}",
            [("f", '{"count": 5}'), ("f", '{"yes": true}')],
        ),
        # cut off: the JSON stays open
        ("<tool_call><function=f><parameter=text>\nhalf\nof i", [("f", '{"text": "half\\nof i')]),
        ("<tool_call><function=f><parameter=text>\nhalf\n</par", [("f", '{"text": "half\\n</par')]),
        ("<tool_call><function=f><parameter=count>12", [("f", '{"count": 12')]),
        ("<tool_call><function=f><parameter=count>12</parameter>", [("f", '{"count": 12')]),
        ("<tool_call><function=f><parameter=count>12</parameter></func", [("f", '{"count": 12'), "</func"]),
        ("<tool_call><function=f><parameter=cou", [("f", "{"), "<parameter=cou"]),
        # text between the tags is content
        (
            "<tool_call><function=f><parameter=count: [\n7\n</parameter>\n<parameter=yes>True</parameter></function>",
            [("f", '{"yes": true}'), "<parameter=count: [\n7\n</parameter>\n"],
        ),
    ],
    "glm45": [
        ("<tool_call>f\n</tool_call>", [("f", "{}")]),
        ("<tool_call>f</tool_call> <tool_call>\n g \n</tool_call>.", [("f", "{}"), ("g", "{}"), "."]),
        # GLM-4.7 leaves the line breaks out
        (
            "a<tool_call>f<arg_key>count</arg_key><arg_value>5</arg_value><arg_key>text</arg_key>"
            "<arg_value> x\n</arg_value></tool_call>",
            ["a", ("f", '{"count": 5, "text": " x\\n"}')],
        ),
        # no call
        ("<tool_call> is a tag", ["<tool_call> is a tag"]),
        ("<tool_call></tool_call>", ["<tool_call></tool_call>"]),
        ('<tool_call>{"name": "f"}</tool_call>', ['<tool_call>{"name": "f"}</tool_call>']),
        ("<tool_call>f", ["<tool_call>f"]),
        ("<tool_call>f\n<arg_", ["<tool_call>f\n<arg_"]),
        ("<tool_call>f<tool_call>g</tool_call>", ["<tool_call>f", ("g", "{}")]),
        # ends that are missing
        (
            "<tool_call>f\n<arg_key>text</arg_key>\n<arg_value>Dallas\n<arg_key>count</arg_key>\n<arg_value>5</arg_value>\n</tool_call>",
            [("f", '{"text": "Dallas", "count": 5}')],
        ),
        # cut off
        ("<tool_call>f\n<arg_key>text</arg_key>\n<arg_value>half </arg", [("f", '{"text": "half </arg')]),
        ("<tool_call>f\n<arg_key>count</arg_key>\n<arg_value>1</arg_value>\n", [("f", '{"count": 1')]),
        ("<tool_call>f\n<arg_key>coun</arg", [("f", "{"), "<arg_key>coun</arg"]),
        # text between the tags is content
        (
            "<tool_call>f\n<arg_key>count</arg_key>5\n<arg_key>yes</arg_key><arg_value>true</arg_value>\n</tool_call>",
            [("f", '{"yes": true}'), "<arg_key>count</arg_key>5\n"],
        ),
        ("<tool_call>f<arg_key>a<b</arg_key></tool_call>", [("f", "{}"), "<arg_key>a<b</arg_key>"]),
    ],
    "minimax_m2": [
        (
            'Hm.\n<minimax:tool_call>\n<invoke name="f">\n<parameter name="text">a\nb\n</parameter>\n</invoke>\n'
            '<invoke name="g"></invoke>\n</minimax:tool_call> bye',
            ["Hm.\n", ("f", '{"text": "a\\nb\\n"}'), ("g", "{}"), "bye"],
        ),
        (
            "<minimax:tool_call><invoke name=f><parameter name='yes'>true</parameter></invoke></minimax:tool_call>",
            [("f", '{"yes": true}')],
        ),
        # no call
        ("<minimax:tool_call> is a tag", ["<minimax:tool_call> is a tag"]),
        ('<minimax:tool_call><invoke name="f">x', ['<minimax:tool_call><invoke name="f">x']),
        ('<invoke name="f"></invoke>', ['<invoke name="f"></invoke>']),
        ("<minimax:tool", ["<minimax:tool"]),
        # ends that are missing
        ('<minimax:tool_call><invoke name="f"></invoke>', [("f", "{}")]),
        (
            '<minimax:tool_call><invoke name="f"><parameter name="count">5</invoke><invoke name="g"></invoke>',
            [("f", '{"count": 5}'), ("g", "{}")],
        ),
        (
            '<minimax:tool_call><invoke name="f"><parameter name="count">5</parameter><invoke name="g"></invoke>',
            [("f", '{"count": 5}'), ("g", "{}")],
        ),
        # cut off
        ('<minimax:tool_call><invoke name="f"><parameter name="text">half </inv', [("f", '{"text": "half </inv')]),
        # text between the tags is content
        (
            '<minimax:tool_call><invoke name="f"> <parameter name="yes\n>true</parameter></invoke> so </minimax:tool_call>',
            [("f", "{}"), '<parameter name="yes\n>true</parameter>so </minimax:tool_call>'],
        ),
    ],
    "deepseek_v32": [
        # the blank lines in front of a block are the block's
        (f"Hm.\n\n{D.format(P.format('text', 'true', 'a'))} bye", ["Hm.", ("f", '{"text": "a"}'), "bye"]),
        ("Hm.\n\n<｜DSML｜", ["Hm.\n\n<｜DSML｜"]),
        ("Hm.\n\n", ["Hm.\n\n"]),
        ("Hm.\n\n<｜DSML｜function_calls> is a tag", ["Hm.\n\n<｜DSML｜function_calls> is a tag"]),
        # what the model says of a value's type, and of what the schema leaves open, or does not have
        (D.format(P.format("any", "true", "5")), [("f", '{"any": "5"}')]),
        (D.format(P.format("any", "false", "5")), [("f", '{"any": 5}')]),
        (D.format(P.format("unlisted", "true", "null")), [("f", '{"unlisted": "null"}')]),
        (D.format(P.format("unlisted", "false", '{"a": [1.50]}')), [("f", '{"unlisted": {"a": [1.50]}}')]),
        (D.format(P.format("unlisted", "false", "no JSON")), [("f", '{"unlisted": "no JSON"}')]),
        (D.format(P.format("count", "true", "5")), [("f", '{"count": "5"}')]),
        (D.format(P.format("text", "false", "5")), [("f", '{"text": "5"}')]),
        (D.format(P.format("count", "false", "5").replace(' string="false"', "")), [("f", '{"count": 5}')]),
        (D.format(P.format("a'b", "false", "5")), [("f", '{"a\'b\\" string=\\"false": 5}')]),
        # ends that are missing
        (
            '<｜DSML｜function_calls><｜DSML｜invoke name="f">\n'
            + P.format("text", "true", "Dallas").removesuffix("</｜DSML｜parameter>")
            + f'\n{P.format("count", "false", "5")}</｜DSML｜invoke><｜DSML｜invoke name="g"></｜DSML｜invoke>',
            [("f", '{"text": "Dallas", "count": 5}'), ("g", "{}")],
        ),
        # cut off
        (D.format(P.format("text", "true", "half")).partition("lf")[0], [("f", '{"text": "ha')]),
    ],
}


@pytest.mark.parametrize("name", FORMS)
def test_written_in_every_way(name: str) -> None:
    assert set(CASES) == set(TEMPLATES) == set(FORMS)
    for text, parts in CASES[name]:
        for size in (1, 3, 7, 1000):
            assert read(name, text, size) == parts, (size, text)


@pytest.mark.parametrize("name", FORMS)
def test_strings_come_as_they_are_written(name: str) -> None:
    said = "The quick <brown> fox. " * 50
    text = render(name, "", [("f", {"text": said, "count": 5})])
    made = parser(name)
    got = 0
    for at, char in enumerate(text[: text.index(said) + len(said)]):
        parts = made.feed(char)
        got += sum(len(part.arguments) for part in parts if isinstance(part, ToolCall))
        assert got >= at - text.index(said) - 40


@cases("size", [1, 5, 10**6])
@cases("name", FORMS)
def test_hostile_text_takes_linear_time(name: str, size: int) -> None:
    """What is held between two pieces stays short; 100,000 characters of each kind take no two seconds, and squared minutes."""
    form, long = FORMS[name], {1: 300, 5: 1_000}.get(size, 100_000)
    head = f"{form.block}{form.call}f" + (">" if form.call else "\n")
    value = head + form.key + "text" + form.key_end + form.value
    whole = head + form.key + "box" + form.key_end + form.value
    for start in ("", form.block, head, value, whole, value + form.value_end, head + form.key, f"{form.block}{form.call}"):
        for bit in (" ", "\n", "<", "a", *TAGS, "\n" + form.key, "\n" + form.key + "more", form.value_end + "\n", "[", '"'):
            text = start + bit * (long // len(bit))
            made, begun = parser(name), time.process_time()
            for i in range(0, len(text), size):
                made.feed(text[i : i + size])
                assert len(made._scan.text) - made._scan.at < 64
            made.finish()
            assert time.process_time() - begun < 2, (start, bit)


@cases(
    ("key", "text", "expected"),
    [
        ("text", "5", '"5"'),
        ("text", "None", '"None"'),
        ("count", " 5\n", "5"),
        ("count", "5.00", "5"),
        ("count", "five", '"five"'),
        ("count", "1" * 5000, "1" * 5000),
        ("ratio", "0.1000000000000000055511151231257827", "0.1000000000000000055511151231257827"),
        ("ratio", "NaN", '"NaN"'),
        ("ratio", "5", "5"),
        ("yes", "True", "true"),
        ("yes", "false", "false"),
        ("yes", "perhaps", '"perhaps"'),
        ("none", "None", "null"),
        ("maybe", "null", "null"),
        ("maybe", "nothing", '"nothing"'),
        ("maybe", "5", '"5"'),
        ("either", "5", "5"),
        ("either", "5.5", '"5.5"'),
        ("box", '{"x": 1, "x": [NaN]}', '"{\\"x\\": 1, \\"x\\": [NaN]}"'),
        ("box", ' {"x":\n 1}', '{"x":\n 1}'),
        ("box", '{"x": ' + "[" * 10**5, json.dumps('{"x": ' + "[" * 10**5)),
        ("items", "[1, 2]", "[1, 2]"),
        ("items", "1", "1"),
        ("mode", "5", '"5"'),
        ("any", "[1]", "[1]"),
        ("any", "word", '"word"'),
        ("unlisted", "true", "true"),
    ],
)
def test_values_are_of_the_types_that_the_schema_says(key: str, text: str, expected: str) -> None:
    assert as_json(text, ArgumentTypes(TOOLS).of("f", key)) == expected


@pytest.mark.parametrize(
    "schema", [{"properties": 3}, {"properties": {"a": 3}}, {"$ref": "#"}, {"anyOf": [{"$ref": "#/anyOf"}]}]
)
def test_schemas_that_say_nothing(schema: dict[str, Any]) -> None:
    types = ArgumentTypes({"f": schema})
    assert types.of("f", "a") == types.of("h", "a") == frozenset()
    assert ArgumentTypes({"f": {"properties": {"a": {"$ref": "#/properties/a", "type": "integer"}}}}).of("f", "a") == {
        "integer"
    }


def test_choosing_the_parser_of_a_template() -> None:
    template = "<tool_call>\n<function=name>\n<parameter=key>"
    assert choose_parser(None, template, "qwen3_moe") == choose_parser("qwen3_xml", None, "") == "qwen3_coder"
    template = "<tool_call>{function-name}\n<arg_key>{key}</arg_key>"
    assert (
        choose_parser(None, template, "x")
        == choose_parser("glm47", None, "")
        == choose_parser(None, None, "glm4_moe")
        == "glm45"
    )
    template = '<minimax:tool_call>\n<invoke name="tool">\n<parameter name="key">'
    assert {
        choose_parser(None, template, "x"),
        choose_parser("minimax", None, ""),
        choose_parser(None, None, "minimax_m2"),
    } == {"minimax_m2"}
    assert choose_parser(None, "<tool_call>", "qwen3_moe") == choose_parser(None, None, "qwen3_moe") == "hermes"


MakeClient = Callable[..., Client]
OFFERED = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in TOOLS.items()]


@pytest.mark.parametrize("name", FORMS)
def test_a_chat_with_calls(make_client: MakeClient, name: str) -> None:
    arguments = {"text": "Zürich\n", "count": 3, "box": {"x": [1]}}
    client = make_client(render(name, "Wait.", [("f", arguments), ("g", {})]), tool_parser=name)
    choice = client.chat(tools=OFFERED)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"].strip() == "Wait."
    called = [(one["function"]["name"], json.loads(one["function"]["arguments"])) for one in choice["message"]["tool_calls"]]
    assert called == [("f", arguments), ("g", {})]

    deltas = [event["choices"][0]["delta"] for event in client.events("/v1/chat/completions", tools=OFFERED)]
    assert "".join(delta.get("content", "") for delta in deltas).strip() == "Wait."
    streamed = [one for delta in deltas for one in delta.get("tool_calls", [])]
    assert [one["function"]["name"] for one in streamed if "id" in one] == ["f", "g"]
    assert json.loads("".join(one["function"]["arguments"] for one in streamed if one["index"] == 0)) == arguments
    assert sum(one["index"] == 0 for one in streamed) > 3


@pytest.mark.parametrize("name", FORMS)
def test_forced_calls_are_json_in_every_family(make_client: MakeClient, name: str) -> None:
    """A grammar makes the model write JSON, so its family's tags are text there."""
    written = json.dumps({"text": "<tool_call>", "count": 5})
    client = make_client(f'[{{"name": "f", "parameters": {written}}}]', tool_parser=name)
    message = client.chat(tools=OFFERED, tool_choice="required")["choices"][0]["message"]
    assert [one["function"] for one in message["tool_calls"]] == [{"name": "f", "arguments": written}]
    client = make_client(written, tool_parser=name)
    message = client.chat(tools=OFFERED, tool_choice={"type": "function", "function": {"name": "f"}})["choices"][0]["message"]
    assert [one["function"] for one in message["tool_calls"]] == [{"name": "f", "arguments": written}]


@pytest.mark.parametrize(
    ("model_type", "name", "template", "written"),
    [
        ("glm4_moe", "glm45", "{{ tools }}<|assistant|>", "\n<think>why</think>\n"),
        ("minimax_m2", "minimax_m2", "{{ tools }}]~b]ai\n<think>\n", "why</think>\n\n"),
        (
            "qwen3_moe",
            "qwen3_coder",
            "{#<tool_call><function=a><parameter=b>#}{{ tools }}<|im_start|>assistant\n",
            "<think>why</think>",
        ),
    ],
)
def test_the_model_type_chooses(model_type: str, name: str, template: str, written: str) -> None:
    engine = FakeEngine(written + "So." + render(name, "", [("f", {"text": "x"})]))
    engine.info = replace(engine.info, model_type=model_type)
    client = Client(engine, make_served(engine, ["m"], template))  # type: ignore[arg-type]
    message = client.chat(tools=OFFERED)["choices"][0]["message"]
    assert message["reasoning_content"] == "why"
    assert message["content"].strip() == "So."
    assert [one["function"] for one in message["tool_calls"]] == [{"name": "f", "arguments": '{"text": "x"}'}]
