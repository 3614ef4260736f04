"""Ahead-of-time compilation: a mode in which kernels are compiled but not launched, so results of ops are undefined.

Only the code that launches checks the mode: the two kernel launchers (triton/launch.py and hopper/compile.py) and the
collectives of `ops`, where ranks would wait for one another. Wrappers of kernels need no check of their own.

A process without a device, whose tensors have no memory, collects instead: what would be compiled becomes jobs, which forked
processes then do (`octavo.engine.rehearsal`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

__all__ = ["Job", "Jobs", "collect", "collecting", "collects", "is_on", "mode"]

Job = Callable[[], object]  # compiles one kernel and keeps it in the user's cache
Jobs = dict[Hashable, Job]  # by what equal kernels have in common
_thread = threading.local()  # ranks may be threads of one process, and they need not compile at the same time
_jobs: Jobs | None = None  # of this process, where it collects


@contextmanager
def mode() -> Iterator[None]:
    """Within this context the calling thread compiles ahead."""
    before = is_on()
    _thread.on = True
    try:
        yield
    finally:
        _thread.on = before


@contextmanager
def collecting() -> Iterator[Jobs]:
    """Within this context no thread of this process compiles a kernel or calls the driver; jobs are collected."""
    global _jobs
    _jobs = {}
    try:
        yield _jobs
    finally:
        _jobs = None


def collects() -> bool:
    """Whether this process collects jobs."""
    return _jobs is not None


def collect(key: Hashable, job: Job) -> None:
    """Keeps a job, if none with its key is there."""
    assert _jobs is not None
    _jobs.setdefault(key, job)


def is_on() -> bool:
    """Whether the calling thread compiles ahead."""
    return getattr(_thread, "on", False)
