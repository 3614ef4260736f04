"""What models write, read as messages: at once and in pieces of every size, always with the same result."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from cases import cases
from server.api_client import Client

from octavo.errors import OctavoError
from octavo.messages import StructuredOutput
from octavo.server.parsers.call import Part, ToolCall
from octavo.server.parsers.reasoning import MessageReader, ThinkSplitter, join_delta, make_splitter
from octavo.server.parsers.registry import choose_parser, choose_reasoning_parser
from octavo.server.parsers.tools import PARSERS, json_parser
from octavo.text.llguidance_grammar import serialize

MakeClient = Callable[..., Client]
A, B = '{"city": "Zürich", "n": [1, {"x": "}"}]}', '{"q": "a; b"}'


def call(name: str, arguments: str) -> str:
    return f'{{"name": "{name}", "arguments": {arguments}}}'


CASES = {
    "hermes": [
        ("plain text", ["plain text"]),
        (f"<tool_call>\n{call('f', A)}\n</tool_call>", [("f", A)]),
        (f"Let me see. <tool_call>{call('f', A)}</tool_call>", ["Let me see. ", ("f", A)]),
        (f"<tool_call>{call('f', A)}</tool_call>\n<tool_call>{call('g', B)}</tool_call>\n", [("f", A), ("g", B)]),
        (f"<tool_call>{call('f', A)}</tool_call> done", [("f", A), "done"]),
        (f"<tool_call>{call('f', A)}", [("f", A)]),  # the closer is a token that some models stop at
        ("<tool_call>nonsense</tool_call> x", ["<tool_call>nonsense</tool_call> x"]),
        ('<tool_call>{"name": "f", "argum', ['<tool_call>{"name": "f", "argum']),
        ('<tool_call>{"name": 3}</tool_call>', ['<tool_call>{"name": 3}</tool_call>']),
        ('<tool_call>{"name": "f"}</tool_call>', [("f", "{}")]),
        ("a < b <tool", ["a < b <tool"]),
        ("", []),
    ],
    "llama3_json": [
        ("plain {text}", ["plain {text}"]),
        (f'{{"name": "f", "parameters": {A}}}', [("f", A)]),
        (f'\n<|python_tag|>{{"name": "f", "parameters": {A}}}', ["\n", ("f", A)]),
        (f"{call('f', A)}; {call('g', B)}", [("f", A), ("g", B)]),
        ('{"answer": 42}', ['{"answer": 42}']),
        ('{"name": "f", "param', ['{"name": "f", "param']),
        ("<|python_tag|>print(1)", ["<|python_tag|>print(1)"]),
    ],
    "mistral": [
        ("plain", ["plain"]),
        (f"[TOOL_CALLS][{call('f', A)}, {call('g', B)}]", [("f", A), ("g", B)]),
        (f"[TOOL_CALLS] [{call('f', A)}]", [("f", A)]),
        (f"[TOOL_CALLS]f{A}", [("f", A)]),
        (f"Well.[TOOL_CALLS]f[ARGS]{A}[TOOL_CALLS]g[CALL_ID]abc123def[ARGS]{B}", ["Well.", ("f", A), ("g", B)]),
        ("[TOOL_CALLS]f{broken", ["[TOOL_CALLS]f{broken"]),
        ("[TOOL", ["[TOOL"]),
    ],
    "json": [
        (f'[{{"name": "f", "parameters": {A}}}, {{"name": "g", "parameters": {B}}}]', [("f", A), ("g", B)]),
        ('[{"name": "f", "para', ['[{"name": "f", "para']),
    ],
}
FLAT = [(name, text, parts) for name, cases in CASES.items() for text, parts in cases]


@cases("size", [1, 3, 7, 1000])
@cases(("name", "text", "parts"), FLAT)
def test_formats(name: str, text: str, parts: list[Any], size: int) -> None:
    parser = json_parser(name)
    found = [part for i in range(0, len(text), size) for part in parser.feed(text[i : i + size])]
    assert _joined(found + parser.finish()) == parts
    assert parser.finish() == []


MARKERS = ["<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<think>", "</think>", "];}"]
WRITTEN = {
    "hermes": "<tool_call>{0}</tool_call>",
    "llama3_json": "{0}",
    "mistral": "[TOOL_CALLS][{0}]",
    "json": "[{0}]",
}


@cases("size", [1, 4, 1000])
@cases("name", PARSERS)
def test_markers_inside_a_string_are_text(name: str, size: int) -> None:
    """Of this parser and of all others, with quotes and backslashes around them."""
    assert set(WRITTEN) == set(PARSERS)
    for marker in MARKERS:
        for said in (marker, f'\\"{marker}', f"\\\\{marker}\\", f'say "{marker}" {{"a": [', f"\n{marker}"):
            arguments = json.dumps({"x": said, "y": [said]}, ensure_ascii=False)
            text = WRITTEN[name].format(call("f", arguments))
            parser = json_parser(name)
            found = [part for i in range(0, len(text), size) for part in parser.feed(text[i : i + size])]
            assert _joined(found + parser.finish()) == [("f", arguments)], text


NO_JSON = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", '[1, {"deep": NaN}]', '"NaN"']


def strict(text: str) -> Any:
    """JSON as a client in any language reads it: Python's reader alone takes NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON: {text}")

    return json.loads(text, parse_constant=refuse)


@cases("value", NO_JSON)
@cases("name", PARSERS)
def test_arguments_are_json_or_the_call_is_content(make_client: MakeClient, name: str, value: str) -> None:
    """In each way to write a call, at once and streamed; a string that says NaN is one like any other."""
    form, arguments = PARSERS[name], f'{{"x": {value}, "y": 1.5}}'
    written = [call("f", arguments), call("f", json.dumps(arguments)), f'{{"name": "f", "parameters": {arguments}}}']
    written += [f"f{arguments}"] if name == "mistral" else []
    for one in written:
        text = form.opener + (f"[{one}]" if name == "json" else one) + form.closer
        parser = json_parser(name)
        parts = [*parser.feed(text), *parser.finish()]
        if value == '"NaN"':
            assert parts == [ToolCall("f", arguments)]
        else:
            assert "".join(map(str, parts)) == text
        how = {"tools": TOOLS, "tool_choice": "required" if name == "json" else "auto"}
        client = make_client(text, tool_parser=None if name == "json" else name)
        (choice,) = strict(json.dumps(client.chat(**how)))["choices"]
        calls = choice["message"].get("tool_calls") or []
        assert [strict(c["function"]["arguments"])["y"] for c in calls] == ([1.5] if value == '"NaN"' else [])
        deltas = [event["choices"][0]["delta"] for event in client.events("/v1/chat/completions", **how)]
        assert [c["function"]["name"] for d in deltas for c in d.get("tool_calls", [])] == ["f"] * len(calls)
        assert "".join(d.get("content") or "" for d in deltas) == ("" if calls else text)


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_a_string_that_never_ends_does_not_swallow_the_next_call(size: int) -> None:
    text = f'<tool_call>{{"name": "f}}</tool_call><tool_call>{call("g", B)}</tool_call> bye'
    parser = json_parser("hermes")
    found = [part for i in range(0, len(text), size) for part in parser.feed(text[i : i + size])]
    assert _joined(found + parser.finish()) == ['<tool_call>{"name": "f}</tool_call>', ("g", B), "bye"]


def _joined(parts: list[Part]) -> list[Any]:
    joined: list[Any] = []
    for part in parts:
        if isinstance(part, ToolCall):
            joined.append((part.name, part.arguments))
        elif joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def test_choosing_a_parser() -> None:
    assert choose_parser(None, "... <tool_call> ...", "llama") == "hermes"
    assert choose_parser(None, "... [TOOL_CALLS]", "mistral") == "mistral"
    assert choose_parser(None, None, "qwen3") == "hermes"
    assert choose_parser(None, None, "unheard") is None
    assert choose_parser("llama3_json", "<tool_call>", "qwen3") == "llama3_json"
    with pytest.raises(OctavoError, match="hermes"):
        choose_parser("hermse", None, "llama")


THINKING = [
    ("<think>why</think>\n\nbecause", False, "why", "because"),
    ("why</think>because", True, "why", "because"),
    ("<think>why</think>because", True, "why", "because"),
    ("no thoughts", False, "", "no thoughts"),
    ("<b>no</b>", False, "", "<b>no</b>"),
    ("<think>cut sho", False, "cut sho", ""),
    ("cut </thi", True, "cut </thi", ""),
]


@cases("size", [1, 4, 1000])
@cases(("text", "inside", "reasoning", "content"), THINKING)
def test_thinking(text: str, inside: bool, reasoning: str, content: str, size: int) -> None:
    reader = MessageReader(None, ThinkSplitter(inside))
    message: dict[str, Any] = {}
    for i in range(0, len(text), size):
        join_delta(message, reader.feed(text[i : i + size], final=i + size >= len(text)))
    assert "".join(message.get("reasoning_content", [])) == reasoning
    assert "".join(message.get("content", [])) == content


GLM, MINIMAX = "<|assistant|>", "]~b]ai\n<think>\n"  # how the prompts of these families end
KIMI = "<|tool_calls_section_begin|>"
PROMPTED = [
    ("qwen3", "<|im_start|>assistant\n", "<think>\nwhy\n</think>\n\nbecause", "\nwhy\n", "because"),
    ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", "because", "", "because"),
    ("glm45", GLM, "\n<think>why</think>\nbecause", "why", "because"),
    ("glm45", GLM + "\n<think></think>", "\nbecause", "", "\nbecause"),
    ("glm45", GLM, "\n<think></think>\nbecause", "", "because"),
    ("glm45", GLM + "<think>", "why</think>because", "why", "because"),  # GLM-4.7
    ("glm45", GLM + "</think>", "because", "", "because"),
    ("minimax_m2", MINIMAX, "why\n</think>\n\nbecause", "why\n", "because"),
    ("minimax_m2", "]~b]ai\n", "why</think>because", "why", "because"),
    ("minimax_m2", MINIMAX, "cut sho", "cut sho", ""),
    ("minimax_m2", MINIMAX + "</think>\n\n", "because", "", "because"),
    ("minimax_m2_append_think", MINIMAX, "why\n</think>\n\nbecause", "", "<think>why\n</think>\n\nbecause"),
    ("minimax_m2_append_think", MINIMAX, "cut </thi", "", "<think>cut </thi"),
    ("minimax_m2_append_think", MINIMAX + "</think>\n\n", "because", "", "because"),
    ("deepseek_r1", "<｜Assistant｜><think>\n", "why</think>\nbecause", "why", "because"),
    ("deepseek_v3", "<｜Assistant｜>", "because</think>", "", "because</think>"),
    ("deepseek_v3", "<｜Assistant｜></think>", "because", "", "because"),
    ("kimi_k2", "<|im_middle|>", "because", "", "because"),
    ("kimi_k2", "<|im_middle|><think></think>", "because", "", "because"),
    ("kimi_k2", "<|im_middle|>", f"<think>why{KIMI}x</think>y", "why", f"{KIMI}x</think>y"),  # calls end its thinking
    ("kimi_k2", "<|im_middle|><think>", f"why</think>\n{KIMI}x", "why", f"{KIMI}x"),
    ("kimi_k2", "<|im_middle|><think>", f"why{KIMI[:-2]}", f"why{KIMI[:-2]}", ""),
]


@cases("size", [1, 4, 1000])
@cases(("name", "prompt", "text", "reasoning", "content"), PROMPTED)
def test_thinking_that_the_prompt_begins(name: str, prompt: str, text: str, reasoning: str, content: str, size: int) -> None:
    reader = MessageReader(json_parser("hermes"), make_splitter(name, prompt))
    message: dict[str, Any] = {}
    for i in range(0, len(text), size):
        join_delta(message, reader.feed(text[i : i + size], final=i + size >= len(text)))
    assert "".join(message.get("reasoning_content", [])) == reasoning
    assert "".join(message.get("content", [])) == content


@pytest.mark.parametrize("name", ["glm45", "minimax_m2", "minimax_m2_append_think"])
def test_calls_that_are_thought_of_are_not_made(name: str) -> None:
    called = f"<tool_call>{call('f', A)}</tool_call>"
    reader = MessageReader(json_parser("hermes"), make_splitter(name, MINIMAX))
    message: dict[str, Any] = {}
    for char in f"maybe {called}</think>{called}":
        join_delta(message, reader.feed(char, final=False))
    join_delta(message, reader.feed("", final=True))
    assert [one["function"]["name"] for one in message["tool_calls"]] == ["f"]
    assert called in "".join(message.get("reasoning_content", message.get("content")))


def test_choosing_a_reasoning_parser() -> None:
    assert choose_reasoning_parser(None, "qwen3_moe") == choose_reasoning_parser("qwen3", "llama") == "qwen3"
    assert choose_reasoning_parser(None, "glm4_moe") == choose_reasoning_parser("glm47", "") == "glm45"
    assert choose_reasoning_parser(None, "minimax_m2") == choose_reasoning_parser("minimax", "") == "minimax_m2"
    for name in ("deepseek_v3", "deepseek_v32"):
        assert choose_reasoning_parser(None, name) == choose_reasoning_parser("deepseek_v31", "") == "deepseek_v3"
    for name in ("kimi_k2", "kimi_k25"):
        assert choose_reasoning_parser(None, name) == choose_reasoning_parser(name, "") == "kimi_k2"
    assert choose_reasoning_parser(None, "llama") is choose_reasoning_parser("none", "glm4_moe") is None
    with pytest.raises(OctavoError, match="glm45"):
        choose_reasoning_parser("glm", "")


TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "g"}},
]


def test_a_chat_with_calls(make_client: MakeClient) -> None:
    client = make_client(
        f"Wait.<tool_call>{call('f', A)}</tool_call><tool_call>{call('g', B)}</tool_call>", tool_parser="hermes"
    )
    choice = client.chat(tools=TOOLS)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Wait."
    calls = choice["message"]["tool_calls"]
    assert [c["function"] for c in calls] == [{"name": "f", "arguments": A}, {"name": "g", "arguments": B}]
    assert len({c["id"] for c in calls}) == 2

    events = client.events("/v1/chat/completions", tools=TOOLS)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content", "") for delta in deltas) == "Wait."
    streamed = [c for delta in deltas for c in delta.get("tool_calls", [])]
    assert [(c["index"], c["function"]) for c in streamed] == [(i, c["function"]) for i, c in enumerate(calls)]
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_no_chunk_is_sent_of_which_nothing_is_told(make_client: MakeClient) -> None:
    """But those that bring what was asked for beside the message."""
    text = f"Wait.<tool_call>{call('f', A)}</tool_call><tool_call>{call('g', B)}</tool_call>"
    client = make_client(f"so</think>{text}", tool_parser="hermes", reasoning_parser="deepseek_r1")
    ids = client.engine.tokenizer.encode(client.engine.text)
    for more in ({}, {"include_reasoning": False}, {"stream_options": {"continuous_usage_stats": True}}):
        choices = [event["choices"][0] for event in client.events("/v1/chat/completions", tools=TOOLS, **more)]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert all(choice["delta"] for choice in choices[:-1])
        assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["tool_calls"]
        assert len(choices) < len(ids)
    asked = {"tools": TOOLS, "logprobs": True}
    entries = [event["choices"][0]["logprobs"] for event in client.events("/v1/chat/completions", **asked)[1:]]
    assert len(entries) == sum(len(entry["content"]) for entry in entries) == len(ids)
    chunks = client.events("/v1/chat/completions", tools=TOOLS, return_token_ids=True)[1:]
    assert [chunk["choices"][0]["token_ids"] for chunk in chunks] == [[token] for token in ids]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_of_calls_that_may_not_be_parallel_the_first_is_told(make_client: MakeClient, path: str) -> None:
    text = f"Wait. <tool_call>{call('f', A)}</tool_call>\n<tool_call>{call('g', B)}</tool_call>"
    client = make_client(text, tool_parser="hermes")
    if path == "/v1/chat/completions":
        asked = {"tools": TOOLS, "parallel_tool_calls": False}
        told = client.chat(**asked)["choices"][0]
        assert [one["function"]["name"] for one in told["message"]["tool_calls"]] == ["f"]
        assert told["finish_reason"] == "tool_calls"
        deltas = [event["choices"][0]["delta"] for event in client.events(path, **asked)]
        assert [one["function"]["name"] for delta in deltas for one in delta.get("tool_calls", [])] == ["f"]
    elif path == "/v1/responses":
        tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
        told = client.post(path, {"input": "hi", "tools": tools, "parallel_tool_calls": False}).json()
        assert [item["name"] for item in told["output"] if item["type"] == "function_call"] == ["f"]
    else:
        tools = [{"name": tool["function"]["name"], "input_schema": {}} for tool in TOOLS]
        choice = {"type": "auto", "disable_parallel_tool_use": True}
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 100, "tools": tools, "tool_choice": choice}
        told = client.post(path, body).json()
        assert [block["name"] for block in told["content"] if block["type"] == "tool_use"] == ["f"]


def test_calls_are_content_where_no_tools_are(make_client: MakeClient) -> None:
    text = f"<tool_call>{call('f', A)}</tool_call>"
    client = make_client(text, tool_parser="hermes")
    for more in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = client.chat(**more)["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": text}
        assert choice["finish_reason"] == "stop"


def test_a_required_call_follows_a_schema(make_client: MakeClient) -> None:
    client = make_client(f'[{{"name": "f", "parameters": {A}}}]')
    choice = client.chat(tools=TOOLS, tool_choice="required", parallel_tool_calls=False)["choices"][0]
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": A}
    structured = client.engine.calls[-1][1].structured
    assert structured is not None
    schema = json.loads(structured.grammar)
    assert schema["maxItems"] == 1
    assert [item["properties"]["name"]["const"] for item in schema["items"]["anyOf"]] == ["f", "g"]


def test_a_named_call_streams_its_arguments(make_client: MakeClient) -> None:
    client = make_client(A)
    choice = {"type": "function", "function": {"name": "f"}}
    answer = client.chat(tools=TOOLS, tool_choice=choice)["choices"][0]
    assert answer["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": A}
    assert answer["finish_reason"] == "stop"
    events = client.events("/v1/chat/completions", tools=TOOLS, tool_choice=choice)
    parts = [c for event in events for c in event["choices"][0]["delta"].get("tool_calls", [])]
    assert "".join(part["function"]["arguments"] for part in parts) == A
    assert [part["function"].get("name") for part in parts] == ["f"] + [None] * (len(parts) - 1)
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": TOOLS}
    wrong = {"type": "function", "function": {"name": "h"}}
    assert client.post("/v1/chat/completions", {**body, "tool_choice": wrong}).status_code == 400


def test_special_tokens_stay_for_families_that_mark_calls_with_them(make_client: MakeClient) -> None:
    client = make_client(tool_parser="mistral")
    client.chat(tools=TOOLS)
    assert not client.engine.calls[-1][1].skip_special_tokens
    client.chat()
    assert client.engine.calls[-1][1].skip_special_tokens


def test_earlier_calls_reach_the_template_as_objects(make_client: MakeClient) -> None:
    client = make_client(
        template="{% for m in messages %}{{ m.tool_calls[0].function.arguments.city if m.tool_calls }}{% endfor %}"
    )
    client.chat(messages=[{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": A}}]}])
    assert client.engine.tokenizer.decode(client.engine.calls[-1][0]) == "Zürich"


def test_reasoning_is_split_from_content(make_client: MakeClient) -> None:
    client = make_client("<think>why</think>\n\nbecause", reasoning_parser="qwen3")
    message = client.chat()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "because", "reasoning_content": "why", "reasoning": "why"}
    deltas = [event["choices"][0]["delta"] for event in client.events("/v1/chat/completions")]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "why"
    assert "".join(delta.get("content", "") for delta in deltas).strip() == "because"


def test_which_models_think_without_an_opening_tag() -> None:
    thinking = dict(deepseek_r1=True, minimax_m2=True, qwen3=False, deepseek_v3=False, glm45=False)
    for name, thinks in thinking.items():
        splitter = make_splitter(name, "a prompt")
        (reasoning, content), rest = splitter.feed("thought</think>answer"), splitter.finish()
        expected = ("thought", "answer") if thinks else ("", "thought</think>answer")
        assert (reasoning + rest[0], content + rest[1]) == expected, name


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@cases(
    ("body", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, StructuredOutput("json_object")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}},
            StructuredOutput("json_schema", json.dumps(SCHEMA)),
        ),
        ({"guided_json": SCHEMA}, StructuredOutput("json_schema", json.dumps(SCHEMA))),
        ({"guided_json": json.dumps(SCHEMA)}, StructuredOutput("json_schema", json.dumps(SCHEMA))),
        ({"structured_outputs": {"json": SCHEMA}}, StructuredOutput("json_schema", json.dumps(SCHEMA))),
        ({"guided_regex": r"\d+"}, StructuredOutput("regex", r"\d+")),
        ({"guided_choice": ["yes", 'n"o']}, StructuredOutput("lark", 'start: CHOICE\nCHOICE: "yes" | "n\\"o"')),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, StructuredOutput("lark", 'start: "a"')),
    ],
)
def test_structured_output(make_client: Callable[..., Client], body: dict[str, Any], expected: StructuredOutput | None) -> None:
    client = make_client()
    client.complete(**body)
    client.chat(**body)
    assert [params.structured for _, params, _ in client.engine.calls] == [expected, expected]
    crossed = None if expected is None else serialize(expected)
    assert [(one.grammar, one.params.structured) for one in client.engine.requests] == [(crossed, None)] * 2


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"$ref": "#/nowhere"}, "{", {"pattern": "(", "type": "string"}])
def test_a_schema_that_cannot_be_followed(client: Client, schema: Any) -> None:
    response = client.post("/v1/completions", {"prompt": "a", "guided_json": schema})
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("guided_json cannot be followed: ")
