"""What an operator does to running engines: reloading weights, sleep, pause, emptying the prefix cache.

Several engines (--data-parallel-size) do it together. One operation runs at a time. One that is cancelled while it waits, for
another or for answers that run, is taken back; what the engines do is done to its end.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Collection, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal

from octavo.config import EngineConfig
from octavo.errors import OctavoError
from octavo.frontend.async_engine import AsyncEngine
from octavo.frontend.engine_start import EngineDead
from octavo.frontend.model_files import checkpoint_to_load
from octavo.frontend.router import Engine, Replicas
from octavo.messages import KV_CACHE, WEIGHTS

__all__ = ["Mode", "Operations"]

logger = logging.getLogger(__name__)

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
            wanted = await asyncio.to_thread(checkpoint_to_load, self.directory if directory is None else directory)
            engines = self.engine.alive
            await _to_its_end(_all(engines, "check_reload", wanted))
            async with _quiet(engines, mode, RELOADED):
                await _to_its_end(self._reload(engines, wanted, began))
        return time.monotonic() - began

    async def _reload(self, engines: Sequence[AsyncEngine], wanted: str, began: float) -> None:
        await _all(engines, "reload", wanted, True)
        self.directory = wanted
        self._reloads += 1
        self.engine.forget_prefixes()
        logger.warning("octavo: loaded the weights of %s in %.2f s", wanted, time.monotonic() - began)

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
                    await _to_its_end(self._sleep(engines))
            except BaseException:
                self._admit(engines)
                raise

    async def _sleep(self, engines: Sequence[AsyncEngine]) -> None:
        await _all(engines, "sleep")
        self.awake = frozenset()
        self.engine.forget_prefixes()

    async def wake(self, parts: Collection[str] = (WEIGHTS, KV_CACHE)) -> None:
        """Loads or makes again what sleeps of `parts`; requests are served once both are there."""
        async with self._one_at_a_time:
            await _to_its_end(self._wake(self.engine.alive, parts))

    async def _wake(self, engines: Sequence[AsyncEngine], parts: Collection[str]) -> None:
        for part in (WEIGHTS, KV_CACHE):
            if part in parts and part not in self.awake:
                await _all(engines, "wake", (part,))
                self.awake |= {part}
        self._admit(engines)

    async def reset_prefix_cache(self) -> None:
        """Forgets the prefixes of past requests. Requests that run go on."""
        async with self._one_at_a_time:
            await _to_its_end(self._reset(self.engine.alive))

    async def _reset(self, engines: Sequence[AsyncEngine]) -> None:
        await _all(engines, "reset_prefix_cache")
        self.engine.forget_prefixes()

    async def pause(self, mode: Mode = "abort", clear_cache: bool = True) -> None:
        """From now on requests wait until `resume`. Those that run are completed first, or end with an error."""
        async with self._one_at_a_time:
            engines, began = self.engine.alive, not self.paused
            if began:
                self.paused = True
                for engine in engines:
                    engine.admission.hold()
            try:
                async with _quiet(engines, mode, PAUSED):
                    if clear_cache:
                        await _to_its_end(self._reset(engines))
            except BaseException:
                if began:
                    self._resume(engines)
                raise

    async def resume(self) -> None:
        """Ends a pause. Does nothing without one."""
        async with self._one_at_a_time:
            if self.paused:
                self._resume(self.engine.alive)

    def _resume(self, engines: Sequence[AsyncEngine]) -> None:
        self.paused = False
        for engine in engines:
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


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Awaits what is not to be left half done: where this is cancelled, the cancellation waits for it."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait((task,))
        task.exception()  # otherwise it would be printed
        raise


async def _all(engines: Sequence[AsyncEngine], *message: Any) -> None:
    """A control of every engine. One that dies is no error while another lives: it is started again."""
    found = await asyncio.gather(*(engine.control(*message) for engine in engines), return_exceptions=True)
    errors = [error for error in found if isinstance(error, BaseException)]
    refused = [error for error in errors if not isinstance(error, EngineDead)]
    if refused or len(errors) == len(engines):
        raise next(iter([*refused, *errors]), EngineDead("No engine is left; they are being started again."))
