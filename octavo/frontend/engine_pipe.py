"""The pipes to an engine's processes: a thread writes, since the event loop must never wait for them, and the loop reads."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

from octavo.frontend.engine_processes import EngineProcesses
from octavo.messages import Message
from octavo.pipes import Incoming

__all__ = ["EnginePipe"]


class EnginePipe:
    """receive: is called in the event loop with each message; with ("dead", sentence) once a process is gone."""

    def __init__(self, processes: EngineProcesses, receive: Callable[[Message], None]):
        self._loop = asyncio.get_running_loop()
        self._processes, self._received = processes, receive
        self._outbox: SimpleQueue[Message | None] = SimpleQueue()
        threading.Thread(target=self._write, name="octavo-write", daemon=True).start()
        self._incoming = dict(enumerate(map(Incoming, processes.connections)))
        for n, incoming in self._incoming.items():
            self._loop.add_reader(incoming.fileno(), self._read, n)
            os.set_blocking(incoming.fileno(), True)  # which uvloop unset: the thread that writes would lose messages

    def send(self, message: Message) -> None:
        self._outbox.put(message)

    def close(self) -> None:
        """Ends writing and reading."""
        self._outbox.put(None)
        for n in list(self._incoming):
            self._end(n)

    def _write(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                self._processes.send(message)
                del message  # may hold images
        except ConnectionError:
            pass  # the process is gone, which the reader reports
        except Exception as error:
            self._report_death(f"A request cannot be sent to the engine ({error or type(error).__name__}).")

    def _read(self, n: int) -> None:
        try:
            for message in self._incoming[n].take():
                self._processes.note(n, message)
                self._loop.call_soon(self._received, message)  # one that fails there must not cost those that follow
            return
        except (EOFError, OSError):
            threading.Thread(target=self._say_how_it_ended, name="octavo-end", daemon=True).start()  # it waits for the process
        except Exception as error:
            self._report_death(f"What the engine sent cannot be read ({type(error).__name__}).")
        self._end(n)

    def _end(self, n: int) -> None:
        if (incoming := self._incoming.pop(n, None)) is not None and not self._loop.is_closed():
            self._loop.remove_reader(incoming.fileno())

    def _say_how_it_ended(self) -> None:
        self._report_death(self._processes.how_it_ended())

    def _report_death(self, sentence: str) -> None:
        try:
            self._loop.call_soon_threadsafe(self._received, ("dead", sentence))
        except RuntimeError:
            return  # the loop is closed
