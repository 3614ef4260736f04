"""Every known field of a request is served, refused in a sentence, or harmless: none is ignored by oversight."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from anthropic.types import message_count_tokens_params as anthropic_count
from anthropic.types import message_create_params as anthropic_messages
from anthropic.types import output_config_param, thinking_config_enabled_param
from cases import cases
from openai.types import completion_create_params as openai_completions
from openai.types.chat import completion_create_params as openai_chat
from openai.types.responses import response_create_params as openai_responses
from openai.types.responses import response_includable, response_text_config_param
from openai.types.shared_params import reasoning as openai_reasoning
from server.api_client import Client, ok

from octavo.server.anthropic.message_fields import BLOCK_FATES, MESSAGES, OUTPUT_CONFIG, THINKING
from octavo.server.anthropic.message_request import MessagesRequest, OutputConfig, Thinking
from octavo.server.protocol import ChatRequest, CompletionRequest, StructuredOutputs
from octavo.server.request_fields import CHAT, COMPLETION, SERVED, STRUCTURED_OUTPUTS, Fate, Harmless, Refused
from octavo.server.responses.response_fields import INCLUDE, REASONING, RESPONSES, TEXT
from octavo.server.responses.response_request import Reasoning, ResponsesRequest, Text

# The fields of vLLM's requests, of its main branch and of the releases that had guided_* fields.
VLLM_BOTH = """model frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream stream_options
temperature top_p user use_beam_search best_of top_k min_p repetition_penalty watermarking length_penalty stop_token_ids
include_stop_str_in_output ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens
truncation_side prompt_logprobs logprob_token_ids allowed_token_ids bad_words echo add_special_tokens response_format
structured_outputs priority request_id session_id return_tokens_as_token_ids return_token_ids routed_experts_prompt_start
return_token_offsets return_mm_kwargs cache_salt kv_transfer_params ec_transfer_params vllm_xargs repetition_detection
thinking_token_budget stream_interval guided_json guided_regex guided_choice guided_grammar structural_tag
guided_decoding_backend guided_whitespace_pattern logits_processors"""
VLLM_CHAT = """messages top_logprobs max_completion_tokens tools tool_choice reasoning_effort include_reasoning
parallel_tool_calls add_generation_prompt continue_final_message documents chat_template chat_template_kwargs
media_io_kwargs mm_processor_kwargs return_prompt_text"""
VLLM_COMPLETION = "prompt suffix prompt_embeds"
VLLM_STRUCTURED = """json regex choice grammar json_object disable_fallback disable_any_whitespace disable_additional_properties
whitespace_pattern structural_tag"""
VLLM_RESPONSES = """background include input instructions max_output_tokens max_tool_calls metadata model logit_bias
parallel_tool_calls previous_response_id prompt reasoning service_tier store stream temperature text tool_choice tools
top_logprobs top_p top_k truncation user skip_special_tokens include_stop_str_in_output prompt_cache_key request_id
media_io_kwargs mm_processor_kwargs priority cache_salt kv_transfer_params enable_response_messages chat_template_kwargs
previous_input_messages structured_outputs repetition_penalty seed stop ignore_eos vllm_xargs"""
VLLM_MESSAGES = """model messages max_tokens metadata output_config stop_sequences stream system temperature tool_choice tools
top_k top_p kv_transfer_params chat_template_kwargs"""
COMPLETIONS_PATH, CHAT_PATH, RESPONSES_PATH = "/v1/completions", "/v1/chat/completions", "/v1/responses"
MESSAGES_PATH = "/v1/messages"
USER = {"role": "user", "content": "hi"}
# path -> its fields, the least that a request has, and the fields of its objects
APIS: dict[str, tuple[dict[str, Fate], dict[str, Any], dict[str, dict[str, Fate]]]] = {
    COMPLETIONS_PATH: (COMPLETION, {"prompt": "def f"}, {"structured_outputs": STRUCTURED_OUTPUTS}),
    CHAT_PATH: (CHAT, {"messages": [USER]}, {"structured_outputs": STRUCTURED_OUTPUTS}),
    RESPONSES_PATH: (RESPONSES, {"input": "hi"}, {"text": TEXT, "reasoning": REASONING}),
    MESSAGES_PATH: (
        MESSAGES,
        {"messages": [USER], "max_tokens": 9},
        {"output_config": OUTPUT_CONFIG, "thinking": THINKING},
    ),
}


def field_names(model: Any) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


@pytest.mark.parametrize(
    ("table", "model"),
    [
        *((COMPLETION, CompletionRequest), (CHAT, ChatRequest), (STRUCTURED_OUTPUTS, StructuredOutputs)),
        *((RESPONSES, ResponsesRequest), (TEXT, Text), (REASONING, Reasoning)),
        *((MESSAGES, MessagesRequest), (OUTPUT_CONFIG, OutputConfig), (THINKING, Thinking)),
    ],
)
def test_what_is_served_is_what_the_models_have(table: dict[str, Fate], model: Any) -> None:
    assert {name for name, fate in table.items() if fate is SERVED} == field_names(model)


def test_every_field_of_the_peers_is_known() -> None:
    both = set(VLLM_BOTH.split())
    assert both | set(VLLM_COMPLETION.split()) <= set(COMPLETION)
    assert both | set(VLLM_CHAT.split()) <= set(CHAT)
    assert set(VLLM_STRUCTURED.split()) <= set(STRUCTURED_OUTPUTS)
    assert set(openai_completions.CompletionCreateParamsBase.__annotations__) <= set(COMPLETION)
    assert set(openai_chat.CompletionCreateParamsBase.__annotations__) <= set(CHAT)
    assert set(VLLM_RESPONSES.split()) <= set(RESPONSES)
    assert set(openai_responses.ResponseCreateParamsBase.__annotations__) <= set(RESPONSES)
    assert set(response_text_config_param.ResponseTextConfigParam.__annotations__) <= set(TEXT)
    assert set(openai_reasoning.Reasoning.__annotations__) <= set(REASONING)
    assert set(response_includable.ResponseIncludable.__args__) <= set(INCLUDE)  # type: ignore[attr-defined]
    assert set(VLLM_MESSAGES.split()) <= set(MESSAGES)
    assert set(anthropic_messages.MessageCreateParamsBase.__annotations__) <= set(MESSAGES)
    assert set(anthropic_count.MessageCountTokensParams.__annotations__) <= set(MESSAGES)
    assert set(output_config_param.OutputConfigParam.__annotations__) <= set(OUTPUT_CONFIG)
    assert set(thinking_config_enabled_param.ThinkingConfigEnabledParam.__annotations__) <= set(THINKING)


REFUSED = [
    (path, where, name, fate)
    for path, (table, _, objects) in APIS.items()
    for where, fates in [("", table), *objects.items()]
    for name, fate in fates.items()
    if isinstance(fate, Refused)
]


def ask(client: Client, path: str, fields: dict[str, Any]) -> Any:
    return client.post(path, {**APIS[path][1], **fields})


@cases(("path", "where", "name", "fate"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_not_served_is_refused_in_its_sentence(client: Client, path: str, where: str, name: str, fate: Refused) -> None:
    for value in ("something", 7, [3], {"a": 1}, ["text", "audio"], True):
        fields: dict[str, Any] = {name: value}
        response = ask(client, path, {where: fields} if where else fields)
        assert response.status_code == 400
        error = {"message": fate.sentence, "type": "invalid_request_error"}
        more = {} if path == MESSAGES_PATH else {"param": f"{where}.{name}".lstrip("."), "code": None}
        assert response.json()["error"] == {**error, **more}
    assert re.fullmatch(r"[^\n]+\.", fate.sentence)
    for idle in (None, *fate.unless):
        fields = {name: idle}
        assert ask(client, path, {where: fields} if where else fields).status_code == 200, idle


@pytest.mark.parametrize("path", APIS)
def test_what_is_harmless_changes_nothing(client: Client, path: str) -> None:
    table, _, objects = APIS[path]
    harmless: dict[str, Any] = {name: "anything" for name, fate in table.items() if isinstance(fate, Harmless)}
    own = {
        where: {name: True for name, fate in fates.items() if isinstance(fate, Harmless)} for where, fates in objects.items()
    }
    for where, fields in own.items():
        harmless |= {where: {**fields, "type": "adaptive"} if where == "thinking" else fields}
    if path == RESPONSES_PATH:
        harmless["include"] = [name for name, fate in INCLUDE.items() if isinstance(fate, Harmless)]
    assert ask(client, path, harmless).status_code == 200
    assert ask(client, path, {"thinking": {"type": "adaptive"}} if "thinking" in harmless else {}).status_code == 200
    (with_them, params, _), (without, plain, _) = client.engine.calls
    assert (with_them, params) == (without, plain)


def test_what_is_harmless_in_a_block_changes_nothing(client: Client) -> None:
    client.served.chat_template = "{{ messages | tojson }}"
    for more in (dict.fromkeys(BLOCK_FATES, True), {}):
        used = {"type": "tool_use", "id": "a", "name": "f", "input": {}, **more}
        thought = {"type": "thinking", "thinking": "why", **more}
        found = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "x", **more}], **more}
        turn = [USER, {"role": "assistant", "content": [thought, used]}, {"role": "user", "content": [found]}]
        ok(ask(client, MESSAGES_PATH, {"messages": turn}))
    assert client.engine.calls[0][0] == client.engine.calls[1][0]


def test_best_of_may_be_n(client: Client) -> None:
    assert ask(client, COMPLETIONS_PATH, {"best_of": 1}).status_code == 200
    assert ask(client, COMPLETIONS_PATH, {"best_of": 2, "n": 2}).status_code == 200


def test_the_page_of_fields_is_this_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "request-fields.md").read_text(encoding="utf-8")
    tables = [block.strip().splitlines()[2:] for block in page.split("\n\n") if block.startswith("| field")]
    assert tables == [rows(), rows_of(RESPONSES_PATH), rows_of(MESSAGES_PATH)]


def rows_of(path: str) -> list[str]:
    """The rows of one of the other APIs."""
    table, _, objects = APIS[path]
    more: list[tuple[str, Mapping[str, Fate]]] = [(f"{where}.", fates) for where, fates in objects.items()]
    more += [("include: ", INCLUDE)] if path == RESPONSES_PATH else [("messages.content.", BLOCK_FATES)]
    found = [f"| `{name}` | {told(table[name])} |" for name in sorted(table)]
    return [*found, *(f"| `{where}{name}` | {told(fate)} |" for where, fates in more for name, fate in fates.items())]


def rows() -> list[str]:
    """The rows of the first table of docs/request-fields.md."""
    found = []
    for name in sorted({**COMPLETION, **CHAT}):
        fates = {"completions": COMPLETION.get(name), "chat": CHAT.get(name)}
        if fates["completions"] == fates["chat"]:
            fates = {"both": COMPLETION[name]}
        found += [f"| `{name}` | {where} | {told(fate)} |" for where, fate in fates.items() if fate is not None]
    return [*found, *(f"| `structured_outputs.{name}` | both | {told(fate)} |" for name, fate in STRUCTURED_OUTPUTS.items())]


def told(fate: Fate) -> str:
    if isinstance(fate, Refused):
        return f"refused: {fate.sentence}"
    return f"harmless: {fate.why}" if isinstance(fate, Harmless) else "served"


def test_token_ids(client: Client) -> None:
    engine = client.engine
    written = engine.tokenizer.encode(engine.text)
    answer = client.complete(prompt=[5, 6], return_token_ids=True)
    assert answer["choices"][0]["prompt_token_ids"] == [5, 6]
    assert answer["choices"][0]["token_ids"] == written
    pieces = [event["choices"][0] for event in client.events(COMPLETIONS_PATH, prompt=[5, 6], return_token_ids=True)]
    assert [piece.get("prompt_token_ids") for piece in pieces] == [[5, 6], *[None] * (len(pieces) - 1)]
    assert [token for piece in pieces for token in piece["token_ids"]] == written
    answer = client.chat(return_token_ids=True, n=2)
    assert answer["prompt_token_ids"] == engine.calls[-1][0]
    assert [choice["token_ids"] for choice in answer["choices"]] == [written, written]
    events = client.events(CHAT_PATH, return_token_ids=True)
    assert [event.get("prompt_token_ids") for event in events] == [engine.calls[-1][0], *[None] * (len(events) - 1)]
    assert [token for event in events for token in event["choices"][0].get("token_ids", [])] == written
    assert "token_ids" not in client.complete()["choices"][0]


def test_tokens_as_token_ids(client: Client) -> None:
    asked: dict[str, Any] = {"return_tokens_as_token_ids": True}
    names = [f"token_id:{token}" for token in client.engine.tokenizer.encode(client.engine.text)]
    assert client.complete(logprobs=0, **asked)["choices"][0]["logprobs"]["tokens"] == names
    content = client.chat(logprobs=True, **asked)["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == names


def test_what_reaches_the_engine(client: Client) -> None:
    client.complete(bad_words=["size"], allowed_token_ids=[70, 70, 71], cache_salt="mine", request_id="my-id")
    _, params, request_id = client.engine.calls[-1]
    assert (params.bad_words, params.allowed_token_ids) == (("size",), (70, 71))
    assert request_id.startswith("cmpl-my-id")
    request = client.engine.requests[-1]
    assert request.cache_salt == "mine"
    encode = client.engine.tokenizer.encode
    assert set(request.bad_words) == {tuple(encode("size")), tuple(encode(" size"))}


@cases(
    "fields",
    [{"bad_words": [""]}, {"bad_words": "size"}, {"bad_words": ["a"] * 1025}, {"allowed_token_ids": []},
     {"allowed_token_ids": [4096]}, {"allowed_token_ids": [-1]}, {"cache_salt": ""}, {"cache_salt": 3}, {"request_id": "\n"}],
    ids=str,
)  # fmt: skip
def test_wrong_values(client: Client, fields: dict[str, Any]) -> None:
    for path in (COMPLETIONS_PATH, CHAT_PATH):
        response = ask(client, path, fields)
        assert response.status_code == 400
        assert response.json()["error"]["param"].split(".")[0] == next(iter(fields))


def test_reasoning_fields(make_client: Any) -> None:
    client = make_client("<think>why</think>because", reasoning_parser="qwen3")
    assert client.chat(include_reasoning=False)["choices"][0]["message"].keys() == {"role", "content"}
    answer = client.chat()
    message = answer["choices"][0]["message"]
    assert (message["reasoning"], message["reasoning_content"], message["content"]) == ("why", "why", "because")
    thought = client.engine.tokenizer.encode("why", add_special_tokens=False)
    assert abs(answer["usage"]["completion_tokens_details"]["reasoning_tokens"] - len(thought)) <= len("<think></think>")
    deltas = [event["choices"][0]["delta"] for event in client.events(CHAT_PATH)]
    for name in ("reasoning", "reasoning_content"):
        assert "".join(delta.get(name, "") for delta in deltas) == "why"
    client.served.chat_template = "{{ messages[1].reasoning }} {{ messages[1].reasoning_content }}"
    for name in ("reasoning", "reasoning_content"):
        history = [USER, {"role": "assistant", "content": "a", name: "since"}]
        assert client.chat(messages=history, return_prompt_text=True)["prompt_text"] == "since since"
    client.served.chat_template = "{{ reasoning_effort }} {{ enable_thinking }} {{ thinking }}"
    assert client.chat(reasoning_effort="high", return_prompt_text=True)["prompt_text"] == "high True True"
    answer = client.chat(reasoning_effort="none", chat_template_kwargs={"enable_thinking": 3}, return_prompt_text=True)
    assert answer["prompt_text"] == "none 3 "
