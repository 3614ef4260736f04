"""Tools on chat templates that do not print them: the model sees them all the same, and how to call them."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from cases import cases
from server.api_client import Client
from server.processes import Server

from octavo.demo import MODEL_DIR
from octavo.errors import InvalidRequest
from octavo.frontend.llm import LLM
from octavo.messages import SamplingParams
from octavo.server.parsers.argument_types import ArgumentTypes
from octavo.server.parsers.call import ToolCall
from octavo.server.parsers.registry import call_form, make_parser
from octavo.server.parsers.token_calls import TOKEN_FORMS
from octavo.server.parsers.tools import PARSERS
from octavo.server.parsers.xml_forms import FORMS
from octavo.text.chat_prompt import render_conversation
from octavo.text.tokenizer import Tokenizer
from octavo.text.tool_prompt import PLAIN_CALLS, shows_tools

USER = {"role": "user", "content": "How warm is it in Zürich?"}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "a city"}}, "required": ["city"]}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "description": f"{name} of a city", "parameters": PARAMETERS}}
    for name in ("temperature", "wind")
]
LISTED = "\n".join(json.dumps(tool) for tool in TOOLS)
DEMO = Tokenizer(MODEL_DIR)
CHATML = DEMO.chat_template or ""
BODY = "<{{ m.role }}>{{ m.content }}"
LOOP = "{% for m in messages %}BODY{% endfor %}"
NO_SYSTEM = LOOP.replace("BODY", "{% if m.role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}" + BODY)
SYSTEM_LEFT_OUT = LOOP.replace("BODY", "{% if m.role != 'system' %}" + BODY + "{% endif %}")
PARTS = LOOP.replace("BODY", "<{{ m.role }}>{% for p in m.content %}{{ p.text | trim }}{% endfor %}")
LAST_ALONE = "{{ messages[-1].content[:5] }}"
SHOWN = {
    "a list": "{{ tools }}" + LOOP.replace("BODY", BODY),
    "a loop": "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + LOOP.replace("BODY", BODY),
    "names": "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}",
    "beside a system message": "{% if messages[0].role == 'system' %}{{ messages[0].content }}{{ tools }}{% endif %}",
    "to messages of its own": "{% if messages | length < 3 %}{{ raise_exception('more') }}{% endif %}{{ tools }}",
    "after bos": "{{ bos_token + 'x' }}{{ tools }}",
}
HIDDEN = {
    "never": CHATML,
    "a question": "{% if tools %}x{% endif %}" + LOOP.replace("BODY", BODY),
    "another name": "{{ functions }}" + LOOP.replace("BODY", BODY),
}


@cases("template", SHOWN.values(), ids=SHOWN)
def test_a_template_that_prints_tools_is_left_alone(template: str) -> None:
    assert shows_tools(template)
    messages = [{"role": "system", "content": "s"}, USER, {"role": "assistant", "content": "a"}, USER]
    assert "You can call" not in render_conversation(template, messages, {"bos_token": ""}, TOOLS)


def render(template: str, *messages: Any, **how: Any) -> str:
    return render_conversation(template, messages, {}, TOOLS, **how)


@pytest.mark.parametrize("template", HIDDEN.values(), ids=HIDDEN)
def test_a_template_that_prints_none_is_found_out(template: str) -> None:
    assert not shows_tools(template)
    assert LISTED in render(template, USER)
    assert render_conversation(template, [USER], {}) == render_conversation(template, [USER], {}, []), "no tools, no words"


@pytest.mark.parametrize("template", [CHATML, LOOP.replace("BODY", BODY), PARTS])
def test_they_are_in_the_system_message(template: str) -> None:
    alone = render(template, USER)
    assert alone.index("system") < alone.index(LISTED) < alone.index(USER["content"])
    after = render(template, {"role": "developer", "content": "Be brief."}, USER)
    assert after.count("system") == 1
    assert after.index("Be brief.") < after.index(LISTED) < after.index(USER["content"])
    assert "Be brief.\n\n" in after or template is PARTS


@pytest.mark.parametrize("template", [NO_SYSTEM, SYSTEM_LEFT_OUT])
@pytest.mark.parametrize("content", [USER["content"], [{"type": "text", "text": USER["content"]}]])
def test_they_are_the_user_s_where_no_system_message_is_printed(template: str, content: Any) -> None:
    text = render(template, {"role": "user", "content": content}, {"role": "assistant", "content": "a"})
    assert text.startswith("<user>You can call these functions:\n" + LISTED)
    assert text.index(LISTED) < text.index(USER["content"])


def test_what_cannot_be_shown_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="prints no tools, and no message that they could stand in; leave tools out"):
        render(LAST_ALONE, USER)
    with pytest.raises(InvalidRequest, match="no system messages"):  # the template's own reason
        render(NO_SYSTEM, {"role": "system", "content": "s"}, USER)


def test_a_message_goes_on_after_tools() -> None:
    text = render(CHATML, USER, {"role": "assistant", "content": '{"na'}, continue_final_message=True)
    assert LISTED in text
    assert text.endswith('<|im_start|>assistant\n{"na')


CALLS = [("temperature", {"city": "Zürich"}), ("wind", {"city": 'a "b"'})]


def test_deepseek_v31_is_told_in_the_words_of_its_card() -> None:
    """https://huggingface.co/deepseek-ai/DeepSeek-V3.1, ToolCall: behind the system message and a blank line."""
    parameters = json.dumps(PARAMETERS)
    told = (
        "## Tools\nYou have access to the following tools:\n\n"
        f"### temperature\nDescription: temperature of a city\n\nParameters: {parameters}\n\n"
        f"### wind\nDescription: wind of a city\n\nParameters: {parameters}\n\n"
        "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name"
        "<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>{{additional_tool_calls}}<｜tool▁calls▁end｜>\n\nWhere:\n\n"
        "- `tool_call_name` must be an exact match to one of the available tools\n"
        "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
        "- For multiple tool calls, chain them directly without separators or spaces"
    )
    system = {"role": "system", "content": "Be brief."}
    form = call_form("deepseek_v31")
    assert render(LOOP.replace("BODY", BODY), system, USER, calls=form) == f"<system>Be brief.\n\n{told}<user>{USER['content']}"
    named = render(LOOP.replace("BODY", BODY), USER, calls=replace(form, named="wind"))
    assert "Call wind now" in named


@cases("name", [*PARSERS, *FORMS, *TOKEN_FORMS])
def test_calls_are_told_as_they_are_read(name: str) -> None:
    parser = make_parser(name, ArgumentTypes({}))
    parts = parser.feed(call_form(name).spell(CALLS)) + parser.finish()
    assert [part for part in parts if isinstance(part, str) and part.strip()] == []
    calls = [part for part in parts if isinstance(part, ToolCall)]
    assert [(call.name, json.loads(call.arguments)) for call in calls] == CALLS


def test_calls_of_earlier_turns_are_seen() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "wind", "arguments": '{"city": "Zürich"}'}}
    turns = [USER, {"role": "assistant", "content": "Well.", "tool_calls": [call]}, {"role": "tool", "content": "calm"}]
    spelled = 'assistant\nWell.\n{"name": "wind", "parameters": {"city": "Zürich"}}<|im_end|>\n<|im_start|>tool\ncalm'
    assert spelled in render(CHATML, *turns)
    assert spelled in render_conversation(CHATML, turns, {}), "without tools too"
    told = {"role": "assistant", "content": None, "tool_calls": [call, call]}
    assert "assistant\n" + PARSERS["hermes"].call_form.spell([("wind", {"city": "Zürich"})] * 2) + "<|im_end|>" in render(
        CHATML, USER, told, calls=PARSERS["hermes"].call_form
    )
    reads = LOOP.replace("BODY", "{{ m.content }}{% for c in m['tool_calls'] %}[{{ c.function.name }}]{% endfor %}")
    assert render_conversation(reads, turns, {}) == USER["content"] + "Well.[wind]calm"


CHOICES: list[tuple[Any, str]] = [
    ("auto", PARSERS["llama3_json"].call_form.spell([("<name of the function>", {"<name of an argument>": "<value>"})])),
    (None, PARSERS["llama3_json"].call_form.spell([("<name of the function>", {"<name of an argument>": "<value>"})])),
    ("required", PARSERS["json"].call_form.spell([("<name of the function>", {"<name of an argument>": "<value>"})])),
    ({"type": "function", "function": {"name": "wind"}}, "Call wind now: answer with its arguments alone, as a JSON object."),
    ("none", ""),
]


@cases(("choice", "told"), CHOICES, ids=str)
@cases("stream", [False, True])
def test_the_server_s_model_sees_them(make_client: Callable[..., Client], choice: Any, told: str, stream: bool) -> None:
    client = make_client('[{"name": "wind", "parameters": {"city": "x"}}]')
    body = {"messages": [USER], "tools": TOOLS, "tool_choice": choice, "stream": stream}
    assert client.post("/v1/chat/completions", body).status_code == 200
    prompt = DEMO.decode(client.engine.calls[0][0], skip_special_tokens=False)
    assert (LISTED in prompt) == (choice != "none")
    assert told in prompt
    assert prompt.endswith("<|im_start|>assistant\n")


def test_tokenize_counts_them(make_client: Callable[..., Client]) -> None:
    client = make_client()
    counted = client.post("/tokenize", {"messages": [USER], "tools": TOOLS}).json()["tokens"]
    client.chat(messages=[USER], tools=TOOLS)
    assert counted == client.engine.calls[0][0]


def test_a_template_that_prints_tools_says_nothing_at_start(make_client: Callable[..., Client]) -> None:
    assert asyncio.run(make_client(template=SHOWN["a loop"]).served.tools_note()) is None
    note = asyncio.run(make_client().served.tools_note())
    assert note is not None
    assert "the chat template does not print tools" in note


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server("--threads", "1", "--cpu-kv-cache-gib", "0.05")
    yield server
    server.stop()


def test_a_real_server_says_it_at_start(server: Server) -> None:
    log = "".join(server.log)
    told = "octavo: the chat template does not print tools: a request's are put into its system message"
    assert told in log
    assert "--tool-call-parser llama3_json" in log
    assert log.index(told) < log.index("Octavo is ready")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "wind"}}, "auto"], ids=str)
def test_a_real_answer_and_its_stream(server: Server, choice: Any) -> None:
    """The prompt is longer by what was told, whole and streamed alike, and a forced call is a call."""
    body: dict[str, Any] = {
        "messages": [USER], "tools": TOOLS, "tool_choice": choice, "max_tokens": 200, "temperature": 0,
        "return_prompt_text": True,
    }  # fmt: skip
    url = f"{server.url}/v1/chat/completions"
    whole = httpx.post(url, json=body, timeout=60).json()
    assert LISTED in whole["prompt_text"]
    assert whole["usage"]["prompt_tokens"] == len(DEMO.encode(whole["prompt_text"], add_special_tokens=False))
    events = httpx.post(url, json={**body, "stream": True}, timeout=60).text.split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
    assert chunks[0]["prompt_text"] == whole["prompt_text"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == (whole["choices"][0]["message"]["content"] or "")
    if choice != "auto":
        calls = whole["choices"][0]["message"]["tool_calls"]
        assert calls
        assert {call["function"]["name"] for call in calls} <= {"temperature", "wind"}
        streamed = [call for delta in deltas for call in delta.get("tool_calls", ())]
        assert "".join(call["function"]["arguments"] for call in streamed) == "".join(
            call["function"]["arguments"] for call in calls
        )


def test_llm_chat_shows_them(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    llm = LLM(MODEL_DIR, cpu_kv_cache_gib=0.05, threads=1)
    params = SamplingParams(max_tokens=2, temperature=0)
    with caplog.at_level(logging.WARNING, "octavo"):
        prompt = llm.chat([USER], params, tools=TOOLS, use_tqdm=False)[0].prompt
    assert prompt == render_conversation(CHATML, [USER], DEMO.special_tokens, TOOLS)
    assert LISTED in prompt
    assert PLAIN_CALLS.spell([("<name of the function>", {"<name of an argument>": "<value>"})]) in prompt
    assert "does not print tools" in caplog.text
    shown = llm.chat([USER], params, tools=TOOLS, chat_template=SHOWN["a loop"], use_tqdm=False)[0].prompt
    assert shown is not None
    assert "You can call" not in shown
