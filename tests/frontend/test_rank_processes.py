"""An engine of several ranks, each a process: when one dies or hangs, the engine ends and says which."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from frontend.test_async_engine import CRASH, SLOW, FakeCore, collect
from test_pipes import mappings

from octavo import pipes
from octavo.config import EngineConfig
from octavo.errors import OctavoError
from octavo.frontend import remote_core
from octavo.frontend.async_engine import AsyncEngine, EngineDead
from octavo.frontend.engine_processes import EngineProcesses
from octavo.images import Grid, ImagePatches, PlacedImage
from octavo.messages import EngineRequest, SamplingParams


async def start(ranks: int, seed: int = 0) -> AsyncEngine:
    return await AsyncEngine.start(EngineConfig(seed=seed, tensor_parallel_size=ranks), make_core=OnRank)


HANG = 670  # a prompt's token that makes rank 1 hang in a step, in which the others wait for each other


class OnRank(FakeCore):
    """Fails to load on rank 2 alone with seed 12."""

    def __init__(self, config: EngineConfig, progress: Any, place: Any):
        if config.seed == 12 and place.rank == 2:
            raise OctavoError("Rank 2 has no memory.")
        self.place = place
        super().__init__(config, progress)

    def step(self) -> Any:
        if any(HANG in request.prompt_token_ids for request, _ in self.running.values()):
            if self.place.rank == 1:
                time.sleep(600)
            self.place.wait_for_all()
        return super().step()


def with_ranks(ranks: int, test: Callable[[AsyncEngine], Awaitable[None]]) -> None:
    """Afterwards no process and no file of the engine is left."""
    directories: list[Path] = []

    async def main() -> None:
        engine = await start(ranks)
        directories.append(Path(engine._processes._directory or ""))
        assert directories[0].is_dir()
        try:
            await test(engine)
        finally:
            await engine.shutdown()

    asyncio.run(main())
    assert not multiprocessing.active_children()
    assert not directories[0].exists()


def pids(engine: AsyncEngine) -> list[int]:
    return [process.pid or 0 for process in engine._processes._processes]


def test_ranks_answer_as_one_does() -> None:
    async def test(engine: AsyncEngine) -> None:
        assert len(pids(engine)) == 3
        found = await asyncio.gather(*(collect(engine, [n], str(n), max_tokens=20) for n in (5, 50, 500)))
        tokens = [[token for delta in one for token in delta.token_ids] for one in found]
        assert tokens == [list(range(n + 1, n + 21)) for n in (5, 50, 500)]

    with_ranks(3, test)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_killed_rank_ends_every_stream(rank: int) -> None:
    async def test(engine: AsyncEngine) -> None:
        tasks = [asyncio.create_task(collect(engine, [SLOW], str(n), max_tokens=90)) for n in range(3)]
        await asyncio.sleep(0.2)
        began = time.monotonic()
        os.kill(pids(engine)[rank], signal.SIGKILL)
        for task in tasks:
            with pytest.raises(EngineDead, match=rf"^Rank {rank} of the engine was killed"):
                await asyncio.wait_for(task, 20)
        assert time.monotonic() - began < 20
        assert not engine.healthy

    with_ranks(3, test)


def test_pixels_are_shared_and_nothing_is_left_of_them() -> None:
    """Every rank has an image's pixels in shared memory; after kill -9 of one there is none, nor a file."""
    pixels, values = np.zeros((8, 3, 1, 1 << 18), np.uint8), np.zeros((3, 256), np.float32)
    image = PlacedImage(1, ImagePatches(pixels, values, 1, Grid(1, 2, 4), 2, bytes(32)))

    async def test(engine: AsyncEngine) -> None:
        deltas = engine.generate([SLOW, 5, 5], SamplingParams(max_tokens=90), "r", images=[image])
        await anext(deltas)
        for _ in range(2):  # a step later, every rank has the message
            await anext(deltas)
        assert [mappings(pid) for pid in pids(engine)] == [1, 1, 1]
        assert mappings() == 0
        os.kill(pids(engine)[1], signal.SIGKILL)
        with pytest.raises(EngineDead):
            [delta async for delta in deltas]

    before = os.listdir("/dev/shm")
    with_ranks(3, test)
    assert mappings() == 0
    assert not [fd for fd in Path("/proc/self/fd").iterdir() if pipes.NAME in os.path.realpath(fd)]
    assert sorted(os.listdir("/dev/shm")) == sorted(before)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_hangs_is_named(rank: int, capfd: pytest.CaptureFixture[str]) -> None:
    """Those that wait say where: rank 0 for messages of its pipe, the others for rank 0's."""

    async def test(engine: AsyncEngine) -> None:
        os.kill(pids(engine)[rank], signal.SIGSTOP)
        task = asyncio.create_task(collect(engine, [SLOW], max_tokens=90))
        await asyncio.sleep(0.2)
        await engine.end_if_a_rank_hangs()
        assert (await engine.death()).startswith(f"Of the engine's 3 ranks rank {rank} hangs")
        await asyncio.gather(task, return_exceptions=True)

    with_ranks(3, test)
    stacks = capfd.readouterr().err
    assert stacks.count("in run_engine") == 2, stacks


def test_an_llm_ends_where_a_rank_hangs_in_a_step(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """But not where a step takes long on every rank."""
    monkeypatch.setattr(remote_core, "EngineProcesses", partial(EngineProcesses, make_core=OnRank))
    monkeypatch.setattr(remote_core, "STALL_SECONDS", 0.01)
    core = remote_core.RemoteCore(EngineConfig(tensor_parallel_size=3))
    core.add(EngineRequest("slow", [SLOW], SamplingParams(max_tokens=20)))
    while core.has_work():
        core.step()
    core.add(EngineRequest("hangs", [HANG], SamplingParams(max_tokens=20)))
    with pytest.raises(OctavoError, match=r"^Of the engine's 3 ranks rank 1 hangs \(in step \d+, behind exchange \d+ of turn "):
        core.step()
    assert not multiprocessing.active_children()
    assert "octavo: rank 0 of 3 is in step 21, at exchange 0 of turn 23 with the others:" in capfd.readouterr().err


def test_what_one_rank_alone_cannot_load_is_said() -> None:
    async def main() -> None:
        with pytest.raises(OctavoError, match=r"^Rank 2 has no memory\.$"):
            await start(3, seed=12)

    asyncio.run(main())
    assert not multiprocessing.active_children()


def test_an_error_in_a_step_of_every_rank_is_said_once() -> None:
    async def test(engine: AsyncEngine) -> None:
        with pytest.raises(EngineDead, match=r"^The engine stopped: RuntimeError: the device fell off$"):
            await collect(engine, [CRASH], max_tokens=9)

    with_ranks(2, test)
