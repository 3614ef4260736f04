"""What a server does for a chat's images before the engine has them, in this process: whom it asks, whom it holds up."""

from __future__ import annotations

import asyncio
import gc
import json
import time
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from server.fake_engine import FakeEngine
from server.processes import slowness
from server.vision_checkpoints import PAD, ask, file_of, picture, write_tokenizer
from vision import test_fetch
from vision.test_fetch import Internet, moved

from octavo.frontend.image_support import ImageSupport
from octavo.server import chat_images
from octavo.server.app import make_app
from octavo.server.chat_images import ChatImages
from octavo.server.serve import make_served
from octavo.server.serving import Served
from octavo.text.tokenizer import Tokenizer
from octavo.vision import FetchRules, image_reader

CHAT = "/v1/chat/completions"
GOOD = file_of(picture(1))
ANSWERS = {
    "/a.png": b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(GOOD) + GOOD,
    "/moved.png": moved("http://other.test/a.png"),
}


@pytest.fixture
def served(tmp_path: Path) -> Served:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", "image_token_id": PAD}))
    write_tokenizer(tmp_path)
    engine = FakeEngine()
    engine.tokenizer = Tokenizer(tmp_path)
    engine.info = replace(engine.info, image_tokens=10_000, vocab_size=5000)
    return seen_by(engine, tmp_path)


def seen_by(engine: FakeEngine, path: Path, rules: FetchRules | None = None) -> Served:
    served = make_served(engine, ["tiny"])  # type: ignore[arg-type]
    support = ImageSupport(image_reader(path), "")
    served.images = ChatImages(support, 100, engine.info.max_model_len, rules or FetchRules(seconds=20))
    return served


@pytest.fixture
def internet(monkeypatch: pytest.MonkeyPatch) -> Internet:
    for path, answer in ANSWERS.items():
        monkeypatch.setitem(test_fetch.ANSWERS, path, answer)
    return Internet(monkeypatch)


def http(served: Served) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(make_app(served), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=120)


async def leave(served: Served, body: Any, when: Callable[[], Awaitable[None]]) -> float:
    """Sends a request and disconnects after `when`. Seconds from then until the server is done with it."""
    left = 0.0
    parts = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        nonlocal left
        if parts:
            return parts.pop()
        await when()
        left = time.monotonic()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": CHAT,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    await make_app(served)(scope, receive, send)
    return time.monotonic() - left


def test_images_of_the_internet_reach_the_engine_and_private_ones_do_not(served: Served, internet: Internet) -> None:
    """Redirects and names that change are checked as test_fetch.py has it; here they come through the server."""
    engine: Any = served.engine

    async def work() -> None:
        async with http(served) as client:
            for path in ("/a.png", "/moved.png"):
                urls = [f"http://pictures.test{path}", "http://rebinding.test/a.png"]
                answer = await client.post(CHAT, json={"messages": ask(*urls)})
                assert answer.status_code == 200, answer.text
                asked = engine.requests.pop()
                assert [one.image.tokens for one in asked.images] == [35, 35]
                assert asked.images[0].image.digest == asked.images[1].image.digest
                assert asked.prompt_token_ids.count(PAD) == 70
                assert answer.json()["usage"]["prompt_tokens"] == len(asked.prompt_token_ids)
                internet.names["rebinding.test"] = [[test_fetch.PUBLIC], ["127.0.0.1"]]
            internet.names["rebinding.test"] = [["127.0.0.1"]]
            for path, sentence in {
                "/to-loopback": "no public address", "/to-metadata": "no public address", "/to-rebinding": "no public address",
                "/circle": "redirected more than 3 times", "/missing": "HTTP status 404", "/ok": "of no format that is read",
                "/to-file": "not an http(s) URL", "/short": "only in part",
            }.items():  # fmt: skip
                answer = await client.post(CHAT, json={"messages": ask(GOOD, f"http://pictures.test{path}")})
                told = answer.json()["error"]
                assert (answer.status_code, told["param"]) == (400, "messages.0.content.1"), path
                assert sentence in told["message"], path
            answer = await client.post(CHAT, json={"messages": ask("file:///etc/hostname")})
            assert "started with --allowed-local-media-path" in answer.json()["error"]["message"]
            served.images._rules = FetchRules.of_options(None, ["other.test"])
            answer = await client.post(CHAT, json={"messages": ask("http://pictures.test/moved.png")})
            assert "from the hosts of --allowed-media-domains alone" in answer.json()["error"]["message"]
        assert not engine.requests

    internet.run(work)
    assert {host for host, _ in internet.connected} <= {test_fetch.PUBLIC, test_fetch.OTHER}


def test_images_of_each_api_are_those_of_a_chat(served: Served) -> None:
    """Also in a tool's result, and in a response that is continued."""
    engine: Any = served.engine
    url = ask(GOOD)[0]["content"][0]["image_url"]["url"]
    kind, _, data = url.removeprefix("data:").partition(";base64,")
    item = {"type": "input_image", "image_url": url, "detail": "auto"}
    block = {"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}}
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    user = {"role": "user", "content": "look"}
    shown = [{"type": "image_url", "image_url": {"url": url}}]
    turn = [
        user,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": shown},
    ]
    made = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
    used = {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [block]}
    bodies = [
        (CHAT, {"messages": [{"role": "user", "content": shown}]}),
        ("/v1/responses", {"input": [{"role": "user", "content": [item]}]}),
        ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": [block]}]}),
        (CHAT, {"messages": turn}),
        ("/v1/responses", {"input": [user, made, {"type": "function_call_output", "call_id": "a", "output": [item]}]}),
        ("/v1/messages", {"max_tokens": 5, "messages": [user, used, {"role": "user", "content": [result]}]}),
    ]

    async def work() -> None:
        async with http(served) as client:
            answers = [await client.post(path, json=body) for path, body in bodies]
            assert [answer.status_code for answer in answers] == [200] * 6, [answer.text for answer in answers]
            more = {"input": "And?", "previous_response_id": answers[1].json()["id"]}
            assert (await client.post("/v1/responses", json=more)).status_code == 200

    asyncio.run(work())
    asked = [(one.prompt_token_ids, [image.image.digest for image in one.images]) for one in engine.requests]
    assert asked[0] == asked[1] == asked[2]
    assert asked[3] == asked[4] == asked[5]
    assert asked[0][1] == asked[3][1] == asked[6][1]
    assert asked[0][1]


def test_clients_that_leave_free_what_their_images_held(served: Served, internet: Internet) -> None:
    """More slow files than are fetched at once, then a photograph that is prepared for long: others are served meanwhile."""
    photograph = file_of(Image.fromarray(np.zeros((7000, 7000), np.uint8)))

    async def work() -> None:
        slow = {"messages": ask(*["http://pictures.test/silent"] * 4)}
        asked = list[int]()

        async def see() -> None:
            await asyncio.sleep(0.7)
            asked.append(len(internet.requests))

        waits = [leave(served, slow, see) for _ in range(chat_images.FETCHED // 4 + 2)]
        assert max(await asyncio.gather(*waits)) < 2 * slowness()
        assert asked[0] == chat_images.FETCHED
        assert await leave(served, {"messages": ask(photograph)}, lambda: asyncio.sleep(0.5)) < 1 * slowness()
        assert served.gate.running == 0
        async with http(served) as client:
            answer = await client.post(CHAT, json={"messages": ask("http://pictures.test/a.png")})
            assert answer.status_code == 200

    internet.run(work)
    assert len(served.engine.requests) == 1  # type: ignore[attr-defined]


def test_a_photograph_of_64_megapixels_is_read_and_holds_up_nobody(served: Served) -> None:
    """Neither chats of text nor the event loop."""
    photograph = file_of(Image.fromarray(np.zeros((8192, 8192, 3), np.uint8)), "JPEG")
    paused = 0.0

    async def look() -> None:
        nonlocal paused
        while True:
            last = time.perf_counter()
            await asyncio.sleep(0.005)
            paused = max(paused, time.perf_counter() - last)

    async def work() -> None:
        async with http(served) as client:
            hello = {"messages": [{"role": "user", "content": "Hello"}]}
            assert (await client.post(CHAT, json=hello)).status_code == 200  # starts the process of templates
            looking = asyncio.ensure_future(look())
            sent = asyncio.ensure_future(client.post(CHAT, json={"messages": ask(photograph)}))
            texts = 0
            while not sent.done():
                assert (await client.post(CHAT, json=hello)).status_code == 200
                texts += 1
            assert (await sent).status_code == 200
            assert texts > 5
            looking.cancel()

    asyncio.run(work())
    assert paused < 2 * slowness()


def test_few_images_are_in_work_and_too_many_tokens_end_it(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred small files whose pictures are larger than the prompt may be: they are not all made first."""
    running, most, made = 0, 0, 0
    prepared = served.images.side.run

    async def counted(*args: Any) -> Any:
        nonlocal running, most, made
        running += 1
        most = max(most, running)
        try:
            return await prepared(*args)
        finally:
            running -= 1
            made += 1

    monkeypatch.setattr(served.images.side, "run", counted)

    async def work() -> httpx.Response:
        async with http(served) as client:
            return await client.post(CHAT, json={"messages": ask(*[file_of(picture(1, 80, 80))] * 100)})

    answer = asyncio.run(work())
    assert answer.status_code == 400
    assert "images alone have 1100 tokens or more; at most 1023 fit" in answer.json()["error"]["message"]
    assert most == chat_images.AT_ONCE
    assert made < 20


def test_an_answer_holds_no_image(served: Served) -> None:
    """Neither its bytes nor its patches, streamed or whole, nor does a refusal; without the collector's help."""
    engine: Any = served.engine
    engine.delay = 0.05
    alive: list[weakref.ref[Any]] = []
    generate = engine.generate

    def watched(*args: Any) -> Any:
        alive.extend(weakref.ref(one.image.pixels) for one in args[4])
        found = generate(*args)
        engine.requests.clear()
        return found

    engine.generate = watched

    render = served.side.run

    async def bare(*args: Any) -> Any:
        assert "base64" not in repr(args), "a template's process is sent the files"
        return await render(*args)

    served.side.run = bare  # type: ignore[method-assign]

    async def work(stream: bool) -> None:
        async with http(served) as client:
            sent = asyncio.ensure_future(client.post(CHAT, json={"messages": ask(GOOD, GOOD), "stream": stream}))
            while len(alive) < 2 and not sent.done():
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            assert not sent.done()
            assert [one() for one in alive] == [None, None]
            assert (await sent).status_code == 200

    def circles() -> list[Any]:
        """Of what only the collector would free, what holds an image's file."""
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        gc.set_debug(0)
        found = [one for one in gc.garbage if isinstance(one, tuple) and any(isinstance(v, str) and len(v) > 5000 for v in one)]
        gc.garbage.clear()
        return found

    async def refused() -> None:
        async with http(served) as client:
            assert (await client.post(CHAT, json={"messages": ask(GOOD[:-50])})).status_code == 400
            assert not circles()

    gc.collect()
    gc.disable()
    try:
        for stream in (True, False):
            asyncio.run(work(stream))
            alive.clear()
        asyncio.run(refused())
    finally:
        gc.enable()


def test_images_of_all_requests_together_have_a_bound(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine keeps an image's patches while its request runs; what is given back can be had by others."""
    engine: Any = served.engine
    engine.delay = 0.05
    one = {"messages": ask(file_of(picture(1, 80, 80))), "max_tokens": 9}

    async def work() -> list[int]:
        async with http(served) as client:
            first = asyncio.create_task(client.post(CHAT, json=one))
            while not engine.calls:
                await asyncio.sleep(0.01)
            assert served.images.held > 0
            monkeypatch.setattr(chat_images, "MAX_HELD", served.images.held)
            second = await client.post(CHAT, json=one)
            assert "all the room there is" in second.json()["error"]["message"]
            codes = [(await first).status_code, second.status_code]
            return [*codes, (await client.post(CHAT, json=one)).status_code]

    assert asyncio.run(work()) == [200, 503, 200]
    assert served.images.held == 0
