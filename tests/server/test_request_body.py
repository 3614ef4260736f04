"""Bodies: large ones are read beside the server, what comes of them is bounded, and the first fault is enough."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from cases import cases
from server.api_client import Client
from server.processes import Server

from octavo.server import error_responses, request_body
from octavo.server.error_responses import ApiError
from octavo.server.protocol import ApiModel, ChatRequest, CompletionRequest
from octavo.server.request_body import MAX_VALUES, SMALL_BODY, as_request, read_body

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
MANY = "The request holds over a million values, lists and objects; send it in several requests."


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading JSON in this process fails."""

    def load(_: bytes) -> Any:
        pytest.fail("the server itself read the body")

    monkeypatch.setattr(request_body, "_load", load)


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize(
    ("path", "more"), [(COMPLETIONS, {"prompt": "def f"}), (CHAT, {"messages": [USER]}), ("/tokenize", {"prompt": "a"})]
)
def test_a_large_body_is_read_beside_the_server(client: Client, path: str, more: dict[str, Any]) -> None:
    ignored = [[]] * SMALL_BODY
    assert client.post(path, {**more, "user": ignored}).status_code == 200


@pytest.mark.usefixtures("beside")
@cases(
    ("path", "body", "sentence"),
    [
        (COMPLETIONS, {"prompt": [[]] * (MAX_VALUES // 8)}, MANY),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {str(i): 0 for i in range(MAX_VALUES // 4)}}, MANY),
        (CHAT, {"messages": [{"role": "user", "content": [{}] * MAX_VALUES}]}, MANY),
        (CHAT, {"messages": [USER], "tools": [{"function": {"name": "a"}}] * 100_000}, MANY),
        (CHAT, {"messages": [USER], "chat_template_kwargs": {"a": [0] * MAX_VALUES}}, MANY),
        ("/detokenize", {"tokens": [1] * MAX_VALUES}, MANY),
        (
            CHAT,
            {"messages": [USER], "tools": [{"function": {"name": "a"}}] * 4097},
            "tools should have at most 4096 entries.",
        ),
        (COMPLETIONS, {"prompt": 5, "user": "a" * SMALL_BODY}, "prompt should be a string, a list of strings, "),
        (COMPLETIONS, {"prompt": "a", "n": "a" * SMALL_BODY}, "n should be a whole number, not 'aaa"),
        (COMPLETIONS, ["a" * SMALL_BODY], "The body should be a JSON object, not list."),
    ],
)
def test_a_large_body_is_refused_in_a_sentence(client: Client, path: str, body: Any, sentence: str) -> None:
    response = client.post(path, body)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(sentence)


@pytest.mark.parametrize("size", [10, SMALL_BODY])
def test_broken_json_of_every_size(client: Client, size: int) -> None:
    for content in (b'{"a": ' + b" " * size, b"[" * size + b"[" * 5000, b'{"prompt": "\xff' + b"a" * size):
        response = client.request("POST", COMPLETIONS, content=content)
        assert response.status_code == 400
        assert response.json()["error"]["message"].startswith("The body is not valid JSON: ")


@cases("size", [1, SMALL_BODY])
@cases("depth", [300, 800, 950])
def test_deep_messages_are_no_fault_of_the_server(client: Client, size: int, depth: int) -> None:
    body = json.dumps({"messages": [{**USER, "extra": "DEEP"}], "user": "a" * size})
    response = client.request("POST", CHAT, content=body.replace('"DEEP"', "[" * depth + "]" * depth))
    assert response.status_code in (200, 400), response.text


def test_many_values_within_the_bound_are_served(client: Client) -> None:
    body = {"prompt": [[5] * 1000] * 60, "max_tokens": 1}
    response = client.post(COMPLETIONS, body)
    assert response.status_code == 200, response.text
    assert len(response.json()["choices"]) == 60


WRONG: dict[str, tuple[type[ApiModel], Callable[[int], dict[str, Any]]]] = {
    "stop": (CompletionRequest, lambda n: {"prompt": "a", "stop": [1] * n}),
    "stop_token_ids": (CompletionRequest, lambda n: {"prompt": "a", "stop_token_ids": ["x"] * n}),
    "bad_words": (CompletionRequest, lambda n: {"prompt": "a", "bad_words": [1] * n}),
    "guided_choice": (CompletionRequest, lambda n: {"prompt": "a", "guided_choice": [1] * n}),
    "messages": (ChatRequest, lambda n: {"messages": [1] * n}),
    "tools": (ChatRequest, lambda n: {"messages": [USER], "tools": [{}] * n}),
    "documents": (ChatRequest, lambda n: {"messages": [USER], "documents": [1] * n}),
}


@cases("name", WRONG)
def test_of_many_faults_in_a_list_one_is_looked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, make = WRONG[name]
    counts = []
    tell = error_responses.from_validation

    def counted(error: Any, data: Any) -> ApiError:
        counts.append(error.error_count())
        return tell(error, data)

    monkeypatch.setattr(request_body, "from_validation", counted)
    for many in (1, 10_000):
        with pytest.raises(ApiError, match=f"^{name}"):
            as_request(model, json.dumps(make(many)).encode())
    assert counts[0] == counts[1]


@cases("sizes", [[2001], [2000, 1], [1] * 2001, [1500, 1500]], ids=len)
def test_a_body_that_does_not_say_its_length_is_read_up_to_the_bound(sizes: list[int]) -> None:
    """It has no end: whoever read on would never answer."""
    read = 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 1
        assert read <= len(sizes), "what follows the bound was read"
        return {"type": "http.request", "body": b" " * sizes[read - 1], "more_body": True}

    with pytest.raises(ApiError, match="over 2000 bytes, the most that this server reads"):
        asyncio.run(read_body({"type": "http", "headers": []}, receive, 2000))


def test_max_request_bytes() -> None:
    server = Server("--max-request-bytes", "2000", fake=True)
    try:
        for size, status in ((1000, 200), (3000, 413)):
            body = {"prompt": "a", "user": "b" * size}
            response = httpx.post(f"{server.url}/v1/completions", json=body)
            assert response.status_code == status
            assert status == 200 or "over 2000 bytes, the most that this server reads (--max-req" in response.text
    finally:
        server.stop()


def resident(server: Server) -> int:
    """MiB of the API process."""
    with open(f"/proc/{server.process.pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) >> 10


def test_memory_returns_after_huge_requests() -> None:
    server = Server(fake=True)
    try:
        words = " ".join(f"w{i}x" for i in range(600_000))
        bodies: list[dict[str, Any]] = [
            {"prompt": "a", "user": [[]] * 5_000_000},
            {"prompt": "a", "user": "b" * 30 * 2**20},
            {"prompt": words},
            {"prompt": [5] * 1_000_000},
        ]
        for _ in range(2):
            assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"}).status_code == 200
        before = resident(server)
        for body in bodies:
            assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code in (200, 400)
        deadline = time.monotonic() + 15
        while (after := resident(server)) > before + 24:
            assert time.monotonic() < deadline, f"{before} MiB before, {after} MiB after"
            time.sleep(0.2)
    finally:
        server.stop()


@cases("depth", [200, 250, 300, 350, 400, 450])
def test_what_is_nested_too_deeply_to_be_walked_over(client: Client, depth: int) -> None:
    """JSON is read to a depth that what walks over a schema does not reach."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    asked = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    for body in ({"tools": [tool], "tool_choice": "required"}, {"tools": [tool]}, {"guided_json": schema}):
        response = client.post("/v1/chat/completions", {**asked, **body})
        assert response.status_code in (200, 400), response.text
        assert response.status_code == 200 or response.json()["error"]["message"].endswith(".")
