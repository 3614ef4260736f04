"""POST /v1/messages over the fake engine: blocks in, events and blocks out."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from cases import cases
from pydantic import TypeAdapter
from server.api_client import Client, ok

PATH = "/v1/messages"
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
USER = {"role": "user", "content": "hi"}
PARAMETERS = {"type": "object", "properties": {"n": {"type": "integer"}}}
TOOL = {"name": "count", "description": "Counts.", "input_schema": PARAMETERS}
CHAT_TOOL = {"type": "function", "function": {"name": "count", "description": "Counts.", "parameters": PARAMETERS}}
WRITTEN = '<think>why</think>\n\nI will.\n<tool_call>\n{"name": "count", "arguments": {"n": 1}}\n</tool_call>'
SHOWN = "{% for m in messages %}{{ m | tojson }}\n{% endfor %}{{ tools | tojson }} {{ enable_thinking }} {{ reasoning_effort }}"


def send(client: Client, **body: Any) -> dict[str, Any]:
    return ok(client.post(PATH, {"max_tokens": 100, "messages": [USER], **body}))


def events_of(client: Client, **body: Any) -> list[dict[str, Any]]:
    return client.typed_events(PATH, **{"max_tokens": 100, "messages": [USER], **body})


@pytest.fixture
def thinker(make_client: Callable[..., Client]) -> Client:
    return make_client(WRITTEN, reasoning_parser="qwen3", tool_parser="hermes")


def test_a_message_has_anthropics_shape(client: Client) -> None:
    answer = send(client)
    told = Message.model_validate(answer, strict=True)
    assert told.id.startswith("msg_")
    assert answer["content"] == [{"type": "text", "text": " hello world"}]
    assert (told.stop_reason, told.stop_sequence) == ("end_turn", None)
    prompt = len(client.engine.calls[-1][0])
    assert (told.usage.input_tokens, told.usage.cache_read_input_tokens, told.usage.output_tokens) == (prompt - 3, 3, 6)


def test_the_events_of_a_text(client: Client) -> None:
    events = events_of(client)
    kinds = [event["type"] for event in events]
    assert kinds == [
        *("message_start", "ping", "content_block_start", *["content_block_delta"] * (len(events) - 6)),
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    for event in events:
        assert event["type"] == "ping" or EVENT.validate_python(event).type == event["type"]
    assert "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta") == " hello world"
    assert events[0]["message"]["usage"]["cache_read_input_tokens"] == 3
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 6


def test_thinking_and_calls_are_blocks(thinker: Client) -> None:
    answer = send(thinker, tools=[TOOL])
    Message.model_validate(answer, strict=True)
    thought, text, called = answer["content"]
    assert (thought["type"], thought["thinking"]) == ("thinking", "why")
    assert text == {"type": "text", "text": "I will.\n"}
    assert (called["type"], called["name"], called["input"]) == ("tool_use", "count", {"n": 1})
    assert answer["stop_reason"] == "tool_use"
    events = events_of(thinker, tools=[TOOL])
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    deltas = [(event["index"], event["delta"]) for event in events if event["type"] == "content_block_delta"]
    assert "".join(delta["thinking"] for place, delta in deltas if delta["type"] == "thinking_delta") == "why"
    assert "".join(delta["text"] for place, delta in deltas if place == 1) == "I will.\n"
    assert json.loads("".join(delta["partial_json"] for place, delta in deltas if place == 2)) == {"n": 1}
    assert [delta["signature"] for place, delta in deltas if delta["type"] == "signature_delta"] == [thought["signature"]]
    starts = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
    assert starts == ["thinking", "text", "tool_use"]
    hidden = send(thinker, tools=[TOOL], thinking={"type": "adaptive", "display": "omitted"})["content"]
    assert [block["type"] for block in hidden] == ["text", "tool_use"]


def test_why_a_message_ends(make_client: Callable[..., Client]) -> None:
    client = make_client('{"n": [1, 2')
    assert send(client, max_tokens=2)["stop_reason"] == "max_tokens"
    cut = send(client, max_tokens=3, tools=[TOOL], tool_choice={"type": "tool", "name": "count"})
    assert cut["stop_reason"] == "max_tokens"
    assert list(cut["content"][0]["input"]) == ["_unparsed"]
    client = make_client('{"n": 1}')
    assert send(client, tools=[TOOL], tool_choice={"type": "tool", "name": "count"})["stop_reason"] == "tool_use"


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
def test_a_prompt_that_is_too_long_is_called_one(client: Client, path: str) -> None:
    text = "word " * 1100
    body = {"input": text} if path == "/v1/responses" else {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
    response = client.post(path, body)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("The prompt has ")


def tool_use(n: int) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"call{n}", "name": "count", "input": {"n": n}}


def chat_call(n: int) -> dict[str, Any]:
    return {"id": f"call{n}", "type": "function", "function": {"name": "count", "arguments": {"n": n}}}


TEXT = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
ASKED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"messages": [{"role": "user", "content": [TEXT]}]}, {}),
    ({"system": "be kind"}, {"messages": [{"role": "system", "content": "be kind"}, USER]}),
    (
        {"system": [{"type": "text", "text": "be kind"}], "messages": [USER, {"role": "system", "content": "and brief"}]},
        {"messages": [{"role": "system", "content": "be kind\nand brief"}, USER]},
    ),
    (
        {"system": [{"type": "text", "text": "x-anthropic-billing-header: cch=1;"}, {"type": "text", "text": "be kind"}]},
        {"messages": [{"role": "system", "content": "be kind"}, USER]},
    ),
    (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "why", "signature": "x"},
                        {"type": "redacted_thinking", "data": "x"},
                        {"type": "text", "text": "I will."},
                        *(tool_use(1), tool_use(2)),
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "call1", "content": "one"},
                        {"type": "tool_result", "tool_use_id": "call2", "content": [{"type": "text", "text": "two"}]},
                        {"type": "text", "text": "And?"},
                    ],
                },
            ]
        },
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": "I will.",
                    "reasoning_content": "why",
                    "tool_calls": [chat_call(1), chat_call(2)],
                },
                {"role": "tool", "tool_call_id": "call1", "content": "one"},
                {"role": "tool", "tool_call_id": "call2", "content": "two"},
                {"role": "user", "content": "And?"},
            ]
        },
    ),
    ({"temperature": 0.1, "top_p": 0.3, "top_k": 4}, {"temperature": 0.1, "top_p": 0.3, "top_k": 4}),
    ({"max_tokens": 7}, {"max_tokens": 7}),
    ({"stop_sequences": ["x", "y"]}, {"stop": ["x", "y"]}),
    ({"tools": [TOOL]}, {"tools": [CHAT_TOOL]}),
    ({"tools": [TOOL], "tool_choice": {"type": "none"}}, {"tools": [CHAT_TOOL], "tool_choice": "none"}),
    (
        {"tools": [TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
        {"tools": [CHAT_TOOL], "tool_choice": "required", "parallel_tool_calls": False},
    ),
    (
        {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "count"}},
        {"tools": [CHAT_TOOL], "tool_choice": {"type": "function", "function": {"name": "count"}}},
    ),
    (
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"chat_template_kwargs": {"enable_thinking": True, "thinking": True}},
    ),
    ({"thinking": {"type": "disabled"}}, {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}}),
    ({"output_config": {"effort": "low"}}, {"reasoning_effort": "low"}),
    (
        {"output_config": {"format": {"type": "json_schema", "schema": PARAMETERS}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": PARAMETERS}}},
    ),
]  # fmt: skip


@cases(("ours", "chats"), ASKED, ids=str)
def test_what_is_asked_reaches_the_chat(client: Client, ours: dict[str, Any], chats: dict[str, Any]) -> None:
    client.served.chat_template = SHOWN
    counted = ok(client.post(f"{PATH}/count_tokens", {"messages": [USER], **ours}))["input_tokens"]
    send(client, **ours)
    client.chat(**{"max_tokens": 100, **chats})
    (prompt, params, _), (other, others, _) = client.engine.calls[-2:]
    assert client.engine.tokenizer.decode(prompt) == client.engine.tokenizer.decode(other)
    assert params.structured is others.structured or (
        params.structured is not None
        and others.structured is not None
        and params.structured.grammar == others.structured.grammar
    )
    assert (params.temperature, params.top_p, params.top_k) == (others.temperature, others.top_p, others.top_k)
    assert (params.stop, params.max_tokens) == (others.stop, others.max_tokens)
    assert counted == len(prompt)


def test_a_last_message_of_the_assistant_is_continued(client: Client) -> None:
    for content in ("I say", [{"type": "text", "text": "I say"}]):
        send(client, messages=[USER, {"role": "assistant", "content": content}])
        decoded = client.engine.tokenizer.decode(client.engine.calls[-1][0], skip_special_tokens=False)
        assert decoded.endswith("<|im_start|>assistant\nI say")


def blocks(*content: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(content)}]}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**6}, "maximum context length"),
    (blocks({"type": "document", "source": {}}), "messages.0.content.0"),
    (blocks({"type": "text", "text": 3}), "messages.0.content.0.text"),
    (blocks(3), "messages.0.content.0"),
    (blocks({"type": "image", "source": {"type": "file", "file_id": "f"}}), "messages.0.content.0.source"),
    (blocks({"type": "image", "source": {"type": "base64", "data": "AA=="}}), "media_type"),
    (blocks({"type": "image", "source": {"type": "url", "url": "data:,"}}), "images"),
    (blocks({"type": "tool_result", "content": "a"}), "tool_use_id"),
    (blocks(tool_use(1), role="assistant"), "tool_result"),
    (blocks({**tool_use(1), "input": "{}"}, role="assistant"), "messages.0.content.0.input"),
    (blocks({"type": "server_tool_use"}, role="assistant"), "server_tool_use"),
    ({"system": [{"type": "image"}]}, "system"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "bash_20250124"),
    ({"tools": [{"name": "f"}]}, "tools.0.input_schema"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"thinking": {"type": "between_tools"}}, "thinking.type"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"container": "c"}, "container"),
    ({"temperature": -1}, "temperature"),
]


@cases(("body", "named"), BAD, ids=str)
def test_bad_requests_get_one_sentence_in_anthropics_shape(client: Client, body: dict[str, Any], named: str) -> None:
    for stream in (False, True):
        response = client.post(PATH, {"max_tokens": 5, "messages": [USER], **body, "stream": stream})
        assert response.status_code == 400, response.text
        answer = response.json()
        assert answer.keys() == {"type", "error"}
        assert (answer["type"], answer["error"]["type"]) == ("error", "invalid_request_error")
        message = answer["error"]["message"]
        assert named in message
        assert message.endswith((".", "}."))
        assert len(message) < 400


def test_every_error_has_anthropics_shape(client: Client) -> None:
    client.api_keys = ["secret"]
    body = {"max_tokens": 5, "messages": [USER]}
    assert client.post(PATH, body, headers={"x-api-key": "secret"}).status_code == 200
    assert client.post(PATH, body, headers={"Authorization": "Bearer secret", "x-api-key": "wrong"}).status_code == 200
    key = {"x-api-key": "secret"}
    failing: list[tuple[str, str, dict[str, Any], int, str]] = [
        ("POST", PATH, {"json": body, "headers": {"x-api-key": "wrong"}}, 401, "authentication_error"),
        ("POST", PATH, {"json": body, "headers": {"x-api-key": ""}}, 401, "authentication_error"),
        ("POST", PATH, {"json": body, "headers": {"Authorization": "secret"}}, 401, "authentication_error"),
        ("POST", PATH, {"json": {**body, "model": "claude"}, "headers": key}, 404, "not_found_error"),
        ("GET", PATH, {"headers": key}, 405, "invalid_request_error"),
        ("POST", f"{PATH}/batches", {"headers": key}, 404, "not_found_error"),
        ("POST", PATH, {"content": "{", "headers": key}, 400, "invalid_request_error"),
        ("POST", PATH, {"content": b" " * (client.served.gate.body_bytes + 1), "headers": key}, 413, "request_too_large"),
    ]
    for method, path, how, status, kind in failing:
        response = client.request(method, path, **how)
        assert (response.status_code, response.json()["error"]["type"]) == (status, kind)
    client.engine.fail_after = 2
    response = client.post(PATH, body, headers=key)
    assert (response.status_code, response.json()["error"]["type"]) == (503, "overloaded_error")
    client.api_keys = []
    error = events_of(client)[-1]
    assert error == {"type": "error", "error": {"type": "overloaded_error", "message": "The engine died."}}
    client.served.gate.closing = True
    assert client.post(PATH, body).json()["error"]["type"] == "overloaded_error"


def test_a_large_body_is_translated_in_another_process(client: Client) -> None:
    for more in ({}, {"unknown": "a" * 2**17}):
        send(client, system="be kind", tools=[TOOL], **more)
    assert client.engine.calls[0][:2] == client.engine.calls[1][:2]
