"""What a huge request took is given back: the C library would keep it for the next one."""

from __future__ import annotations

import asyncio

from octavo import host

__all__ = ["release_soon"]

SECONDS = 1.0  # after the first of several huge requests; the answers to the others may then be on their way still
_waiting: set[asyncio.AbstractEventLoop] = set()


def release_soon() -> None:
    """Gives freed memory back to the system in a moment, in a thread."""
    loop = asyncio.get_running_loop()
    if loop in _waiting:
        return
    _waiting.add(loop)
    loop.call_later(SECONDS, _release, loop)


def _release(loop: asyncio.AbstractEventLoop) -> None:
    _waiting.discard(loop)
    loop.run_in_executor(None, host.release)
