"""An engine process from outside: the only import of the engine by the API side, and why a process ended.

The worker itself imports no torch, so an API process that spawns one stays free of torch. A core in this process imports it.
"""

from __future__ import annotations

import signal
from types import ModuleType

from octavo.errors import OctavoError

__all__ = ["EngineDead", "how_it_ended", "worker"]


class EngineDead(OctavoError):
    """The engine process is gone. Only a restart helps."""


def worker() -> ModuleType:
    """octavo.engine.worker. `run_engine`: main function of an engine process. `engine_core`: an engine in this process."""
    from octavo.engine import worker

    return worker


def how_it_ended(code: int | None) -> str:
    """Of its exit code, a sentence."""
    if code == -signal.SIGKILL:
        return "The engine process was killed; the machine may have run out of memory."
    if code in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS):
        name = signal.Signals(-code).name
        return f"The engine process crashed ({name}); if memory is limited (ulimit -v), it may have been too little."
    return f"The engine process ended unexpectedly (exit code {code})."
