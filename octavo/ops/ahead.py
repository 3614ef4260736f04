"""Compiling ahead: a mode in which kernels are compiled and none is launched, so that what ops give is worthless.

Only what launches looks at it: the two launchers of kernels (triton/launch.py and hopper/compile.py) and the collectives of
`ops`, for which ranks would wait for one another. A wrapper of a kernel asks nothing and so can forget nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["is_on", "mode"]

_thread = threading.local()  # ranks may be threads of one process, and need not compile at the same time


@contextmanager
def mode() -> Iterator[None]:
    """Within it this thread compiles ahead."""
    before = is_on()
    _thread.on = True
    try:
        yield
    finally:
        _thread.on = before


def is_on() -> bool:
    """Whether this thread compiles ahead."""
    return getattr(_thread, "on", False)
