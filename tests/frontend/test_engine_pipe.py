"""An engine's pipes as an event loop sees them: nothing is lost, however much is written and whichever loop reads."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, cast

import pytest

from octavo import pipes
from octavo.frontend.engine_pipe import EnginePipe
from octavo.frontend.engine_processes import EngineProcesses
from octavo.messages import Message
from octavo.server.serve import loop_factory

LONG = ("add", list(range(1 << 20)))  # a prompt's tokens: several times what a socket holds


class Processes:
    """An engine whose process is this one."""

    def __init__(self, connection: Connection):
        self.connections = [connection]

    def send(self, message: Message) -> None:
        if message[0] == "full":
            raise OSError("no memory for it")
        pipes.send(self.connections, message)

    def note(self, n: int, message: Message) -> None:
        pass


def pipe_of(connection: Connection, received: list[Message]) -> EnginePipe:
    return EnginePipe(cast("EngineProcesses", Processes(connection)), received.append)


async def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("loop", [loop_factory(), asyncio.new_event_loop])
def test_an_engine_that_reads_late_gets_all(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """A loop of libuv's makes what it reads from non-blocking, for whoever writes to it as well."""

    async def run() -> None:
        engine, own = multiprocessing.Pipe()
        received: list[Message] = []
        pipe = pipe_of(own, received)
        pipe.send(LONG)
        pipe.send(("abort", ["a"]))
        await asyncio.sleep(0.2)  # in which the writer fills the socket
        got: list[Any] = []
        reader = threading.Thread(target=lambda: got.extend(pipes.receive(engine) for _ in range(2)), daemon=True)
        reader.start()
        await until(lambda: len(got) == 2)
        assert got == [LONG, ("abort", ["a"])]
        engine.send(("step", [], None))
        await until(lambda: received)
        assert received == [("step", [], None)]
        pipe.close()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(run())


def test_what_cannot_be_written_is_said() -> None:
    """The engine lives, so that no reader would report it, and its requests would wait for ever."""

    async def run() -> None:
        engine, own = multiprocessing.Pipe()
        received: list[Message] = []
        pipe = pipe_of(own, received)
        pipe.send(("full",))
        await until(lambda: received)
        assert received == [("dead", "A request cannot be sent to the engine (no memory for it).")]
        pipe.close()
        engine.close()

    asyncio.run(run())
