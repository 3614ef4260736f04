"""The openai client against the real `octavo serve` on the demo model."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import anthropic
import httpx
import openai
import pydantic
import pytest
from server.processes import Server

from octavo.demo import MODEL_DIR

# one thread: threads that share busy cores with other tests wait for each other at every layer
FLAGS = ("--quantization", "ptpc_fp8", "--kv-cache-dtype", "fp8", "--threads", "1")
MODEL = "octavo-demo"
PROMPT = "def read(self"
LONG: dict[str, Any] = {"max_tokens": 900, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server(*FLAGS)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_start_shows_the_main_job_done(server: Server) -> None:
    log = "".join(server.log)
    assert PROMPT in log
    assert "curl http://localhost:" in log
    assert "ptpc_fp8" in log
    assert log.index(PROMPT) < log.index("Octavo is ready on http://127.0.0.1:")


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_completion_and_its_stream_agree(client: openai.OpenAI) -> None:
    how: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**how)
    assert whole.usage is not None
    chunks = list(client.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == len(chunks) - 1
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_ignore_eos_gives_exactly_that_many_chunks(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, prompt=[5, 6, 7], max_tokens=40, stream=True, extra_body={"ignore_eos": True}
    )
    assert len(list(stream)) == 40


def test_seed_n_and_prompts(client: openai.OpenAI) -> None:
    how: dict[str, Any] = {"model": MODEL, "prompt": [PROMPT, "import"], "n": 2, "max_tokens": 12, "seed": 7, "temperature": 1}
    first, second = client.completions.create(**how), client.completions.create(**how)
    assert [choice.text for choice in first.choices] == [choice.text for choice in second.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert first.choices[0].text != first.choices[1].text


def test_stop(client: openai.OpenAI) -> None:
    how: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    text = client.completions.create(**how).choices[0].text
    stop = text[len(text) // 2 :][:3]
    choice = client.completions.create(**how, stop=["never seen", stop]).choices[0]
    assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")
    assert choice.model_extra == {"stop_reason": stop}


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=4, temperature=0, logprobs=3, echo=True)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == answer.choices[0].text
    assert (logprobs.token_logprobs or [0])[0] is None
    for chosen, top in zip((logprobs.token_logprobs or [])[-4:], (logprobs.top_logprobs or [])[-4:], strict=True):
        assert chosen == max(top.values()) <= 0
        assert len(top) == 3
    message = [{"role": "user", "content": "hi"}]
    chat = client.chat.completions.create(model=MODEL, messages=message, max_tokens=3, logprobs=True, top_logprobs=2)  # type: ignore[arg-type]
    content = chat.choices[0].logprobs and chat.choices[0].logprobs.content
    assert content
    assert all(len(token.top_logprobs) == 2 for token in content)


def test_chat(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": PROMPT}]
    how: dict[str, Any] = {"model": MODEL, "messages": messages, "max_completion_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**how).choices[0]
    chunks = list(client.chat.completions.create(**how, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason


def test_json_schema(client: openai.OpenAI) -> None:
    properties = {"kind": {"enum": ["class", "def"]}, "lines": {"type": "integer", "minimum": 0, "maximum": 99}}
    schema = {"type": "object", "properties": properties, "required": ["kind", "lines"], "additionalProperties": False}
    form: Any = {"type": "json_schema", "json_schema": {"name": "what", "schema": schema, "strict": True}}
    messages: Any = [{"role": "user", "content": "describe it"}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, response_format=form, max_tokens=900)
    found = json.loads(answer.choices[0].message.content or "")
    assert found["kind"] in ("class", "def")
    assert 0 <= found["lines"] <= 99


def test_a_forced_tool_call(client: openai.OpenAI) -> None:
    parameters = {"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"], "additionalProperties": False}
    tools: Any = [{"type": "function", "function": {"name": "count", "parameters": parameters}}]
    messages: Any = [{"role": "user", "content": "count"}]
    how: dict[str, Any] = {"model": MODEL, "messages": messages, "tools": tools, "max_tokens": 300}
    for choice in ("required", {"type": "function", "function": {"name": "count"}}):
        message = client.chat.completions.create(**how, tool_choice=choice).choices[0].message
        assert message.tool_calls
        assert message.tool_calls[0].function.name == "count"
        assert isinstance(json.loads(message.tool_calls[0].function.arguments)["n"], bool)


COUNT: Any = {
    "name": "count",
    "parameters": {
        "type": "object",
        "properties": {"n": {"type": "boolean"}},
        "required": ["n"],
        "additionalProperties": False,
    },
}


class What(pydantic.BaseModel):
    """What a response is parsed as."""

    defined: bool
    lines: Literal[1, 2]


def test_a_response_and_its_stream_agree(client: openai.OpenAI) -> None:
    how: dict[str, Any] = {"model": MODEL, "input": PROMPT, "max_output_tokens": 16, "temperature": 0, "instructions": "go on"}
    whole = client.responses.create(**how)
    assert whole.usage is not None
    assert (whole.status, whole.usage.output_tokens) == ("incomplete", 16)
    events = list(client.responses.create(**how, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert (events[-1].type, events[-1].response.output_text) == ("response.incomplete", whole.output_text)
    with client.responses.stream(**{**how, "text_format": openai.NOT_GIVEN}) as stream:
        stream.until_done()
    again = client.responses.create(model=MODEL, input="go on", previous_response_id=whole.id, max_output_tokens=1)
    assert again.usage is not None
    assert again.usage.input_tokens > whole.usage.total_tokens - 4
    assert client.responses.retrieve(whole.id).output_text == whole.output_text
    client.responses.delete(whole.id)
    with pytest.raises(openai.NotFoundError, match="No response"):
        client.responses.retrieve(whole.id)


def test_responses_are_parsed_and_call_tools(client: openai.OpenAI, server: Server) -> None:
    parsed = client.responses.parse(model=MODEL, input="describe it", text_format=What, max_output_tokens=300)
    assert isinstance(parsed.output_parsed, What)
    how: dict[str, Any] = {"model": MODEL, "input": "count", "tools": [{"type": "function", **COUNT}], "max_output_tokens": 300}
    for choice in ("required", {"type": "function", "name": "count"}):
        (call,) = client.responses.create(**how, tool_choice=choice, parallel_tool_calls=False).output
        assert (call.type, call.name, type(json.loads(call.arguments)["n"])) == ("function_call", "count", bool)
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "two"}
        later = client.responses.create(
            model=MODEL, input=[{"role": "user", "content": "count"}, call, result], max_output_tokens=4
        )
        assert later.output_text

    async def ask() -> str:
        async with (
            openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as other,
            other.responses.stream(model=MODEL, input=PROMPT, max_output_tokens=4) as stream,
        ):
            return "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])

    assert asyncio.run(ask())


def test_anthropics_client(server: Server) -> None:
    message = {"role": "user", "content": PROMPT}
    how: Any = {"model": MODEL, "messages": [message], "max_tokens": 16, "system": "go on"}
    how["extra_body"] = {"temperature": 0}
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60) as client:
        whole = client.messages.create(**how)
        assert (whole.stop_reason, whole.usage.output_tokens) == ("max_tokens", 16)
        with client.messages.stream(**how) as stream:
            text = stream.get_final_text()
            assert text == whole.content[0].text  # type: ignore[union-attr]
            assert stream.get_final_message().stop_reason == "max_tokens"
        counted = client.messages.count_tokens(model=MODEL, messages=how["messages"], system="go on")
        assert counted.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
        stopped = client.messages.create(**{**how, "stop_sequences": [text[4:7]]})
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", text[4:7])
        tool: Any = {"name": "count", "input_schema": COUNT["parameters"]}
        how |= {"tools": [tool], "max_tokens": 300}
        for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "count"}):
            called = client.messages.create(**how, tool_choice=choice)
            (use,) = called.content
            assert (called.stop_reason, use.type) == ("tool_use", "tool_use")
            assert isinstance(use.input["n"], bool)  # type: ignore[union-attr, index]
            with client.messages.stream(**how, tool_choice=choice) as stream:
                assert isinstance(stream.get_final_message().content[0].input["n"], bool)  # type: ignore[union-attr, index]
        result: Any = {"type": "tool_result", "tool_use_id": use.id, "content": "two"}  # type: ignore[union-attr]
        turn = [message, {"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
        assert client.messages.create(**{**how, "messages": turn, "max_tokens": 4}).content
        for wrong, error in (({"model": "claude"}, anthropic.NotFoundError), ({"max_tokens": 0}, anthropic.BadRequestError)):
            with pytest.raises(error) as raised:
                client.messages.create(**{**how, **wrong})
            assert raised.value.body["type"] == "error"  # type: ignore[index]


def test_invocations(server: Server) -> None:
    for body, kind in (
        ({"messages": [{"role": "user", "content": "hi"}]}, "chat.completion"), ({"prompt": "a"}, "text_completion"),
    ):  # fmt: skip
        answer = httpx.post(f"{server.url}/invocations", json={**body, "max_tokens": 1}, timeout=60).json()
        assert answer["object"] == kind
        with httpx.stream("POST", f"{server.url}/invocations", json={**body, "max_tokens": 1, "stream": True}) as stream:
            assert list(stream.iter_lines())[-2] == "data: [DONE]"
    refused = httpx.post(f"{server.url}/invocations", json={"inputs": "a"})
    assert (refused.status_code, "needs messages" in refused.text) == (400, True)


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served"):
        client.completions.create(model="gpt-4", prompt="a")
    for wrong in ({"max_tokens": 10**9}, {"n": 10**6}, {"temperature": -3}, {"prompt": "x " * 5000}, {"prompt": [10**6]}):
        with pytest.raises(openai.BadRequestError) as error:
            client.completions.create(**{"model": MODEL, "prompt": "a", **wrong})
        assert error.value.type == "invalid_request_error"
    assert client.completions.create(model=MODEL, prompt="a", max_tokens=1).choices


def test_a_client_that_leaves_is_aborted(server: Server, client: openai.OpenAI) -> None:
    with client.completions.create(model=MODEL, prompt=PROMPT, stream=True, **LONG) as stream:
        for _ in range(3):
            next(iter(stream))
    deadline = time.monotonic() + 10
    aborted = f'finished_reason="abort",model_name="{MODEL}"}} 1.0'
    running = f'vllm:num_requests_running{{engine="0",model_name="{MODEL}"}} 0.0'
    while not all(line in (page := server.get("/metrics")[1]) for line in (aborted, running)):
        assert time.monotonic() < deadline, page
        time.sleep(0.05)


def test_octavo_chat(server: Server) -> None:
    for target in ([server.url], [server.url, "--complete"], [str(MODEL_DIR), "--complete", "--threads", "1"]):
        command = [sys.executable, "-m", "octavo.cli", "chat", "--max-tokens", "8", "--temperature", "0", *target]
        told = subprocess.run(command, input=PROMPT + "\n", capture_output=True, text=True, timeout=60)
        assert (told.returncode, "Error" in told.stderr) == (0, False), told.stderr
        assert told.stdout.startswith(PROMPT) == ("--complete" in target)


def test_an_occupied_port_and_a_wrong_path(server: Server, tmp_path: Path) -> None:
    for flags, sentence in (
        (["--host", "127.0.0.1", "--port", str(server.port)], f"octavo: Port {server.port} is in use; "),
        (["--port", "0", str(tmp_path / "nowhere")], "octavo: "),
        (["--port", "0", str(tmp_path)], "octavo: "),
    ):
        command = [sys.executable, "-m", "octavo.cli", "serve", *flags]
        told = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert told.returncode == 1
        assert told.stderr.splitlines()[-1].startswith(sentence), told.stderr
        assert "Traceback" not in told.stderr
    assert server.get("/health")[0] == 200


@pytest.mark.parametrize("everybody", [False, True])
def test_sigterm_while_streaming(everybody: bool) -> None:
    """systemd sends it to every process of a unit, and that of the server decides what it means."""
    server = Server(*FLAGS)
    try:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            stream = client.completions.create(model=MODEL, prompt=PROMPT, stream=True, **{**LONG, "max_tokens": 300})
            next(iter(stream))
            if everybody:
                os.kill(_engine_of(server), signal.SIGTERM)
                next(iter(stream))
            server.signal(signal.SIGTERM)
            assert list(stream)[-1].choices[0].finish_reason == "length"
            assert server.end() == 0
    finally:
        if server.process.poll() is None:
            server.stop()


def test_a_stopped_engine_turns_health_503() -> None:
    server = Server(*FLAGS, "--engine-timeout", "1")
    try:
        engine = _engine_of(server)
        os.kill(engine, signal.SIGSTOP)
        time.sleep(1.5)
        assert server.get("/health")[0] == 200, "an engine that has nothing to do owes no step"
        url = f"{server.url}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client, ThreadPoolExecutor() as pool:
            answer = pool.submit(client.completions.create, model=MODEL, prompt=[5], max_tokens=5)
            server.wait_for("and made no step; /health says 503", 10)
            status, body = server.get("/health")
            assert (status, json.loads(body)["error"]["code"]) == (503, "engine_stalled")
            os.kill(engine, signal.SIGCONT)
            assert answer.result(20).choices
        server.wait_for("the engine goes on", 5)
        assert server.get("/health")[0] == 200
    finally:
        server.stop()


def _engine_of(server: Server) -> int:
    """The id of the engine's process."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    engines = [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(engines) == 1
    return int(engines[0])


def test_a_killed_engine_ends_the_server() -> None:
    server = Server(*FLAGS)
    try:
        engine = _engine_of(server)
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            stream = client.completions.create(model=MODEL, prompt=PROMPT, stream=True, **LONG)
            next(iter(stream))
            os.kill(engine, signal.SIGKILL)
            with pytest.raises(openai.APIError, match="The engine process was killed"):
                list(stream)
        assert server.end(10) == 1, "a restart policy looks at the exit code"
    finally:
        server.stop()
    assert server.log[-1].startswith("octavo: The engine process was killed; ")
