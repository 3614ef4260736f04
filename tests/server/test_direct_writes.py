"""Events that are written directly are the bytes that `send` would have been given, and in the same order."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from cases import cases
from server.api_client import Client
from starlette.types import Message

from octavo.frontend.outputs import Delta
from octavo.server import chat, completions
from octavo.server.app import make_app
from octavo.server.events import WRITER, Chunk
from octavo.server.parsers import reasoning

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TEXT = ' é "quoted" \\ue000 \ue000 \\ \n tail and more'
CALL = 'well <tool_call>\n{"name": "f", "arguments": {"a": "b c d"}}\n</tool_call> then'
TOOLS = {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]}
USAGE = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
LAST_USAGE = {"stream_options": {"include_usage": True}}


class Recorder:
    """A Writer that keeps what is written, between what is sent. ready: whether it is each time it is asked."""

    def __init__(self, ready: Callable[[int], bool]):
        self.body: list[bytes] = []
        self.written: list[bytes] = []
        self.direct, self._asked, self._ready = 0, 0, ready

    @property
    def ready(self) -> bool:
        self._asked += 1
        return self._ready(self._asked)

    def write(self, body: bytes) -> None:
        self.written.append(body)
        self.direct += 1

    def flush(self) -> None:
        self.body += self.written
        self.written.clear()


def answer(client: Client, path: str, body: dict[str, Any], writer: Recorder | None) -> bytes:
    """What a stream's client gets."""
    sent, given = writer or Recorder(lambda _: False), json.dumps({**body, "stream": True}).encode()

    async def main() -> None:
        never, asked = asyncio.Event(), iter([{"type": "http.request", "body": given, "more_body": False}])

        async def receive() -> Message:
            if (message := next(asked, None)) is None:
                await never.wait()
            return message or {}

        async def send(message: Message) -> None:
            assert not sent.written, "what was written before must be flushed before"
            sent.body.append(message.get("body", b""))

        scope = {
            **{"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": ""},
            **{"headers": [(b"x-request-id", b'a"\\ue000"')], "http_version": "1.1", "scheme": "http", "client": None},
            **{"server": ("test", 80), "extensions": {} if writer is None else {WRITER: writer}},
        }
        await make_app(client.served)(scope, receive, send)

    asyncio.run(main())
    return b"".join(sent.body)


PLAIN = {"text": TEXT}
THINKS = {"text": "some thought</think> and an answer", "reasoning_parser": "deepseek_r1"}
CALLS = {"text": CALL, "tool_parser": "hermes"}
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a completion": (COMPLETIONS, PLAIN, {}),
    "two completions": (COMPLETIONS, PLAIN, {"n": 2, **LAST_USAGE}),
    "a completion's log-probabilities": (COMPLETIONS, PLAIN, {"logprobs": 2}),
    "a completion's usage": (COMPLETIONS, PLAIN, USAGE),
    "a completion's token ids": (COMPLETIONS, PLAIN, {"return_token_ids": True, "prompt_logprobs": 1}),
    "a prompt's echo": (COMPLETIONS, PLAIN, {"echo": True, "n": 2}),
    "a stop string": (COMPLETIONS, PLAIN, {"stop": ["tail"]}),
    "a chat": (CHAT, PLAIN, {}),
    "two answers": (CHAT, PLAIN, {"n": 2, **LAST_USAGE}),
    "a chat's log-probabilities": (CHAT, PLAIN, {"logprobs": True, "top_logprobs": 1}),
    "a chat's usage": (CHAT, PLAIN, USAGE),
    "a chat's token ids": (CHAT, PLAIN, {"return_token_ids": True}),
    "thinking": (CHAT, THINKS, USAGE),
    "thinking, twice": (CHAT, THINKS, {"n": 2}),
    "thinking that is left out": (CHAT, THINKS, {"include_reasoning": False}),
    "a call": (CHAT, CALLS, TOOLS),
    "several prompts": (COMPLETIONS, PLAIN, {"prompt": ["a", "b"]}),
}


@cases("kind", KINDS)
def test_bytes_are_the_same(make_client: Callable[..., Client], monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    path, how, body = KINDS[kind]
    for module in (chat, completions):
        monkeypatch.setattr(module.time, "time", lambda: 7.0)
    monkeypatch.setattr(reasoning, "_call_id", lambda name, place: f"{name}{place}")
    start: dict[str, Any] = {"prompt": "def f"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "hi"}]}

    def told(writer: Recorder | None) -> bytes:
        return answer(make_client(**how), path, {**start, "max_tokens": 100, **body}, writer)

    expected = told(None)
    assert expected.endswith(b"data: [DONE]\n\n")
    assert b'"error"' not in expected
    for ready in (lambda _: True, lambda asked: asked % 3 > 0):
        writer = Recorder(ready)
        assert told(writer) == expected
        assert writer.direct > 3


def test_most_chunks_pass_no_generator(make_client: Callable[..., Client], monkeypatch: pytest.MonkeyPatch) -> None:
    """The metrics count them all the same."""
    client, read, before = make_client(TEXT), [], completions._Job._chunk

    def chunk(job: Any, number: int, delta: Delta) -> Chunk:
        read.append(delta)
        return before(job, number, delta)

    monkeypatch.setattr(completions._Job, "_chunk", chunk)
    told = answer(client, COMPLETIONS, {"prompt": "def f"} | {"max_tokens": 100}, Recorder(lambda _: True))
    tokens = told.count(b"data: {")
    assert tokens > 10
    assert len(read) == 3, "the first, the last, and the example of the rest"
    counted = asyncio.run(client.served.metrics.text()).decode()
    assert f'vllm:generation_tokens_total{{engine="0",model_name="demo"}} {tokens}.0' in counted
