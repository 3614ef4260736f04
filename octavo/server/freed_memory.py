"""Returns the memory of huge requests to the system. The C library would keep it for the next one."""

from __future__ import annotations

import asyncio

from octavo import host

__all__ = ["release_soon"]

SECONDS = 1.0  # after the first of several huge requests, so that the others can be answered before
_waiting: set[asyncio.AbstractEventLoop] = set()


def release_soon() -> None:
    """Schedules a release of freed memory to the system, in a thread."""
    loop = asyncio.get_running_loop()
    if loop in _waiting:
        return
    _waiting.add(loop)
    loop.call_later(SECONDS, _release, loop)


def _release(loop: asyncio.AbstractEventLoop) -> None:
    _waiting.discard(loop)
    loop.run_in_executor(None, host.release)
