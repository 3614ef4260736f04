"""What an operator does to running engines: reloading weights, sleep, pause, emptying the prefix cache.

Several engines (--data-parallel-size) do it together. One operation runs at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from octavo.config import EngineConfig
from octavo.errors import OctavoError
from octavo.files import check_directory
from octavo.frontend.async_engine import AsyncEngine
from octavo.frontend.engine_start import EngineDead
from octavo.frontend.router import Engine, Replicas
from octavo.hub.snapshots import is_hub_name, snapshot_of
from octavo.messages import KV_CACHE, WEIGHTS

__all__ = ["Mode", "Operations"]

Mode = Literal["abort", "wait"]  # what happens to requests that run: an error at once, or they may end
ASLEEP = "The engine sleeps; wake it (POST /wake_up) and send the request again."
RELOADED = "The weights were reloaded before this answer was complete; send the request again."
PAUSED = "The server was paused before this answer was complete; send the request again once it goes on."


class Operations:
    """Operations on `engine`. Raises OctavoError where the engines refuse one; they are then as before."""

    def __init__(self, engine: Engine, config: EngineConfig):
        self.engine, self.config = engine, config
        self.directory = config.model  # whose weights are served
        self.awake: frozenset[str] = frozenset((WEIGHTS, KV_CACHE))
        self.paused = False
        self._reloads = 0
        self._one_at_a_time = asyncio.Lock()
        if isinstance(engine, Replicas):
            engine.prepare = self._bring_up

    @property
    def asleep(self) -> bool:
        """Whether requests are refused, because the engine has no weights or no cache."""
        return KV_CACHE not in self.awake

    async def reload(self, directory: str | None = None, mode: Mode = "wait") -> float:
        """Loads the weights of a checkpoint directory, or those of the present one again. Returns the seconds it took.

        Every engine and rank reads the whole checkpoint before any writes. Requests that run are completed first, or end with
        an error; those that come meanwhile wait for the new weights. So each answer is of one model.
        """
        began = time.monotonic()
        async with self._one_at_a_time:
            wanted = await asyncio.to_thread(_checkpoint, self.directory if directory is None else directory)
            engines = self.engine.alive
            await _all(engines, "check_reload", wanted)
            async with _quiet(engines, mode, RELOADED):
                await _all(engines, "reload", wanted, True)
            self.directory = wanted
            self._reloads += 1
            self.engine.forget_prefixes()
        return time.monotonic() - began

    async def sleep(self, mode: Mode = "abort") -> None:
        """Frees weights and cache. Requests are refused until `wake`. Does nothing where everything sleeps."""
        async with self._one_at_a_time:
            if not self.awake:
                return
            engines = self.engine.alive
            for engine in engines:
                engine.admission.refuse(EngineAsleep(ASLEEP), waiting=not self.paused)  # what a pause holds waits on
            try:
                async with _quiet(engines, mode, ASLEEP):
                    await _all(engines, "sleep")
            except BaseException:
                self._admit(engines)
                raise
            self.awake = frozenset()
            self.engine.forget_prefixes()

    async def wake(self, parts: Collection[str] = (WEIGHTS, KV_CACHE)) -> None:
        """Loads or makes again what sleeps of `parts`; requests are served once both are there."""
        async with self._one_at_a_time:
            engines = self.engine.alive
            for part in (WEIGHTS, KV_CACHE):
                if part in parts and part not in self.awake:
                    await _all(engines, "wake", (part,))
                    self.awake |= {part}
            self._admit(engines)

    async def reset_prefix_cache(self) -> None:
        """Forgets the prefixes of past requests. Requests that run go on."""
        async with self._one_at_a_time:
            await _all(self.engine.alive, "reset_prefix_cache")
            self.engine.forget_prefixes()

    async def pause(self, mode: Mode = "abort", clear_cache: bool = True) -> None:
        """From now on requests wait until `resume`. Those that run are completed first, or end with an error."""
        async with self._one_at_a_time:
            engines = self.engine.alive
            if not self.paused:
                self.paused = True
                for engine in engines:
                    engine.admission.hold()
            async with _quiet(engines, mode, PAUSED):
                if clear_cache:
                    await _all(engines, "reset_prefix_cache")
                    self.engine.forget_prefixes()

    async def resume(self) -> None:
        """Ends a pause. Does nothing without one."""
        async with self._one_at_a_time:
            if self.paused:
                self.paused = False
                for engine in self.engine.alive:
                    engine.admission.release()

    def _admit(self, engines: Sequence[AsyncEngine]) -> None:
        if not self.asleep:
            for engine in engines:
                engine.admission.refuse(None, waiting=not self.paused)

    async def _bring_up(self, fresh: AsyncEngine) -> None:
        """Brings an engine that was started again to where the others are."""
        async with self._one_at_a_time:
            if self._reloads:  # the directory may be the same one, rewritten
                await fresh.control("reload", self.directory, False)
            if self.asleep:
                await fresh.control("sleep")
                await fresh.control("wake", tuple(self.awake))
                fresh.admission.refuse(EngineAsleep(ASLEEP))
            if self.paused:
                fresh.admission.hold()


class EngineAsleep(OctavoError):
    """The engine has no weights or no cache now."""


@asynccontextmanager
async def _quiet(engines: Sequence[AsyncEngine], mode: Mode, why: str) -> AsyncGenerator[None, None]:
    """While no request runs: those that run are awaited or ended with the error `why`, those that come are held."""
    for engine in engines:
        engine.admission.hold()
    try:
        if mode == "abort":
            for engine in engines:
                engine.end_running(OctavoError(why))
        await asyncio.gather(*(engine.idle() for engine in engines))
        yield
    finally:
        for engine in engines:
            engine.admission.release()


async def _all(engines: Sequence[AsyncEngine], *message: Any) -> None:
    """A control of every engine. One that dies is no error while another lives: it is started again."""
    found = await asyncio.gather(*(engine.control(*message) for engine in engines), return_exceptions=True)
    errors = [error for error in found if isinstance(error, BaseException)]
    refused = [error for error in errors if not isinstance(error, EngineDead)]
    if refused or len(errors) == len(engines):
        raise next(iter([*refused, *errors]), EngineDead("No engine is left; they are being started again."))


def _checkpoint(given: str) -> str:
    """The checkpoint directory that a path names. Raises OctavoError for what is none."""
    if "\0" in given or not given:
        raise OctavoError("The path of a checkpoint directory is missing or holds a zero byte; send it as model_path.")
    if is_hub_name(given):
        raise OctavoError(f"A reload takes a directory, and {given} is a name of the hub; download it, and send its path.")
    directory = snapshot_of(given)
    check_directory(Path(directory))
    return directory
