"""POST /v1/responses over the fake engine: items in, events and items out, what is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from cases import cases
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from server.api_client import Client, ok

from octavo.server.responses import response_store
from octavo.server.responses.response_store import ResponseStore, StoredResponse, size_of

PATH = "/v1/responses"
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
PARAMETERS = {"type": "object", "properties": {"n": {"type": "integer"}}}
TOOL = {"type": "function", "name": "count", "description": "Counts.", "parameters": PARAMETERS}
CHAT_TOOL = {"type": "function", "function": {name: TOOL[name] for name in ("name", "description", "parameters")}}
WRITTEN = '<think>why</think>\n\nI will.\n<tool_call>\n{"name": "count", "arguments": {"n": 1}}\n</tool_call>\n<tool_call>\n'
WRITTEN += '{"name": "count", "arguments": {"n": 2}}\n</tool_call>'


def respond(client: Client, **body: Any) -> dict[str, Any]:
    return ok(client.post(PATH, {"input": "hi", **body}))


def prompt_of(client: Client) -> str:
    """The last prompt, as text."""
    return client.engine.tokenizer.decode(client.engine.calls[-1][0], skip_special_tokens=False)


@pytest.fixture
def thinker(make_client: Callable[..., Client]) -> Client:
    return make_client(WRITTEN, reasoning_parser="qwen3", tool_parser="hermes")


def test_a_response_has_openais_shape(client: Client) -> None:
    answer = respond(client, metadata={"a": "b"}, instructions="be kind", max_output_tokens=6, temperature=0.5)
    told = Response.model_validate(answer, strict=True)
    assert told.output_text == " hello world"
    assert told.id.startswith("resp_")
    assert (told.status, told.error, told.incomplete_details) == ("completed", None, None)
    assert (told.metadata, told.instructions, told.temperature, told.max_output_tokens) == ({"a": "b"}, "be kind", 0.5, 6)
    assert answer["usage"] == {
        "input_tokens": len(client.engine.calls[-1][0]),
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 6,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": len(client.engine.calls[-1][0]) + 6,
    }


def test_a_response_that_is_cut_off_is_incomplete(client: Client) -> None:
    answer = respond(client, max_output_tokens=2)
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert answer["output"][0]["status"] == "incomplete"
    assert client.typed_events(PATH, input="hi", max_output_tokens=2)[-1]["type"] == "response.incomplete"


def test_the_events_of_a_text(client: Client) -> None:
    events = client.typed_events(PATH, input="hi")
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [EVENT.validate_python(event).type for event in events]
    head, tail = (
        ["created", "in_progress", "output_item.added", "content_part.added"],
        ["content_part.done", "output_item.done"],
    )
    assert kinds[:4] == [f"response.{kind}" for kind in head]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == ["response.output_text.done", *(f"response.{kind}" for kind in (*tail, "completed"))]
    assert "".join(event["delta"] for event in events[4:-4]) == events[-4]["text"] == " hello world"
    assert events[-1]["response"]["output"] == [events[-2]["item"]]


def test_reasoning_and_calls_are_items(thinker: Client) -> None:
    """Streamed or not they are the same; white space between two calls is none."""
    events = thinker.typed_events(PATH, input="hi", tools=[TOOL])
    for event in events:
        EVENT.validate_python(event)
    response = events[-1]["response"]
    assert [item["type"] for item in response["output"]] == ["reasoning", "message", "function_call", "function_call"]
    thought, message, *calls = response["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "why"}]
    assert message["content"][0]["text"] == "I will.\n"
    assert [json.loads(call["arguments"]) for call in calls] == [{"n": 1}, {"n": 2}]
    assert calls[0]["call_id"] != calls[1]["call_id"]
    by_kind = {kind: [event for event in events if event["type"] == f"response.{kind}"] for kind in (
        "reasoning_text.delta", "output_text.delta", "function_call_arguments.delta", "function_call_arguments.done",
        "output_item.added", "output_item.done",
    )}  # fmt: skip
    assert "".join(event["delta"] for event in by_kind["reasoning_text.delta"]) == "why"
    assert [event["arguments"] for event in by_kind["function_call_arguments.done"]] == [call["arguments"] for call in calls]
    for place in (2, 3):
        pieces = [event["delta"] for event in by_kind["function_call_arguments.delta"] if event["output_index"] == place]
        assert "".join(pieces) == response["output"][place]["arguments"]
    added, done = by_kind["output_item.added"], by_kind["output_item.done"]
    assert [event["item"]["id"] for event in added] == [item["id"] for item in response["output"]]
    assert [event["item"] for event in done] == response["output"]
    assert 0 < response["usage"]["output_tokens_details"]["reasoning_tokens"] < response["usage"]["output_tokens"]
    whole = respond(thinker, tools=[TOOL])
    assert [strip(item) for item in whole["output"]] == [strip(item) for item in response["output"]]


def strip(item: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key not in ("id", "call_id")}


def test_logprobs_are_of_the_text(client: Client) -> None:
    answer = respond(client, include=["message.output_text.logprobs"], top_logprobs=2)
    (part,) = answer["output"][0]["content"]
    assert "".join(entry["token"] for entry in part["logprobs"]) == part["text"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in part["logprobs"])
    events = client.typed_events(PATH, input="hi", top_logprobs=2)
    told = [entry for event in events if event["type"] == "response.output_text.delta" for entry in event["logprobs"]]
    assert told == part["logprobs"]


def call(call_id: str, n: int) -> dict[str, Any]:
    return {"type": "function_call", "id": "fc_1", "call_id": call_id, "name": "count", "arguments": json.dumps({"n": n})}


def chat_call(call_id: str, n: int) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "count", "arguments": json.dumps({"n": n})}}


USER = {"role": "user", "content": "hi"}
TEXT = {"type": "output_text", "text": "Hello.", "annotations": []}
INPUTS: list[tuple[Any, list[dict[str, Any]]]] = [
    ("hi", [USER]),
    ([USER], [USER]),
    ([{"type": "message", **USER, "content": [{"type": "input_text", "text": "hi"}]}], [USER]),
    ([{"role": "developer", "content": "be kind"}, USER], [{"role": "system", "content": "be kind"}, USER]),
    (
        [USER, {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [TEXT]}, USER],
        [USER, {"role": "assistant", "content": "Hello."}, USER],
    ),
    (  # one turn of the assistant: it thinks, says something and calls twice
        [
            USER,
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "why"}]},
            {"type": "message", "role": "assistant", "content": [TEXT]},
            *(call("a", 1), call("b", 2)),
            {"type": "function_call_output", "call_id": "a", "output": "one"},
            {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "two"}]},
        ],
        [
            USER,
            {
                "role": "assistant",
                "content": "Hello.",
                "reasoning_content": "why",
                "tool_calls": [chat_call("a", 1), chat_call("b", 2)],
            },
            {"role": "tool", "tool_call_id": "a", "content": "one"},
            {"role": "tool", "tool_call_id": "b", "content": "two"},
        ],
    ),
    (
        [USER, {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "so"}]}, call("a", 1)],
        [USER, {"role": "assistant", "reasoning_content": "so", "tool_calls": [chat_call("a", 1)]}],
    ),
    (
        [USER, {"role": "assistant", "content": "A."}, {"role": "assistant", "content": "B."}, USER],
        [USER, {"role": "assistant", "content": "A."}, {"role": "assistant", "content": "B."}, USER],
    ),
]
SHOWN = "{% for m in messages %}{{ m | tojson }}\n{% endfor %}{{ tools | tojson }}"  # all that reaches a template


@cases(("given", "messages"), INPUTS, ids=str)
def test_items_are_messages(client: Client, given: Any, messages: list[dict[str, Any]]) -> None:
    client.served.chat_template = SHOWN
    respond(client, input=given, tools=[TOOL])
    ours = prompt_of(client)
    client.chat(messages=messages, tools=[CHAT_TOOL])
    assert ours == prompt_of(client)


def test_what_is_asked_reaches_the_chat(client: Client) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    asked: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"instructions": "be kind"}, {"messages": [{"role": "system", "content": "be kind"}, USER]}),
        ({"temperature": 0.1, "top_p": 0.3, "max_output_tokens": 5}, {"temperature": 0.1, "top_p": 0.3, "max_tokens": 5}),
        ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}}},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}},
        ),
        (
            {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
            {"tools": [CHAT_TOOL], "tool_choice": "required", "parallel_tool_calls": False},
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "name": "count"}},
            {"tools": [CHAT_TOOL], "tool_choice": {"type": "function", "function": {"name": "count"}}},
        ),
        (
            {
                "tools": [TOOL, {**TOOL, "name": "other"}],
                "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "count"}]},
            },
            {"tools": [CHAT_TOOL], "tool_choice": "required"},
        ),
        ({"reasoning": {"effort": "high", "summary": "auto"}}, {"reasoning_effort": "high"}),
        ({"seed": 3, "stop": ["x"], "top_k": 4}, {"seed": 3, "stop": "x", "top_k": 4}),
        ({"logit_bias": {"7": 2}, "ignore_eos": True}, {"logit_bias": {7: 2}, "ignore_eos": True}),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, {"structured_outputs": {"choice": ["yes", "no"]}}),
        ({"cache_salt": "mine"}, {"cache_salt": "mine"}),
    ]  # fmt: skip
    client.served.chat_template = SHOWN + "{{ reasoning_effort }}"
    for ours, chats in asked:
        respond(client, **ours)
        client.chat(**chats)
        (prompt, params, _), (other, others, _) = client.engine.calls[-2:]
        if params.structured is not None and others.structured is not None:
            assert params.structured.grammar == others.structured.grammar
        assert (prompt, params) == (other, others), ours
        assert client.engine.requests[-2].cache_salt == client.engine.requests[-1].cache_salt


BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": 3}, "input"),
    ({"input": ["a"]}, "input"),
    ({"input": [{"type": "web_search_call"}]}, "input.0"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
    ({"input": [USER, {"type": "message", "content": "a"}]}, "input.1.role"),
    ({"input": [{"role": "user", "content": 3}]}, "input.0.content"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input.0.content.0.text"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]}, "input.0.content.0"),
    ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]}, "input.0.content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]}, "input"),
    ({"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": {}}]}, "input.0.arguments"),
    ({"input": [{"type": "function_call_output", "call_id": 3, "output": "a"}]}, "input.0.call_id"),
    ({"input": [{"type": "reasoning", "content": "why"}]}, "input.0.content"),
    ({"input": "a b c " * 2000}, "input"),
    ({"tools": [{"type": "web_search"}]}, "tools"),
    ({"tools": [{"type": "function"}]}, "tools.0.name"),
    ({"tools": [{**TOOL, "description": "a" * 2**20}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "tools": [{"name": "f"}]}}, "tool_choice"),
    ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
    ({"include": ["message.input_image.image_url"]}, "include"),
    ({"include": ["the moon"]}, "include"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 5000}, "max_output_tokens"),
    ({"top_logprobs": 30}, "top_logprobs"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
    ({"metadata": {"a": "b" * 513}}, "metadata.a"),
    ({"previous_response_id": "resp_nothing"}, "previous_response_id"),
    ({"background": True}, "background"),
    ({"truncation": "auto"}, "truncation"),
]  # fmt: skip


@cases(("body", "param"), BAD, ids=str)
def test_bad_requests_get_one_sentence(client: Client, body: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        response = client.post(PATH, {"input": "hi", **body, "stream": stream})
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == param, error
        assert error["message"].endswith((".", "}."))
        assert "\n" not in error["message"]
        assert "max_tokens" not in error["message"]
        assert len(error["message"]) < 400


def test_an_engine_that_dies_fails_the_response(client: Client) -> None:
    client.engine.fail_after = 2
    events = client.typed_events(PATH, input="hi")
    assert EVENT.validate_python(events[-1]).type == "response.failed"
    response = events[-1]["response"]
    assert (response["status"], response["error"]["message"]) == ("failed", "The engine died.")
    assert events[-1]["sequence_number"] == len(events) - 1
    answer = client.post(PATH, {"input": "hi"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "The engine died.")
    client.engine.healthy = False
    assert client.post(PATH, {"input": "hi", "stream": True}).status_code == 503


def test_a_previous_response_is_continued(thinker: Client) -> None:
    thinker.served.chat_template = SHOWN
    first = respond(thinker, tools=[TOOL], instructions="first")
    results = [{"type": "function_call_output", "call_id": item["call_id"], "output": "done"} for item in first["output"][2:]]
    again = respond(thinker, input=results, previous_response_id=first["id"], tools=[TOOL], instructions="second")
    continued = prompt_of(thinker)
    respond(thinker, input=[{"role": "user", "content": "hi"}, *first["output"], *results], tools=[TOOL], instructions="second")
    assert continued == prompt_of(thinker)
    assert "second" in continued
    assert "first" not in continued
    kept = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
    respond(thinker, input=[{"role": "user", "content": "hi"}, *kept, *results], tools=[TOOL], instructions="second")
    assert continued == prompt_of(thinker)
    respond(thinker, input="And?", previous_response_id=again["id"])
    assert prompt_of(thinker).count('"role": "user"') == 2
    assert again["previous_response_id"] == first["id"]


def test_what_is_kept(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    first, hidden = respond(client), respond(client, store=False)
    assert client.get(f"{PATH}/{first['id']}").json() == first
    assert client.get(f"{PATH}/{hidden['id']}").status_code == 404
    assert client.get(f"{PATH}/{first['id']}?stream=true").status_code == 400
    cancelled = client.post(f"{PATH}/{first['id']}/cancel", {})
    assert (cancelled.status_code, cancelled.json()["error"]["param"]) == (400, "response_id")
    assert client.post(f"{PATH}/nothing/cancel", {}).status_code == 404
    assert client.request("DELETE", f"{PATH}/{first['id']}").json() == {
        "id": first["id"],
        "object": "response",
        "deleted": True,
    }
    assert client.request("DELETE", f"{PATH}/{first['id']}").status_code == 404
    monkeypatch.setattr(response_store, "MAX_ONE", 1000)
    assert client.get(f"{PATH}/{respond(client)['id']}").status_code == 404, "it is too large to be kept"


def test_the_oldest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_store, "MAX_BYTES", 5000)
    store = ResponseStore()
    for number in range(10):
        store.put(str(number), StoredResponse({"output": [{"id": f"item{number}"}]}, []), 1000)
    assert [number for number in range(10) if store.get(str(number))] == [5, 6, 7, 8, 9]
    assert [number for number in range(10) if store.item(f"item{number}")] == [5, 6, 7, 8, 9]
    store.delete("7")
    store.put("10", StoredResponse({"output": []}, []), 1000)
    assert store.get("5") is not None
    assert size_of({"a": ["b" * 1000] * 3}) > 3000
    assert size_of(["x" * response_store.MAX_ONE, *("y" * 10_000 for _ in range(10_000))]) < response_store.MAX_ONE + 20_000


def test_an_answer_without_anything_is_an_empty_text(make_client: Callable[..., Client]) -> None:
    client = make_client("<think>why</think>", reasoning_parser="qwen3")
    assert [item["type"] for item in respond(client)["output"]] == ["reasoning"]
    client = make_client("\n\n")
    assert respond(client)["output"][0]["content"][0]["text"] == "\n\n"


def test_a_forced_call_comes_before_a_format_of_text(client: Client) -> None:
    """As in OpenAI's APIs, and for the clients that always send both: the format says how a text looks, and there is none."""
    forced = {"tools": [TOOL], "tool_choice": {"type": "function", "name": "count"}}
    for more in ({}, {"text": {"format": {"type": "json_object"}}}):
        respond(client, **forced, **more)
    (_, alone, _), (_, both, _) = client.engine.calls
    assert both.structured == alone.structured is not None
    refused = client.post(PATH, {"input": "hi", **forced, "structured_outputs": {"regex": "a"}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tool_choice")


def test_a_large_body_is_translated_in_another_process(thinker: Client) -> None:
    first = respond(thinker, tools=[TOOL])
    kept = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
    for given in ("hi", [{"role": "user", "content": "hi"}, *kept]):
        prompts = []
        for more in ({}, {"unknown": "a" * 2**17}):
            respond(thinker, input=given, tools=[TOOL], instructions="be kind", **more)
            prompts.append(thinker.engine.calls[-1][:2])
        assert prompts[0] == prompts[1]
