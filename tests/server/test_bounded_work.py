"""What a small body may ask of the sampling side: bounds, each told in a sentence, and slow work that holds up nobody."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from cases import cases
from server.api_client import Client

from octavo.messages import MAX_GRAMMAR, Logprob
from octavo.server import structured
from octavo.server.app import make_app
from octavo.text import llguidance_grammar
from octavo.token_logprobs import PackedLogprobs

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

TOO_MUCH: list[tuple[dict[str, Any], str]] = [
    ({"stop": [f"never {i}" for i in range(10_000)], "n": 128}, "stop has 10000 entries; at most 256 are served."),
    ({"stop": "x" * 20_000}, "stop has 20000 characters in all; at most 16384 are served."),
    ({"bad_words": ["x" * 20_000]}, "bad_words has 20000 characters in all; at most 16384 are served."),
    ({"bad_words": ["x"] * 2_000}, "bad_words has 2000 entries; at most 1024 are served."),
    ({"stop_token_ids": list(range(5_000))}, "stop_token_ids has 5000 entries; at most 4096 are served."),
    ({"guided_choice": [f"choice {i}" for i in range(50_000)]}, "guided_choice has over 524288 characters"),
    ({"structured_outputs": {"choice": ["x" * 10] * 100_000}}, "structured_outputs.choice has over 524288 characters"),
    ({"guided_json": {"enum": list(range(1_000_000))}}, "guided_json has over 524288 characters"),
    ({"guided_json": {"const": "x" * 1_000_000}}, "guided_json has over 524288 characters"),
    ({"guided_json": '{"const": "' + "x" * 1_000_000 + '"}'}, "guided_json has over 524288 characters"),
    ({"guided_json": {"properties": {f"{i:06}": True for i in range(100_000)}}}, "guided_json has over 524288 characters"),
    ({"guided_regex": "(a|b)" * 110_000}, "guided_regex has over 524288 characters"),
    ({"guided_grammar": "start: " + '"a" ' * 140_000}, "guided_grammar has over 524288 characters"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["x"] * 600_000}}}},
        "response_format has over 524288 characters",
    ),
]


@cases(("body", "sentence"), TOO_MUCH, ids=[sentence[:40] for _, sentence in TOO_MUCH])
def test_too_much_is_refused(client: Client, body: dict[str, Any], sentence: str) -> None:
    response = client.post("/v1/completions", {"prompt": "a", **body})
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(sentence)
    assert not client.engine.calls


def test_a_named_and_a_required_tool_too_large(client: Client) -> None:
    function = {"name": "f", "parameters": {"enum": ["x"] * 600_000}}
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function", "function": function}]}
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        response = client.post("/v1/chat/completions", {**body, "tool_choice": choice})
        assert response.status_code == 400
        assert response.json()["error"]["message"].startswith(f"tools has over {MAX_GRAMMAR} characters")


def test_tools_too_large_are_not_walked_over(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "calls_schema", lambda *_: pytest.fail("all of them are walked over"))
    test_a_named_and_a_required_tool_too_large(client)


def longest_pause(
    client: Client, body: dict[str, Any], path: str = "/v1/completions", clock: Callable[[], float] = time.perf_counter
) -> tuple[float, httpx.Response]:
    """For how long the event loop stood still while it answered `body`, and the answer."""

    async def main() -> tuple[float, httpx.Response]:
        transport = httpx.ASGITransport(make_app(client.served), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            task = asyncio.create_task(http.post(path, json=body))
            pause = 0.0
            while not task.done():
                start = clock()
                await asyncio.sleep(0.002)
                pause = max(pause, clock() - start)
            return pause, await task

    return asyncio.run(main())


def doubling(levels: int) -> dict[str, Any]:
    """A schema of some lines, whose references make 2^levels copies where objects are closed."""
    both = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(levels)}
    last = {f"d{levels}": {"type": "object", "properties": {"b": {"type": "string"}}}}
    return {"type": "object", "properties": {"a": True}, "anyOf": [{"$ref": "#/$defs/d0"}], "$defs": {**both, **last}}


# What a grammar may not ask for, in fewer bytes than a usual prompt.
BOMBS: dict[str, tuple[Any, str]] = {
    "references": (
        doubling(40),
        "(guided_json cannot be followed: with its references written out it has over 262144 values|"
        "Reading guided_json takes more than 3 s of comp)",  # a slow machine's answer: counting takes some 2.5 s
    ),
    "many names": (
        {"properties": {f"p{n}": True for n in range(9_000)}, "anyOf": [{}] * 60_000},
        "guided_json cannot be followed: with its references written out it has over 262144 values",
    ),
    "copies of a long list": (
        {**doubling(14), "properties": {"a": True}, "$defs": {**doubling(14)["$defs"], "d14": {"enum": ["x" * 200_000]}}},
        "(Reading guided_json (takes more than 3 s of comp|failed)|This request takes too much memory)",
    ),
}


@cases("name", BOMBS)
def test_a_grammar_may_not_ask_for_any_amount_of_work(client: Client, name: str) -> None:
    schema, sentence = BOMBS[name]
    pause, response = longest_pause(client, {"prompt": "a", "guided_json": schema})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "guided_json")
    assert re.match(sentence, response.json()["error"]["message"]), response.text
    assert pause < 0.8
    assert client.complete(guided_json={"type": "object"})["choices"]


def test_grammars_are_read_elsewhere_and_the_latest_are_kept(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many at once, too: those that had been dropped from a cache were read again by the event loop."""
    monkeypatch.setattr(llguidance_grammar, "validate", lambda _: pytest.fail("it is read in this process"))
    reading: list[str] = []
    run = client.served.side.run

    async def counted(what: str, *work: Any) -> Any:
        reading.append(what)
        return await run(what, *work)

    monkeypatch.setattr(client.served.side, "run", counted)
    together, later = range(100, 120), [200, 200, *range(201, 217), 201, 200]

    async def main() -> list[httpx.Response]:
        transport = httpx.ASGITransport(make_app(client.served))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:

            async def ask(number: int) -> httpx.Response:
                return await http.post("/v1/completions", json={"prompt": "a", "guided_regex": f"{number}[ab]+"})

            return [*await asyncio.gather(*map(ask, together)), *[await ask(number) for number in later]]

    assert [response.status_code for response in asyncio.run(main())] == [200] * (len(together) + len(later))
    assert all(request.grammar and "[ab]+" in request.grammar for request in client.engine.requests)
    assert reading == ["Reading guided_regex"] * (20 + 1 + 16 + 1), "of the latest 16 the first is dropped for another"


def test_a_large_grammar_under_the_bound(client: Client) -> None:
    """Real work of the size that is served: choices that were 6 s of silence."""
    gbnf = 'root ::= "(" root ")" | ' + " | ".join(f'"item {i}"' for i in range(4_000))
    for asked in ({"guided_choice": [f"choice {i}" for i in range(25_000)]}, {"guided_grammar": gbnf}):
        pause, response = longest_pause(client, {"prompt": "a", **asked})
        assert response.status_code == 200
        assert pause < 3  # a busy machine's bound


@cases(("path", "more"), [(COMPLETIONS, {"prompt_logprobs": 20}), (COMPLETIONS, {"echo": True, "logprobs": 20}), (CHAT, {})])
@pytest.mark.parametrize("stream", [False, True])
def test_the_loop_goes_on_while_a_long_prompt_s_logprobs_are_told(
    client: Client, monkeypatch: pytest.MonkeyPatch, stream: bool, path: str, more: dict[str, Any]
) -> None:
    prompt = [5] * 30_000
    entry = tuple(Logprob(number, -0.25 * number, number + 1) for number in range(21))
    known = PackedLogprobs.of([None, *[entry] * (len(prompt) - 1)])
    client.engine.info = replace(client.engine.info, max_model_len=len(prompt) + 1000)
    monkeypatch.setattr(client.engine, "_prompt_logprobs", lambda *_: known)
    asked: dict[str, Any] = {"prompt": prompt, **more}
    if path == CHAT:
        asked = {"messages": [{"role": "user", "content": "hi"}], "prompt_logprobs": 20}
    pause, response = longest_pause(client, {"max_tokens": 2, "stream": stream, **asked}, path, time.thread_time)
    first = json.loads(response.text.partition("data: ")[2].partition("\n")[0]) if stream else response.json()
    told = first if path == CHAT else first["choices"][0]
    values = told["prompt_logprobs"] if "prompt_logprobs" in told else told["logprobs"]["top_logprobs"][: len(prompt)]
    assert (len(values), values[0], len(values[-1])) == (len(prompt), None, 21)
    assert pause < 1.5  # it was 3 s


def test_an_error_is_one_short_line(client: Client) -> None:
    for model in ("x" * 20_000, "a\nb\u2028c\r\n" * 3000):
        message = client.post("/v1/completions", {"prompt": "a", "model": model}).json()["error"]["message"]
        assert len(message) <= 900
        assert message.startswith("The model '" + model[:1])
        assert message.endswith("' is not served here; demo and other are.")
        assert len(message.splitlines()) == 1
