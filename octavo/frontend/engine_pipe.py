"""The pipes to an engine's processes, served by threads, so that the event loop never waits for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue

from octavo.frontend.engine_processes import EngineProcesses
from octavo.messages import Message

__all__ = ["EnginePipe"]


class EnginePipe:
    """One thread writes, and one for each connection reads and hands each message to the loop as a whole.

    receive: is called in the event loop with each message; with ("dead", sentence) once a process is gone.
    """

    def __init__(self, processes: EngineProcesses, receive: Callable[[Message], None]):
        self._loop = asyncio.get_running_loop()
        self._processes, self._received = processes, receive
        self._outbox: SimpleQueue[Message | None] = SimpleQueue()
        threading.Thread(target=self._write, name="octavo-write", daemon=True).start()
        for n in range(len(processes.connections)):
            threading.Thread(target=self._read, args=(n,), name="octavo-read", daemon=True).start()

    def send(self, message: Message) -> None:
        self._outbox.put(message)

    def close(self) -> None:
        """Ends the writing thread. The readers end with the processes."""
        self._outbox.put(None)

    def _write(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                self._processes.send(message)
                del message  # may hold images
        except OSError:
            pass  # the process is gone, which the reader thread reports
        except Exception as error:
            self._report_death(f"A request cannot be sent to the engine ({type(error).__name__}).")

    def _read(self, n: int) -> None:
        try:
            while True:
                self._loop.call_soon_threadsafe(self._received, self._processes.receive(n))
        except (EOFError, OSError):
            sentence = self._processes.how_it_ended()
        except RuntimeError:
            return  # the loop is closed
        except Exception as error:
            sentence = f"What the engine sent cannot be read ({type(error).__name__})."
        self._report_death(sentence)

    def _report_death(self, sentence: str) -> None:
        try:
            self._loop.call_soon_threadsafe(self._received, ("dead", sentence))
        except RuntimeError:
            return  # the loop is closed
