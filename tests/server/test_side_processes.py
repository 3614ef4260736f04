"""Templates run beside the server, in processes that may be ended: bounded computing, bounded memory, one sentence."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable

import pytest
from cases import cases
from server.api_client import Client

from octavo.errors import InvalidRequest, OctavoError
from octavo.server import side_processes
from octavo.server.side_processes import SideProcesses

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}"
DOUBLING = "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
TEMPLATES = {
    "loops": (  # what comes first, the end of its time or of its memory, depends on the machine
        LOOPS,
        (
            "Rendering the chat template takes more than 3 s of computing, which is not allowed.",
            "The chat template cannot render these messages: MemoryError",
        ),
    ),
    "a constant": ('{{ "a" * 10**10 }}', "The chat template cannot render these messages: MemoryError"),
    "a product": ("{{ messages[0].content * 10**9 }}", "The chat template cannot render these messages: MemoryError"),
    "doubling": (DOUBLING + "{{ ns.s }}", "The chat template cannot render these messages: MemoryError"),
    "large": ('{% for i in range(20000) %}{{ "a" * 1000 }}{% endfor %}', "The chat template makes 20000000 characters of "),
    "format": ("{{ '%2000000000d' % 1 }}", "The chat template cannot render these messages: MemoryError"),
}


@pytest.fixture
def side() -> SideProcesses:
    return SideProcesses(most=1)


def run(side: SideProcesses, function: Callable[..., object], *args: object) -> object:
    return asyncio.run(side.run("It", function, *args))


def fails(side: SideProcesses, function: Callable[..., object], *args: object) -> str:
    with pytest.raises(InvalidRequest) as caught:
        run(side, function, *args)
    return str(caught.value)


@cases("name", TEMPLATES)
def test_a_template_without_end(make_client: Callable[..., Client], name: str) -> None:
    """It is ended, and meanwhile the event loop never waits."""
    template, sentence = TEMPLATES[name]
    client = make_client(template=template)
    worst = 0.0

    async def look() -> None:
        nonlocal worst
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.005)
            worst = max(worst, time.perf_counter() - last)
            last = time.perf_counter()

    async def render() -> str:
        looking = asyncio.ensure_future(look())
        try:
            return await client.served.render(MESSAGES, None, True, {})
        finally:
            looking.cancel()

    with pytest.raises(InvalidRequest) as caught:
        asyncio.run(render())
    assert str(caught.value).startswith(sentence)
    assert worst < 2, "the event loop waited"
    response = client.post(CHAT, {"messages": MESSAGES}) if name == "a product" else None
    assert response is None or response.status_code == 400


def test_what_it_returns_and_raises_comes_back(side: SideProcesses) -> None:
    assert run(side, max, 3, 5) == 5
    assert run(side, os.getpid) != os.getpid()
    with pytest.raises(OctavoError, match="failed"):
        run(side, int, "x")
    assert run(side, max, 1, 2) == 2


def test_too_much_computing_or_memory_ends_it(side: SideProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fails(side, pow, 7, 10**9) == "It takes more than 3 s of computing, which is not allowed."
    assert fails(side, bytes, 2 * 2**30) == "This request takes too much memory; send less."
    assert "exit code -9" in fails(side, signal.raise_signal, signal.SIGKILL)
    monkeypatch.setattr(side_processes, "WALL_SECONDS", 0.2)
    assert fails(side, time.sleep, 30) == "It takes more than 3 s of computing, which is not allowed."
    monkeypatch.undo()
    assert run(side, max, 1, 2) == 2, "the next one starts a new process"


def test_a_process_that_has_grown_ends_and_its_memory_with_it(side: SideProcesses) -> None:
    first = run(side, os.getpid)
    assert run(side, os.getpid) == first
    assert isinstance(run(side, hash, "a" * 300 * 2**20), int)
    assert run(side, os.getpid) != first
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)  # type: ignore[arg-type]


def test_close_ends_what_runs(side: SideProcesses) -> None:
    async def closed() -> None:
        work = asyncio.ensure_future(side.run("It", time.sleep, 60))
        await asyncio.sleep(1)
        side.close()
        await work

    started = time.monotonic()
    with pytest.raises(InvalidRequest):
        asyncio.run(closed())
    assert time.monotonic() - started < 20
