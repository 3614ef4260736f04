"""Several engines behind one: requests are shared out, prefixes stay together, an engine that dies is started again."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest
from frontend.test_async_engine import SLOW, FakeCore

from octavo.config import EngineConfig
from octavo.errors import InvalidRequest, OctavoError
from octavo.frontend import router
from octavo.frontend.async_engine import AsyncEngine, EngineDead
from octavo.frontend.router import Replicas, start_engine
from octavo.messages import EngineStats, SamplingParams


def with_engines(count: int, test: Callable[[Replicas], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        engine = await start_engine(EngineConfig(data_parallel_size=count, **options), make_core=FakeCore)
        assert isinstance(engine, Replicas)
        try:
            await test(engine)
        finally:
            await engine.shutdown()

    asyncio.run(main())
    assert not multiprocessing.active_children()


async def send(engine: Replicas, prompt: list[int], request_id: str, **params: Any) -> tuple[int, list[int]]:
    """The number of the engine that answered, and the tokens."""
    number = engine.route(prompt)
    async with aclosing(engine.generate(prompt, SamplingParams(**params), request_id, number=number)) as deltas:
        return number, [token async for delta in deltas for token in delta.token_ids]


def test_requests_are_shared_out_and_prefixes_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "CHUNK", 16)

    async def test(engine: Replicas) -> None:
        stats: list[tuple[int, int]] = []
        engine.add_stats_listener(lambda found, number: stats.append((found.iteration_tokens, number)))
        found = await asyncio.gather(*(send(engine, [SLOW, n], str(n), max_tokens=5) for n in range(4, 12)))
        assert sorted(number for number, _ in found) == [0] * 4 + [1] * 4
        assert all(tokens == list(range(n + 1, n + 6)) for n, (_, tokens) in enumerate(found, 4))
        assert engine._load == [0, 0]
        assert {number for tokens, number in stats if tokens} == {0, 1}
        long = list(range(1000, 1000 + 3 * router.CHUNK))
        first, _ = await send(engine, [*long[: 2 * router.CHUNK], 1], "first", max_tokens=1)
        assert [engine.route([*long, n]) for n in range(4)] == [first] * 4, "its prefix is there"
        assert engine.route(long, "salt") == 0, "a salt shares nothing: the idlest, the first of equals"
        engine._load[first] = router.MORE + 1
        assert engine.route(long) != first, "not where much more is to do"
        engine._load[first] = 0

    with_engines(2, test)


def test_a_request_that_is_refused_leaves_no_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that was only routed; a request whose prompt another was routed behind leaves its own."""
    monkeypatch.setattr(router, "CHUNK", 16)

    async def test(engine: Replicas) -> None:
        long = list(range(1000, 1000 + 3 * router.CHUNK))
        engine._load[0] = 1
        assert engine.route(long) == 1
        with pytest.raises(InvalidRequest):
            engine.generate(long, SamplingParams(max_tokens=10**6), "refused", number=1)
        engine._load[0] = 0
        assert engine.route(long) == 0, "the idlest, the first of equals"
        engine._load[0] = 1
        assert engine.route(long) == 1
        assert engine.route([1] * 2 * router.CHUNK) == 1
        async with aclosing(engine.generate(long, SamplingParams(max_tokens=1), "served", number=1)) as deltas:
            assert [delta async for delta in deltas]
        engine._load[0] = 0
        assert [engine.route([*long, 1]), engine.route([1] * 2 * router.CHUNK)] == [1, 0]

    with_engines(2, test)


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_engine_that_dies_is_started_again_and_the_others_go_on(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "WAITS", (0.3, 0.1))

    async def test(engine: Replicas) -> None:
        running = [asyncio.create_task(send(engine, [SLOW, n], str(n), max_tokens=90)) for n in (1, 2)]
        await asyncio.sleep(0.3)
        dying = engine.engines[1]
        assert dying is not None
        os.kill(dying._processes._processes[-1].pid or 0, signal.SIGKILL)
        assert len((await running[0])[1]) == 90
        with pytest.raises(EngineDead, match="was killed"):
            await running[1]
        assert engine.healthy
        deadline = time.monotonic() + 30
        while engine.engines[1] is None or engine.engines[1] is dying:
            assert engine.route([1, 2, 3]) == 0
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        assert (await asyncio.gather(*(send(engine, [SLOW, n], f"again {n}", max_tokens=3) for n in (5, 6)))) == [
            (0, [6, 7, 8]), (1, [7, 8, 9]),
        ]  # fmt: skip

    with_engines(2, test, tensor_parallel_size=ranks)


def test_when_no_engine_can_be_started_any_more_that_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "WAITS", (0.05,))

    async def test(engine: Replicas) -> None:
        async def fails(*given: Any) -> AsyncEngine:
            raise OctavoError("The weights are gone.")

        monkeypatch.setattr(AsyncEngine, "start", fails)
        for one in engine.engines:
            assert one is not None
            os.kill(one._processes._processes[0].pid or 0, signal.SIGKILL)
        assert await asyncio.wait_for(engine.death(), 20) == "The weights are gone."
        assert not engine.healthy
        with pytest.raises(EngineDead, match="No engine is left"):
            engine.route([1])

    with_engines(2, test)


def test_an_id_that_no_token_has_is_refused_in_a_sentence() -> None:
    async def test(engine: Replicas) -> None:
        for wrong in (2**63, -(2**63) - 1, 4096):
            with pytest.raises(InvalidRequest, match=f"Token id {wrong} is out of the vocabulary"):
                await send(engine, [wrong] * router.CHUNK, "r", max_tokens=1)
        assert (await send(engine, [1], "r", max_tokens=1))[1] == [2]

    with_engines(2, test)


def test_an_engine_that_cannot_load_ends_the_others() -> None:
    async def main() -> None:
        with pytest.raises(OctavoError, match=r"^There is no such model\.$"):
            await start_engine(EngineConfig(data_parallel_size=2, seed=1), make_core=FakeCore)

    asyncio.run(main())
    assert not multiprocessing.active_children()


def test_metrics_have_a_label_for_each_engine() -> None:
    from octavo.server.metrics import Metrics

    metrics = Metrics("m", 2)
    metrics.on_step(EngineStats(num_running=3), 1)
    text = asyncio.run(metrics.text()).decode()
    assert 'vllm:num_requests_running{engine="0",model_name="m"} 0.0' in text
    assert 'vllm:num_requests_running{engine="1",model_name="m"} 3.0' in text
