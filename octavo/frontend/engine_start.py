"""The one place from which the API's side reaches the engine: its worker, imported when an engine is started.

The worker imports no torch itself, so an API process that spawns one stays free of it; a core in this process does.
"""

from __future__ import annotations

from types import ModuleType

__all__ = ["worker"]


def worker() -> ModuleType:
    """octavo.engine.worker: `run_engine`, the main function of an engine process, and `engine_core`, an engine in this one."""
    from octavo.engine import worker

    return worker
