"""The process that compiles an engine's kernels: this engine's side of `octavo.ops.triton.compile_server`.

It is begun before torch is imported here, since importing takes it as long; so nothing in this file imports torch.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from concurrent.futures import Future
from contextlib import suppress
from itertools import count
from multiprocessing import Pipe
from typing import Any

from octavo.config import EngineConfig
from octavo.host import has_accelerator

__all__ = ["CompileProcess", "begin", "begun"]

log = logging.getLogger(__name__)

_begun: CompileProcess | None = None


class CompileProcess:
    """A process that imports what it needs, and then waits for a device and kernels."""

    def __init__(self) -> None:
        self.connection, own = Pipe()
        imported = f"import sys; sys.path[:] = {sys.path!r}; from octavo.ops.triton.compile_server import main"
        with own:
            words = [sys.executable, "-c", f"{imported}; main({own.fileno()})"]
            self.process = subprocess.Popen(  # Ctrl-C is for the engine, whose end closes the connection
                words, stdin=subprocess.DEVNULL, pass_fds=[own.fileno()], start_new_session=True
            )
        self._numbers, self._waiting = count(), dict[int, Future[None]]()
        self._receiver: threading.Thread | None = None

    def describe(self, device: Any) -> None:
        """Kernels are for `device`, an octavo.platform.Described."""
        self._send(device)
        self._receiver = threading.Thread(target=self._receive, name="octavo-compiled", daemon=True)
        self._receiver.start()

    def submit(self, module: str, name: str, specialization: str) -> Future[None]:
        """Has a kernel compiled into Triton's cache. The future fails where that did."""
        made: Future[None] = Future()
        number = next(self._numbers)
        self._waiting[number] = made
        if not self._send((number, module, name, specialization)):
            self._fail()
        return made

    def _send(self, message: object) -> bool:
        """False where the process has ended."""
        try:
            self.connection.send(message)
        except OSError:
            return False
        return True

    def _receive(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                number, error = self.connection.recv()
                made = self._waiting.pop(number)
                if error:
                    made.set_exception(RuntimeError(error))
                else:
                    made.set_result(None)
        self.connection.close()
        self._fail()
        self.process.wait()

    def _fail(self) -> None:
        while self._waiting:
            with suppress(KeyError):
                self._waiting.popitem()[1].set_exception(RuntimeError("the process that compiles has ended"))

    def close(self) -> None:
        """Ends the process, which has nothing more to do. Does not wait for it."""
        if self._receiver is None:
            self.describe(None)
        self._send(None)


def begin(config: EngineConfig) -> None:
    """Begins the process, if the engine of `config` may want it."""
    global _begun
    if _begun is None and config.device != "cpu" and not config.enforce_eager and has_accelerator():
        _begun = CompileProcess()


def begun() -> CompileProcess | None:
    """The process that was begun, once."""
    global _begun
    found, _begun = _begun, None
    return found
