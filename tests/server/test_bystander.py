"""While one client sends what is huge, another's next token is not late: with a real server process over the fake engine."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from cases import cases
from server.processes import Server, slowness

CEILING = 2.0  # seconds where nothing else runs; the longest wait is then some tens of milliseconds
WORDS = " ".join(f"w{i}x" for i in range(600_000))
USER = {"role": "user", "content": "hi"}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HUGE: dict[str, tuple[str, dict[str, Any] | str]] = {
    "a prompt": (COMPLETIONS, {"prompt": WORDS}),
    "a prompt of 30 MB": (COMPLETIONS, {"prompt": "word " * 6_000_000}),
    "many prompts": (COMPLETIONS, {"prompt": ["word " * 2000] * 200, "max_tokens": 1}),
    "a chat": (CHAT, {"messages": [{"role": "user", "content": WORDS}]}),
    "tokenize": ("/tokenize", {"prompt": WORDS}),
    "many tokens": ("/tokenize", {"prompt": WORDS[:131_072], "return_token_strs": True}),
    "detokenize": ("/detokenize", {"tokens": [5] * 5_000_000}),
    "many ids": (COMPLETIONS, {"prompt": [5] * 1_000_000}),
    "sequences": (COMPLETIONS, {"prompt": ["a"] * 2000, "n": 128}),
    "an ignored field": (COMPLETIONS, '{"prompt": "a", "user": [' + "[]," * 10_000_000 + "1]}"),
    "deep lists": (COMPLETIONS, '{"prompt": "a", "user": [' + "[[[[[]]]]]," * 1_000_000 + "1]}"),
    "keys": (COMPLETIONS, "{" + ",".join(f'"{i}":0' for i in range(1_000_000)) + "}"),
    "a long key": (COMPLETIONS, {"prompt": "a", "b" * 30_000_000: 1}),
    "messages": (CHAT, {"messages": [USER] * 50_000}),
    "parts": (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 50_000}]}),
    "tools": (CHAT, {"messages": [USER], "tools": [{"function": {"name": "a"}}] * 4096}),
    "faults": (CHAT, {"messages": [USER], "tools": [{}] * 20_000}),
}


class Bystander:
    """Streams answers, one after another. `waits` are the seconds before each token."""

    def __init__(self, server: Server) -> None:
        self.server, self.waits, self.ends = server, list[tuple[float, float]](), False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self.ends:
            connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
            body = json.dumps({"prompt": "a", "max_tokens": 900, "stream": True})
            connection.request("POST", COMPLETIONS, body, {"Content-Type": "application/json"})
            response, last = connection.getresponse(), time.perf_counter()
            while not self.ends and (line := response.readline()):
                if line.startswith(b"data:"):
                    now = time.perf_counter()
                    self.waits.append((now, now - last))
                    last = now
            connection.close()

    def worst(self, since: float) -> float:
        """The longest wait since then; there must have been tokens."""
        return max(wait for when, wait in [*self.waits] if when >= since)

    def stop(self) -> None:
        self.ends = True
        self._thread.join()


@pytest.fixture(scope="module")
def bystander() -> Iterator[Bystander]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_WORDS", "900")
        patch.setenv("FAKE_DELAY", "0.002")
        server = Server(fake=True)
    bystander = Bystander(server)
    yield bystander
    bystander.stop()
    server.stop()


@cases("name", HUGE)
def test_the_next_token_is_not_late(bystander: Bystander, name: str) -> None:
    path, body = HUGE[name]
    content = body if isinstance(body, str) else json.dumps(body)
    began, slow = time.perf_counter(), slowness()
    response = httpx.post(
        bystander.server.url + path, content=content, headers={"Content-Type": "application/json"}, timeout=90
    )
    assert response.status_code in (200, 400), response.text[:200]
    time.sleep(0.1)
    assert bystander.worst(began) < CEILING * max(slow, slowness())
