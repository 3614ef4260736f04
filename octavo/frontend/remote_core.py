"""An engine in processes of its own for one thread that waits for it: what LLM uses for several ranks."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from octavo.config import EngineConfig
from octavo.errors import OctavoError
from octavo.frontend.engine_processes import EngineProcesses
from octavo.frontend.gathering import nodes_of
from octavo.messages import KV_CACHE, WEIGHTS, EngineInfo, EngineRequest, EngineStats, Message, TokenOutput

__all__ = ["RemoteCore"]

STALL_SECONDS = 300.0  # without a step after which ranks are asked whether one hangs; octavo serve: --engine-timeout
POLL_SECONDS = 0.1


class RemoteCore:
    """The methods of an EngineCore over processes of their own, one a rank. Raises OctavoError when the engine dies."""

    def __init__(self, config: EngineConfig):
        if (nodes := nodes_of(config)) is not None:
            nodes.gather()
        self._processes = EngineProcesses(config, nodes=nodes)
        self._running: set[str] = set()
        self._dead: str | None = None  # why the engine is gone
        self.info: EngineInfo = cast("EngineInfo", self._until("ready")[1])

    def __del__(self) -> None:
        if (processes := vars(self).get("_processes")) is not None:
            processes.kill()

    def add(self, *requests: EngineRequest) -> None:
        self._running.update(request.request_id for request in requests)
        self._send(("add", list(requests)))

    def abort(self, request_id: str) -> None:
        if request_id in self._running:
            self._running.remove(request_id)
            self._send(("abort", [request_id]))

    def has_work(self) -> bool:
        return bool(self._running)

    def step(self) -> tuple[list[TokenOutput], EngineStats]:
        """Waits for the next step of the engine, which runs on by itself."""
        _, outputs, stats = self._until("step")
        for output in outputs:
            if output.finish_reason is not None:
                self._running.discard(output.request_id)
        return outputs, stats

    def reload(self, model: str) -> None:
        """As EngineCore's, as are the others."""
        self._control("reload", model)

    def reset_prefix_cache(self) -> None:
        self._control("reset_prefix_cache")

    def sleep(self) -> None:
        self._control("sleep")

    def wake(self, parts: Collection[str] = (WEIGHTS, KV_CACHE)) -> None:
        self._control("wake", tuple(parts))

    def _control(self, *message: Any) -> None:
        if self._running:
            raise OctavoError(
                "weights are reloaded or freed only while no request runs; wait for the running ones, or abort them."
            )
        self._send(message)
        _, error, self.info = self._until("done")
        if error is not None:
            raise OctavoError(error)

    def _send(self, message: Message) -> None:
        if self._dead is not None:
            raise OctavoError(self._dead)
        try:
            self._processes.send(message)
        except OSError:
            raise self._gone(self._processes.how_it_ended()) from None

    def _gone(self, sentence: str) -> OctavoError:
        """The engine has ended, and with it every request."""
        self._dead = sentence
        self._running.clear()
        self._processes.tell_nodes(sentence)
        self._processes.kill()
        return OctavoError(sentence)

    def _until(self, kind: str) -> Any:
        """The next message of this kind."""
        asked: Future[str | None] | None = None
        with ThreadPoolExecutor(1) as pool:
            while True:
                patience = STALL_SECONDS if kind == "step" else None  # others may take as long as a disk does
                found = wait(self._processes.connections, patience if asked is None else POLL_SECONDS)
                if not found and asked is None:
                    asked = pool.submit(self._processes.hanging)  # whose answers are read here
                if asked is not None and asked.done():
                    if (sentence := asked.result()) is not None:
                        raise self._gone(sentence)
                    asked = None
                for connection in found:
                    if (message := self._received(cast("Connection", connection)))[0] == kind:
                        return message

    def _received(self, connection: Connection) -> Message:
        """A rank's next message. Raises OctavoError where it says that the engine is dead."""
        try:
            message = self._processes.receive(self._processes.connections.index(connection))
        except (EOFError, OSError):
            raise self._gone(self._processes.how_it_ended()) from None
        if message[0] in ("failed", "dead"):
            raise self._gone(message[1])
        return message
