"""Reload, sleep and pause of running engines, over engines whose tokens tell which weights they have."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from frontend.test_async_engine import SLOW, FakeCore, collect

from octavo.config import EngineConfig
from octavo.demo import MODEL_DIR
from octavo.errors import OctavoError
from octavo.frontend import router
from octavo.frontend.async_engine import AsyncEngine
from octavo.frontend.engine_start import EngineDead
from octavo.frontend.operations import Operations
from octavo.frontend.router import Engine, Replicas, start_engine
from octavo.messages import KV_CACHE, WEIGHTS, SamplingParams

NEW = 1000  # what the new weights add to each token
LONG = 30  # tokens, of 20 ms each


class ControlledCore(FakeCore):  # type: ignore[misc]
    """A FakeCore with weights: those of a directory named new add NEW to each token; those named bad are refused, and those
    named fatal end the process."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.added, self.parts, self.resets = 0, {WEIGHTS, KV_CACHE}, 0

    def step(self) -> Any:
        assert KV_CACHE in self.parts
        outputs, stats = super().step()
        for output in outputs:
            output.token_ids = [token + self.added for token in output.token_ids]
        return outputs, stats

    def check_reload(self, model: str) -> None:
        if Path(model).name == "bad":
            raise OctavoError("The checkpoint is bad.")

    def reload(self, model: str, checked: bool) -> None:
        assert not self.running
        assert WEIGHTS in self.parts
        if not checked:
            self.check_reload(model)
        if Path(model).name == "fatal":
            raise RuntimeError("half of the weights are written")
        self.added = NEW if Path(model).name == "new" else 0

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def sleep(self) -> None:
        assert not self.running
        self.parts.clear()

    def wake(self, parts: tuple[str, ...]) -> None:
        self.parts.update(parts)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoint directories, by the names that ControlledCore knows."""
    root, found = tmp_path_factory.mktemp("checkpoints"), {}
    for name in ("old", "new", "bad", "fatal"):
        (root / name).mkdir()
        shutil.copy(MODEL_DIR / "config.json", root / name)
        found[name] = str(root / name)
    return found


def operate(test: Callable[[Engine, Operations], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        config = EngineConfig(**options)
        engine = await start_engine(config, make_core=ControlledCore)
        try:
            await asyncio.wait_for(test(engine, Operations(engine, config)), 60)
        finally:
            await engine.shutdown()

    asyncio.run(main())
    assert not multiprocessing.active_children()


async def ask(engine: Engine, name: str, length: int = LONG) -> list[int]:
    """The tokens of a slow answer, counted from 0; NEW and more are of the new weights."""
    prompt, number = [SLOW, 0], engine.route([SLOW, 0])
    tokens: list[int] = []
    async for delta in engine.generate(prompt, SamplingParams(max_tokens=length, ignore_eos=True), name, number=number):
        tokens += delta.token_ids
    return tokens


def of(weights: int, length: int = LONG) -> list[int]:
    return [weights + n + 1 for n in range(length)]


@pytest.mark.parametrize("engines", [1, 2])
def test_a_reload_waits_for_the_old_answers_and_holds_the_new_ones(engines: int, directories: dict[str, str]) -> None:
    async def test(engine: Engine, operations: Operations) -> None:
        running = [asyncio.create_task(ask(engine, f"old {n}")) for n in range(3)]
        await asyncio.sleep(0.2)
        reload = asyncio.create_task(operations.reload(directories["new"]))
        await asyncio.sleep(0.1)
        later = [asyncio.create_task(ask(engine, f"new {n}")) for n in range(3)]
        await reload
        assert all(task.done() for task in running)
        assert await asyncio.gather(*running) == [of(0)] * 3
        assert await asyncio.gather(*later) == [of(NEW)] * 3
        assert operations.directory == directories["new"]
        await operations.reload()
        assert await ask(engine, "again", 3) == of(NEW, 3)

    operate(test, data_parallel_size=engines)


def test_a_reload_may_end_the_old_answers(directories: dict[str, str]) -> None:
    async def test(engine: Engine, operations: Operations) -> None:
        running = asyncio.create_task(ask(engine, "old"))
        await asyncio.sleep(0.2)
        await operations.reload(directories["new"], "abort")
        with pytest.raises(OctavoError, match="weights were reloaded before"):
            await running
        assert await ask(engine, "new", 3) == of(NEW, 3)

    operate(test)


def test_a_reload_that_is_refused_touches_no_request(directories: dict[str, str]) -> None:
    """Not even one that would end those that run."""

    async def test(engine: Engine, operations: Operations) -> None:
        running = asyncio.create_task(ask(engine, "old"))
        await asyncio.sleep(0.2)
        for name, why in (("bad", "is bad"), ("/nowhere", "no model at"), ("", "is missing"), ("a\0b", "zero byte")):
            with pytest.raises(OctavoError, match=why):
                await operations.reload(directories.get(name, name), "abort")
        assert not running.done()
        assert await running == of(0)
        assert await ask(engine, "after", 3) == of(0, 3)
        assert operations.directory == str(MODEL_DIR)

    operate(test, data_parallel_size=2)


def test_an_engine_that_starts_again_has_the_new_weights(monkeypatch: pytest.MonkeyPatch, directories: dict[str, str]) -> None:
    monkeypatch.setattr(router, "WAITS", (0.05, 0.05, 0.05))

    async def test(engine: Engine, operations: Operations) -> None:
        assert isinstance(engine, Replicas)
        await operations.reload(directories["new"])
        await operations.pause()
        dying = engine.engines[1]
        assert dying is not None
        os.kill(dying._processes._processes[0].pid or 0, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while engine.engines[1] in (None, dying):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        asked = [asyncio.create_task(ask(engine, str(n), 3)) for n in range(4)]
        await asyncio.sleep(0.2)
        assert [one.admission.held for one in engine.alive] == [2, 2]
        assert not any(task.done() for task in asked), "the fresh one is paused as the other"
        await operations.resume()
        assert await asyncio.gather(*asked) == [of(NEW, 3)] * 4

    operate(test, data_parallel_size=2)


def test_weights_that_are_half_written_end_the_engine(directories: dict[str, str]) -> None:
    async def test(engine: Engine, operations: Operations) -> None:
        with pytest.raises(EngineDead, match="half of the weights"):
            await operations.reload(directories["fatal"])
        assert not engine.healthy
        with pytest.raises(EngineDead):
            await ask(engine, "after")

    operate(test)


def test_requests_are_refused_while_the_engine_sleeps(directories: dict[str, str]) -> None:
    async def test(engine: Engine, operations: Operations) -> None:
        running = asyncio.create_task(ask(engine, "running"))
        await asyncio.sleep(0.2)
        await operations.sleep()
        await operations.sleep()
        for asked in (running, ask(engine, "asleep")):
            with pytest.raises(OctavoError, match=r"sleeps; wake it"):
                await asked
        assert (operations.asleep, engine.healthy, engine.silent_seconds) == (True, True, 0)
        await operations.wake([WEIGHTS])
        with pytest.raises(OctavoError, match=r"sleeps; wake it"):
            await ask(engine, "without a cache")
        await operations.reload(directories["new"])
        await operations.wake([KV_CACHE])
        assert await ask(engine, "awake", 3) == of(NEW, 3)

    operate(test)


def test_sleep_may_wait_for_the_answers() -> None:
    async def test(engine: Engine, operations: Operations) -> None:
        running = asyncio.create_task(ask(engine, "running"))
        await asyncio.sleep(0.2)
        asleep = asyncio.create_task(operations.sleep("wait"))
        await asyncio.sleep(0.1)
        with pytest.raises(OctavoError, match="sleeps"):
            await ask(engine, "late")
        assert await running == of(0)
        await asleep
        await operations.wake()
        assert await ask(engine, "awake", 3) == of(0, 3)

    operate(test)


def test_a_pause_holds_requests_until_it_ends() -> None:
    async def test(engine: Engine, operations: Operations) -> None:
        assert isinstance(engine, AsyncEngine)
        running = asyncio.create_task(ask(engine, "running"))
        await asyncio.sleep(0.2)
        await operations.pause("wait")
        assert await running == of(0)
        held, leaves = (asyncio.create_task(ask(engine, name, 3)) for name in ("held", "leaves"))
        await asyncio.sleep(0.1)
        assert engine.admission.held == 2
        leaves.cancel()
        await asyncio.gather(leaves, return_exceptions=True)
        assert engine.admission.held == 1
        await operations.pause()
        await operations.resume()
        await operations.resume()
        assert await held == of(0, 3)
        assert len(await collect(engine, [1], max_tokens=2)) == 2

    operate(test)


def test_what_is_held_ends_with_the_server() -> None:
    async def test(engine: Engine, operations: Operations) -> None:
        await operations.pause()
        first = asyncio.create_task(ask(engine, "first"))
        await asyncio.sleep(0.05)
        engine.fail_running(OctavoError("The server is shutting down."))
        with pytest.raises(OctavoError, match="shutting down"):
            await first
        second = asyncio.create_task(ask(engine, "second"))
        await asyncio.sleep(0.05)
        await engine.shutdown()
        with pytest.raises(EngineDead, match="shut down"):
            await second

    operate(test)


@pytest.mark.parametrize("what", ["sleep", "pause", "reload"])
def test_what_waits_for_answers_is_taken_back_when_nobody_asks_for_it_any_more(what: str, directories: dict[str, str]) -> None:
    async def test(engine: Engine, operations: Operations) -> None:
        running = asyncio.create_task(ask(engine, "running"))
        await asyncio.sleep(0.2)
        work = operations.reload(directories["new"]) if what == "reload" else getattr(operations, what)("wait")
        waiting = asyncio.create_task(work)
        await asyncio.sleep(0.2)
        late = asyncio.create_task(ask(engine, "late", 3))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not running.done()
        assert (operations.asleep, operations.paused, operations.directory) == (False, False, str(MODEL_DIR))
        if what == "sleep":
            with pytest.raises(OctavoError, match="sleeps"):
                await late
        else:
            assert await late == of(0, 3)
        assert await ask(engine, "after", 3) == of(0, 3)
        assert await running == of(0)

    operate(test)


def test_what_the_engine_does_is_done_to_its_end(directories: dict[str, str]) -> None:
    """A sleep that is cancelled while weights are freed has happened."""

    async def test(engine: Engine, operations: Operations) -> None:
        assert isinstance(engine, AsyncEngine)
        control, begun, free = engine.control, asyncio.Event(), asyncio.Event()

        async def slow(*message: Any) -> None:
            begun.set()
            await free.wait()
            await control(*message)

        engine.control = slow  # type: ignore[method-assign]
        sleeping = asyncio.create_task(operations.sleep("wait"))
        await begun.wait()
        for _ in range(2):
            sleeping.cancel()
            await asyncio.sleep(0.02)
        assert not sleeping.done()
        free.set()
        with pytest.raises(asyncio.CancelledError):
            await sleeping
        assert operations.asleep
        with pytest.raises(OctavoError, match="sleeps"):
            await ask(engine, "asleep")
        await operations.wake()
        assert await ask(engine, "awake", 3) == of(0, 3)

    operate(test)
