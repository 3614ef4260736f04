"""Ahead-of-time compilation: a mode in which kernels are compiled but not launched, so results of ops are undefined.

Only the code that launches checks the mode: the two kernel launchers (triton/launch.py and hopper/compile.py) and the
collectives of `ops`, where ranks would wait for one another. Wrappers of kernels need no check of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["is_on", "mode"]

_thread = threading.local()  # ranks may be threads of one process, and they need not compile at the same time


@contextmanager
def mode() -> Iterator[None]:
    """Within this context the calling thread compiles ahead."""
    before = is_on()
    _thread.on = True
    try:
        yield
    finally:
        _thread.on = before


def is_on() -> bool:
    """Whether the calling thread compiles ahead."""
    return getattr(_thread, "on", False)
