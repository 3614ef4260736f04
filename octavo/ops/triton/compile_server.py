"""The process that compiles Triton's kernels for an engine: `octavo.engine.compile_process` begins it.

Triton holds Python's lock for a part of each compilation, and an engine's main thread needs it meanwhile, so threads of the
engine would compile one kernel at a time where they hold it. This process imports what kernels are made of, before it knows the
device and beside the engine, which imports as long; forked workers then compile. Their results go through Triton's cache.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection

import triton.compiler.code_generator  # noqa: F401 (for the workers to inherit, as the next)
from triton.runtime.cache import triton_key

from octavo.ops import gpu  # noqa: F401
from octavo.ops.triton import launch

__all__ = ["main"]

DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


def main(descriptor: int) -> None:
    """Serves what comes over a connection: the device, then a number, module, name and specialization of each kernel. Answers
    with the number, and "" or what went wrong. None is the end.
    """
    connection = Connection(descriptor)
    triton_key()  # reads the whole library: once here, not in each worker
    try:
        if (device := connection.recv()) is None:
            return
        build_utilities = launch.describe_device(device)
        workers = len(os.sched_getaffinity(0))
        with ProcessPoolExecutor(workers, get_context("fork"), partial(_end_with, os.getpid())) as pool:
            pool.submit(build_utilities)
            while (message := connection.recv()) is not None:
                number, module, name, specialization = message
                job = pool.submit(_compile, module, name, specialization)
                job.add_done_callback(partial(_answer, connection, number))
    except EOFError:
        return


def _end_with(parent: int) -> None:
    """Has this worker end when the server does, however that is."""
    ctypes.CDLL(None).prctl(DEATH_SIGNAL, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)


def _compile(module: str, name: str, specialization: str) -> None:
    kernel = getattr(importlib.import_module(module), name)
    launch.with_launcher(partial(kernel.preload, specialization))


def _answer(connection: Connection, number: int, job: Future[None]) -> None:
    error = None if job.cancelled() else job.exception()
    try:
        connection.send((number, "" if error is None else f"{type(error).__name__}: {error}"))
    except OSError:  # the engine is gone
        return
