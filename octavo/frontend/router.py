"""Several engines behind one (--data-parallel-size): each has its own devices, weights and cache, and requests are shared out.

A request goes to the engine that has the longest part of its prompt in its prefix cache, as far as its past requests tell,
unless that engine has much more to do than another; else to the one with the least to do. An engine that dies is started again;
the others go on.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from array import array
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Self, cast

from octavo.config import EngineConfig
from octavo.errors import OctavoError, shortage
from octavo.frontend.async_engine import AsyncEngine
from octavo.frontend.engine_start import EngineDead
from octavo.frontend.engine_stream import Tap
from octavo.frontend.outputs import Delta
from octavo.images import PlacedImage
from octavo.messages import EngineInfo, EngineStats, Progress, SamplingParams

__all__ = ["MORE", "Engine", "Prefixes", "Replicas", "start_engine"]

logger = logging.getLogger(__name__)

CHUNK = 64  # tokens of a prompt that are remembered together: a block of a GPU's cache
REMEMBERED = 100_000  # chunks an engine
MORE = 4  # sequences that an engine with a longer prefix may run more than the idlest
WAITS = (1.0, 5.0, 20.0, 60.0)  # seconds before each attempt to start an engine again
LIVED = 300.0  # seconds after which an engine that dies has all attempts anew

MakeCore = Any
Listener = Callable[[EngineStats, int], None]


class Prefixes:
    """The prompts that an engine has seen, in chunks, the most recent ones."""

    def __init__(self) -> None:
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def length(self, chunks: Sequence[bytes]) -> int:
        """How many of the first chunks it has seen."""
        return next((n for n, chunk in enumerate(chunks) if chunk not in self._seen), len(chunks))

    def add(self, chunks: Sequence[bytes]) -> None:
        for chunk in chunks:
            self._seen[chunk] = None
            self._seen.move_to_end(chunk)
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)


def chunks_of(token_ids: Sequence[int], salt: str | None = None, images: Sequence[PlacedImage] = ()) -> list[bytes]:
    """A hash for each whole chunk of a prompt, of it and all before it; of images, their contents."""
    found, parent, left = [], (salt or "").encode(), deque(images)
    for start in range(0, len(token_ids) - CHUNK + 1, CHUNK):
        begun = b""
        while left and left[0].start < start + CHUNK:
            begun += left.popleft().image.digest
        try:
            chunk = array("q", token_ids[start : start + CHUNK]).tobytes()
        except OverflowError:  # no token has such an id, so the request is refused
            break
        parent = hashlib.blake2b(parent + chunk + begun, digest_size=16).digest()
        found.append(parent)
    return found


class _Counted:
    """A request's deltas, whose sequences count as an engine's load until it is closed or dropped."""

    def __init__(self, deltas: AsyncGenerator[Delta], load: list[int], number: int, sequences: int):
        self._deltas, self._load, self._number, self._sequences = deltas, load, number, sequences
        load[number] += sequences

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        return await anext(self._deltas)

    async def aclose(self) -> None:
        self._release()
        await self._deltas.aclose()

    def __del__(self) -> None:
        self._release()

    def _release(self) -> None:
        self._load[self._number] -= self._sequences
        self._sequences = 0


class Replicas:
    """The interface of an AsyncEngine over several."""

    def __init__(self, config: EngineConfig, engines: list[AsyncEngine], make_core: MakeCore | None = None):
        self.config, self._make_core = config, make_core
        self.engines: list[AsyncEngine | None] = list(engines)  # None: dead, and being started again
        self._load = [0] * len(engines)  # running sequences
        self._prefixes = [Prefixes() for _ in engines]
        self._routed: tuple[Sequence[int], list[bytes]] = ((), [])  # the prompt that `route` saw last, and its chunks
        self._listeners: list[Listener] = []
        self.prepare: Callable[[AsyncEngine], Awaitable[None]] | None = None  # of an engine that was started again
        self._given_up = 0  # engines that are not started any more
        self._info = engines[0].info
        self.tokenizer, self.eos_token_ids, self.images = engines[0].tokenizer, engines[0].eos_token_ids, engines[0].images
        self._all_dead: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._tasks = [asyncio.ensure_future(self._keep_alive(number)) for number in range(len(engines))]

    @property
    def info(self) -> EngineInfo:
        """Facts about the engine with the shortest context: what fits there fits everywhere."""
        self._info = min((engine.info for engine in self.alive), key=lambda info: info.max_model_len, default=self._info)
        return self._info

    @classmethod
    async def start(
        cls, config: EngineConfig, on_progress: Progress | None = None, make_core: MakeCore | None = None
    ) -> Replicas:
        """All engines, ready. They load side by side; `on_progress` tells of the first. Raises OctavoError if one fails."""
        starting: list[asyncio.Task[AsyncEngine]] = []
        try:
            for number in range(config.data_parallel_size):
                progress = on_progress if number == 0 else None
                starting.append(asyncio.ensure_future(AsyncEngine.start(config, progress, make_core, number)))
                if config.save_quantized is not None:  # the first writes what the others read
                    await starting[0]
            return cls(config, list(await asyncio.gather(*starting)), make_core)
        except BaseException:
            for task in starting:
                task.cancel()
            for found in await asyncio.gather(*starting, return_exceptions=True):
                if isinstance(found, AsyncEngine):
                    await found.shutdown()
            raise

    @property
    def count(self) -> int:
        """The number of engines."""
        return len(self.engines)

    @property
    def alive(self) -> list[AsyncEngine]:
        """The engines that serve."""
        return [engine for engine in self.engines if engine is not None and engine.healthy]

    def forget_prefixes(self) -> None:
        """The engines' prefix caches were emptied."""
        self._prefixes = [Prefixes() for _ in self.engines]

    @property
    def healthy(self) -> bool:
        """Whether some engine serves."""
        return any(engine is not None and engine.healthy for engine in self.engines)

    async def death(self) -> str:
        """Waits until no engine is left, and returns why the last one ended."""
        return await asyncio.shield(self._all_dead)

    @property
    def silent_seconds(self) -> float:
        """The most silent engine's."""
        return max((engine.silent_seconds for engine in self.engines if engine is not None), default=0.0)

    @property
    def default_sampling(self) -> dict[str, Any]:
        return self.tokenizer.default_sampling if self.tokenizer else {}

    def add_stats_listener(self, listener: Listener) -> None:
        """Calls `listener(stats, number of the engine)` for each step."""
        self._listeners.append(listener)
        for number, engine in enumerate(self.engines):
            if engine is not None:
                engine.add_stats_listener(partial(_numbered, listener, number))

    def route(self, token_ids: Sequence[int], salt: str | None = None, images: Sequence[PlacedImage] = ()) -> int:
        """The number of the engine that a prompt goes to. Raises EngineDead if none is left."""
        alive = [number for number, engine in enumerate(self.engines) if engine is not None and engine.healthy]
        if not alive:
            raise EngineDead("No engine is left; they are being started again.")
        chunks, least = chunks_of(token_ids, salt, images), min(self._load[number] for number in alive)
        busy = [number for number in alive if self._load[number] <= least + MORE]
        best = max(busy, key=lambda number: (self._prefixes[number].length(chunks), -self._load[number]))
        self._routed = token_ids, chunks
        return best

    def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        request_id: str,
        cache_salt: str | None = None,
        images: Sequence[PlacedImage] = (),
        number: int = 0,
        tap: Tap | None = None,
    ) -> AsyncGenerator[Delta]:
        """As AsyncEngine.generate, on the engine `number`, which `route` gave."""
        if (engine := self.engines[number]) is None:
            raise EngineDead(f"Engine {number} has died and is being started again; send the request again.")
        deltas = engine.generate(prompt_token_ids, params, request_id, cache_salt, images, tap=tap)
        routed, chunks = self._routed  # just now, where the caller did not wait in between
        if routed is not prompt_token_ids:
            chunks = chunks_of(prompt_token_ids, cache_salt, images)
        self._prefixes[number].add(chunks)  # a request that is refused leaves nothing in the engine's cache
        return cast("AsyncGenerator[Delta]", _Counted(deltas, self._load, number, params.n))

    async def shutdown(self, drain_seconds: float = 0.0) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(engine.shutdown(drain_seconds) for engine in self.engines if engine is not None))

    def fail_running(self, error: OctavoError) -> None:
        for engine in self.engines:
            if engine is not None:
                engine.fail_running(error)

    async def end_if_a_rank_hangs(self) -> None:
        await asyncio.gather(*(engine.end_if_a_rank_hangs() for engine in self.engines if engine is not None))

    async def _prepare(self, fresh: AsyncEngine) -> None:
        try:
            if self.prepare is not None:
                await self.prepare(fresh)
        except BaseException:
            await fresh.shutdown()
            raise

    async def _keep_alive(self, number: int) -> None:
        """Starts the engine again when it dies, some times."""
        waits, sentence = list(WAITS), ""
        while True:
            if (engine := self.engines[number]) is not None:
                began = time.monotonic()
                sentence = await engine.death()
                self.engines[number], self._prefixes[number] = None, Prefixes()
                logger.error("engine %d: %s The others go on.", number, sentence)
                await engine.shutdown()
                waits = list(WAITS) if time.monotonic() - began > LIVED else waits
            if not waits:
                break
            await asyncio.sleep(waits.pop(0))
            try:
                fresh = await AsyncEngine.start(self.config, None, self._make_core, number)
                await self._prepare(fresh)
            except Exception as error:  # the system's too: no file or thread may be left just now
                sentence = (
                    str(error) if isinstance(error, OctavoError) else shortage(error) or f"{type(error).__name__}: {error}"
                )
                logger.error("engine %d cannot be started again: %s", number, sentence)
                continue
            for listener in self._listeners:
                fresh.add_stats_listener(partial(_numbered, listener, number))
            self.engines[number] = fresh
            logger.error("engine %d serves again.", number)
        logger.error("engine %d is not started any more: %s", number, sentence)
        self._given_up += 1
        if self._given_up == len(self.engines):
            self._all_dead.set_result(sentence)


def _numbered(listener: Listener, number: int, stats: EngineStats) -> None:
    listener(stats, number)


Engine = AsyncEngine | Replicas


async def start_engine(config: EngineConfig, on_progress: Progress | None = None, make_core: MakeCore | None = None) -> Engine:
    """The engine of a configuration: one, or --data-parallel-size of them behind one. Raises OctavoError if loading fails."""
    kind = Replicas if config.data_parallel_size > 1 else AsyncEngine
    started: Engine = await kind.start(config, on_progress, make_core)
    return started
