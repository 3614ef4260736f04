"""The only import of the engine by the API side: its worker, imported when an engine is started.

The worker itself imports no torch, so an API process that spawns one stays free of torch. A core in this process imports it.
"""

from __future__ import annotations

from types import ModuleType

from octavo.errors import OctavoError

__all__ = ["EngineDead", "worker"]


class EngineDead(OctavoError):
    """The engine process is gone. Only a restart helps."""


def worker() -> ModuleType:
    """octavo.engine.worker. `run_engine`: main function of an engine process. `engine_core`: an engine in this process."""
    from octavo.engine import worker

    return worker
