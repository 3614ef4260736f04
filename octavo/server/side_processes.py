"""Side processes for work whose duration depends on a client's body or a checkpoint's template.

Neither jinja nor json can be interrupted, and both hold the interpreter's lock, which in a side process delays no stream. The
kernel ends a process that computes for too long. One that has grown large exits, which frees its memory.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, TypeVar

from octavo.errors import InvalidRequest, OctavoError, shortage

__all__ = ["Limits", "SideProcesses", "side_processes", "work"]

WALL_SECONDS = 60.0  # per call, for a very busy machine

T = TypeVar("T")


class Limits(NamedTuple):
    """Of one process. cpu_seconds: of computing per call. memory: bytes of address space. large: bytes at peak, after which it
    exits.
    """

    cpu_seconds: float = 3.0
    memory: int = 2**30
    large: int = 256 * 2**20


class _Process:
    """One side process and the pipe to it."""

    def __init__(self, limits: Limits) -> None:
        self.connection, theirs = Pipe()
        call = f"work({theirs.fileno()}, {', '.join(map(repr, limits))})"
        code = f"import sys; sys.path[:] = {sys.path!r}; from octavo.server.side_processes import work; {call}"
        try:
            self.popen = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        except BaseException:
            self.connection.close()
            raise
        finally:
            theirs.close()  # otherwise the end of the process would never be noticed

    def end(self, seconds: float = 0.0) -> int:
        """Kills the process if it does not exit within `seconds`. Returns the exit code."""
        self.connection.close()
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(seconds)
        self.popen.kill()
        return self.popen.wait()


class SideProcesses:
    """At most `most` processes, started on demand. Calls wait for a free process."""

    def __init__(self, most: int = 2, limits: Limits | None = None):
        self._limits = limits or Limits()
        self._threads = ThreadPoolExecutor(most, "octavo-side")  # one per process
        self._local = threading.local()
        self._all: set[_Process] = set()
        atexit.register(self.close)

    async def run(self, what: str, function: Callable[..., T], *args: Any) -> T:
        """Calls `function(*args)` in a process. The function must be picklable by name. Exceptions are raised here.

        Raises InvalidRequest, beginning with `what`, if it takes too long or too much memory.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._run, what, function, args)

    def start(self) -> None:
        """Starts the first process without waiting for it."""
        self._threads.submit(self._process)

    def close(self) -> None:
        """Kills the processes. The next call starts others."""
        for process in tuple(self._all):
            self._all.discard(process)
            process.popen.kill()
            process.popen.wait()

    def _process(self) -> _Process:
        """The process of this thread."""
        known: _Process | None = getattr(self._local, "process", None)
        if known is not None and known.popen.poll() is None:
            return known
        if known is not None:
            self._end(known)
        self._local.process = known = _Process(self._limits)
        self._all.add(known)
        return known

    def _end(self, process: _Process, seconds: float = 0.0) -> int:
        self._local.process = None
        self._all.discard(process)
        return process.end(seconds)

    def _run(self, what: str, function: Callable[..., T], args: tuple[Any, ...]) -> T:
        try:
            process = self._process()
        except OSError as error:
            raise OctavoError(shortage(error) or f"No process can be started ({error}).") from error
        late = False
        try:
            process.connection.send((function, args))
            if late := not process.connection.poll(WALL_SECONDS):
                raise EOFError
            answer, last = process.connection.recv()
        except RecursionError as error:  # from pickle, before anything was sent
            raise _refusal(error) from error
        except (EOFError, OSError):
            if (code := self._end(process, 0.0 if late else 1.0)) == -signal.SIGPROF or late:
                raise InvalidRequest(
                    f"{what} takes more than {self._limits.cpu_seconds:g} s of computing, which is not allowed."
                ) from None
            raise InvalidRequest(f"{what} failed (exit code {code}); it may need too much memory.") from None
        if last:
            self._end(process, 1.0)
        if isinstance(answer, Exception):
            try:
                raise answer
            finally:
                del answer  # the error holds this frame, whose arguments may be megabytes
        result: T = answer
        return result


@lru_cache(maxsize=1)
def side_processes() -> SideProcesses:
    """The SideProcesses of this process."""
    return SideProcesses()


def work(handle: int, cpu_seconds: float, memory: int, most_at_peak: int) -> None:
    """Main function of a side process: handles calls until the pipe is closed or the process has grown large."""
    connection = Connection(handle)
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C and systemd signal the whole group; the parent decides what to do
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with suppress(OSError, ValueError):  # not on every system
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (memory if most == resource.RLIM_INFINITY else min(memory, most), most))
    with suppress(OSError):
        os.nice(5)  # streams have priority
    large = False
    while not large:
        try:
            payload = connection.recv_bytes()
        except (EOFError, OSError):
            return
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        answer = _answer(payload)
        del payload
        large = _peak() > most_at_peak
        try:
            sent = pickle.dumps((answer, large), pickle.HIGHEST_PROTOCOL)
        except (MemoryError, RecursionError) as error:
            sent = pickle.dumps((_refusal(error), large))
        del answer
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(sent)
        del sent


def _answer(payload: bytes) -> Any:
    try:
        function, args = pickle.loads(payload)
        return function(*args)
    except (MemoryError, RecursionError) as error:
        return _refusal(error)
    except OctavoError as error:
        return error
    except Exception as error:
        traceback.print_exc()
        return OctavoError(f"A process beside the server failed ({type(error).__name__}); its log says why.")


def _refusal(error: BaseException) -> InvalidRequest:
    deep = isinstance(error, RecursionError)
    return InvalidRequest("This request is nested too deeply." if deep else "This request takes too much memory; send less.")


def _peak() -> int:
    """Peak memory of this process in bytes. getrusage would include the parent's peak before the fork."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # no /proc on this system
        return 0
