"""Asyncio client of an engine process. The API process never imports torch."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.config import EngineConfig
from octavo.errors import InvalidRequest, OctavoError
from octavo.files import check_directory
from octavo.frontend.admission import Admission
from octavo.frontend.engine_pipe import EnginePipe
from octavo.frontend.engine_processes import EngineProcesses
from octavo.frontend.engine_start import EngineDead
from octavo.frontend.engine_stream import DeltaQueue, End, EngineStream, Tap
from octavo.frontend.gathering import gathered
from octavo.frontend.image_support import ImageSupport, image_support
from octavo.frontend.nodes import Nodes
from octavo.frontend.outputs import Delta, OutputProcessor
from octavo.frontend.requests import engine_requests
from octavo.frontend.text_sources import generation_of
from octavo.images import PlacedImage
from octavo.messages import EngineInfo, EngineRequest, EngineStats, Message, Progress, SamplingParams, TokenOutput
from octavo.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from octavo.engine.worker import MakeCore

__all__ = ["AsyncEngine", "EngineDead"]

IDLE_POLL = 0.01  # seconds
TURN_SECONDS = 0.005  # for which a request may hold the event loop before it yields


class AsyncEngine:
    """An engine in a process of its own. Make one with `await AsyncEngine.start(config)`, end it with `shutdown()`."""

    info: EngineInfo
    tokenizer: Tokenizer | None
    eos_token_ids: frozenset[int]
    images: ImageSupport

    def __init__(
        self, config: EngineConfig, make_core: MakeCore | None = None, on_progress: Progress | None = None, replica: int = 0,
        nodes: Nodes | None = None,
    ):  # fmt: skip
        """Starts the processes without waiting for them. Use `start` to get an engine that is ready."""
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[EngineInfo] = self._loop.create_future()
        self._on_progress = on_progress
        self._streams: dict[str, EngineStream] = {}
        self._listeners: list[Callable[[EngineStats], None]] = []
        self._dead: str | None = None
        self._death: asyncio.Future[str] = self._loop.create_future()
        self._closing = False
        self._waiting_since: float | None = None  # loop time since which an answer is due; None while the engine is idle
        self.admission = Admission()
        self._answers: deque[asyncio.Future[None]] = deque()  # of the controls that were sent, in their order
        self._processes = EngineProcesses(config, make_core, replica=replica, nodes=nodes)
        self._pipe = EnginePipe(self._processes, self._receive)

    @classmethod
    async def start(
        cls, config: EngineConfig, on_progress: Progress | None = None, make_core: MakeCore | None = None, replica: int = 0
    ) -> AsyncEngine:
        """A ready engine, number `replica` of the configuration's. `on_progress(stage, fraction)` is called while loading.

        Raises OctavoError if loading fails.
        """
        check_directory(Path(config.model))  # reports a wrong path at once, where the process would take seconds
        engine = cls(config, make_core, on_progress, replica, await gathered(config))
        try:
            generation = generation_of(config)
            engine.tokenizer = await asyncio.to_thread(load_tokenizer, config.text_directory, generation)
            engine.eos_token_ids = engine.tokenizer.eos_token_ids if engine.tokenizer else generation.eos_token_ids()
            engine.info = await engine._ready
            engine.images = await asyncio.to_thread(image_support, config, engine.info)
        except BaseException:  # a cancelled start must not leave a process behind
            await engine._kill()
            raise
        return engine

    @property
    def healthy(self) -> bool:
        """False once the engine died or was shut down."""
        return self._dead is None

    async def death(self) -> str:
        """Waits for the engine to die, and returns why in a sentence. Does not return after a shutdown."""
        return await asyncio.shield(self._death)

    @property
    def silent_seconds(self) -> float:
        """Seconds for which the engine has had work and sent nothing; 0 while it has none, and once it is dead.

        0 also during a control, because reading a checkpoint may take any time.
        """
        if self._waiting_since is None or self._dead is not None or self._answers:
            return 0.0
        return self._loop.time() - self._waiting_since

    @property
    def default_sampling(self) -> dict[str, Any]:
        """The sampling parameters that the checkpoint recommends, by SamplingParams' names."""
        return self.tokenizer.default_sampling if self.tokenizer else {}

    async def end_if_a_rank_hangs(self) -> None:
        """Asks each of several ranks how far it is, and ends the engine if one hangs: the others would wait for ever."""
        several = len(self._processes.connections) > 1
        if several and (sentence := await asyncio.to_thread(self._processes.hanging)):
            self._die(sentence)
            await asyncio.to_thread(self._processes.kill)

    def add_stats_listener(self, listener: Callable[[EngineStats], None]) -> None:
        """Calls `listener` in the event loop with the statistics of each step."""
        self._listeners.append(listener)

    count = 1  # engines; see octavo.frontend.router

    @property
    def alive(self) -> list[AsyncEngine]:
        """The engines that serve; see octavo.frontend.router."""
        return [self] if self.healthy else []

    def forget_prefixes(self) -> None:
        """See octavo.frontend.router."""

    def route(self, token_ids: Sequence[int], salt: str | None = None, images: Sequence[PlacedImage] = ()) -> int:
        """The number of the engine that a prompt goes to; see octavo.frontend.router."""
        return 0

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
        """The deltas of one request, one per sequence and step, never merged; those that `tap` takes are not among them.

        Raises InvalidRequest at the call and not at the first delta, so that a server can still answer with an error. Raises
        EngineDead when the engine dies. Closing the generator early aborts the request.
        """
        self._raise_if_gone()
        given = (request_id, prompt_token_ids, params, self.eos_token_ids, cache_salt, images)
        return self._generate(engine_requests(self.info, self.tokenizer, *given), tap)

    async def _generate(self, requests: list[EngineRequest], tap: Tap | None) -> AsyncGenerator[Delta]:
        await self.admission.enter()
        self._raise_if_gone()  # again, because the first delta may be awaited much later
        if any(request.request_id in self._streams for request in requests):
            raise InvalidRequest(f"A request with the id {requests[0].request_id} is already running.", "request_id")
        queue = DeltaQueue()
        for index, request in enumerate(requests):
            self._streams[request.request_id] = EngineStream(OutputProcessor(request, self.tokenizer, index), queue, tap)
        self._send(("add", requests))  # one message, so that the parts they share are sent once
        ids = [request.request_id for request in requests]
        del request, requests  # its images are megabytes
        running, turn = len(ids), self._loop.time()
        try:
            while running:  # deltas of many sequences arrive together, so `get` may never yield to the loop
                if self._loop.time() - turn > TURN_SECONDS:
                    await asyncio.sleep(0)
                    turn = self._loop.time()
                delta = await queue.get()
                if isinstance(delta, OctavoError):
                    raise delta
                running -= delta.finish_reason is not None
                yield delta
        finally:
            left = [one for one in ids if self._streams.pop(one, None)]
            if left:
                self._send(("abort", left))

    async def shutdown(self, drain_seconds: float = 0.0) -> None:
        """Refuses new requests, lets running ones finish for `drain_seconds`, then ends the process. Never hangs."""
        self._closing = True
        deadline = self._loop.time() + drain_seconds
        while self._streams and self._loop.time() < deadline:
            await asyncio.sleep(0.02)
        self._fail_all("The engine was shut down.")
        self._pipe.send(("shutdown",))
        await asyncio.to_thread(self._processes.wait)
        await self._kill()

    async def control(self, *message: Any) -> None:
        """Has the engine do one of the CONTROLS, and waits until it is done. Raises OctavoError where it refuses or dies."""
        self._raise_if_gone()
        answer: asyncio.Future[None] = self._loop.create_future()
        self._answers.append(answer)
        self._pipe.send(message)
        await answer

    async def idle(self) -> None:
        """Waits until no request runs. Those that `admission` holds do not count."""
        while self._streams:
            await asyncio.sleep(IDLE_POLL)

    def fail_running(self, error: OctavoError) -> None:
        """Ends every request with `error`, also those that are held."""
        self.admission.fail(error)
        self.end_running(error)

    def end_running(self, error: OctavoError) -> None:
        """Ends the requests that the engine has."""
        if self._streams:
            self._send(("abort", list(self._streams)))
        for stream in self._streams.values():
            stream.queue.put(error)
        self._streams.clear()

    def _send(self, message: Message) -> None:
        """Sends a message that the engine answers with a step."""
        if self._waiting_since is None:
            self._waiting_since = self._loop.time()
        self._pipe.send(message)

    def _raise_if_gone(self) -> None:
        if self._dead is not None:
            raise EngineDead(self._dead)
        if self._closing:
            raise EngineDead("The engine is shutting down.")

    async def _kill(self) -> None:
        self._pipe.close()
        await asyncio.to_thread(self._processes.kill)  # which waits until they have ended, while other engines serve

    def _receive(self, message: Message) -> None:
        kind = message[0]
        if kind == "step":
            self._step(message[1], message[2])
        elif kind == "progress":
            if self._on_progress is not None:
                self._on_progress(message[1], message[2])
        elif kind == "ready":
            if not self._ready.done():
                self._ready.set_result(message[1])
            self._on_progress = None  # a bar that was closed should not come again
        elif kind == "done":
            self._done(message[1], message[2])
        elif kind != "pong":  # failed or dead
            self._die(message[1])

    def _step(self, outputs: list[TokenOutput], stats: EngineStats) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue  # aborted while the engine ran its last step
            end = stream.take(output)
            if end is not End.NOT_YET:
                del self._streams[output.request_id]
            if end is End.ABORT:
                self._send(("abort", [output.request_id]))
        busy = self._streams or stats.num_running or stats.num_waiting
        self._waiting_since = self._loop.time() if busy else None
        for listener in self._listeners:
            listener(stats)

    def _done(self, refusal: str | None, info: EngineInfo) -> None:
        self.info = info
        self._waiting_since = self._loop.time() if self._streams else None  # nobody waited for a step while a control ran
        answer = self._answers.popleft()
        if answer.done():
            return
        if refusal is None:
            answer.set_result(None)
        else:
            answer.set_exception(OctavoError(refusal))

    def _die(self, sentence: str) -> None:
        if self._dead is None:
            self._death.set_result(sentence)
            self._fail_all(sentence)
            self._processes.tell_nodes(sentence)

    def _fail_all(self, sentence: str) -> None:
        """Fails everything that waits for the engine, and tells the listeners that nothing runs."""
        if self._dead is not None:
            return
        self._dead = sentence
        if not self._ready.done():
            self._ready.set_exception(OctavoError(sentence))
        self.fail_running(EngineDead(sentence))
        for answer in self._answers:
            if not answer.done():
                answer.set_exception(EngineDead(sentence))
        self._answers.clear()
        for listener in self._listeners:
            listener(EngineStats())
