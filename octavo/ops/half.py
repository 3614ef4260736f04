"""Which half of a step the calling thread launches, where a step is computed in two halves at once (`ops.halves`).

Kernels of both halves run at the same time. So whatever outlives a launch and is written by it, such as counters that every
launch resets, exists once for each half.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["current", "launching", "workspace"]

_thread = threading.local()  # ranks may be threads of one process


@contextmanager
def launching(number: int) -> Iterator[None]:
    """Within this context the calling thread launches half `number`, 0 or 1."""
    _thread.half = number
    try:
        yield
    finally:
        _thread.half = None


def current() -> int | None:
    """The half that the calling thread launches; None for a step that is computed as one."""
    return getattr(_thread, "half", None)


def workspace() -> int:
    """0 or 1: which workspace a launch of the calling thread uses. A whole step uses that of the first half."""
    return current() or 0
