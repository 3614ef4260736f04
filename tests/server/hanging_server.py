"""The `octavo` command, one of whose ranks hangs within a layer, in the step of a prompt of LENGTH tokens.

The environment variable HANG says which and how: "sleep 1": rank 1 sleeps there, "stop 0": rank 0 is stopped (SIGSTOP).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from octavo.cli import main
from octavo.frontend.async_engine import AsyncEngine

LENGTH = 77


def make_core(config: Any, progress: Any, place: Any) -> Any:
    from octavo.engine.core import EngineCore

    core = EngineCore(config, progress, place)
    how, rank = os.environ["HANG"].split()
    if place.rank == int(rank):
        model: Any = core.runner.model

        def hang_in_a_layer(_: Any, given: tuple[Any, ...]) -> None:
            if any(len(one.input_ids) == LENGTH for one in given if hasattr(one, "input_ids")):
                time.sleep(600) if how == "sleep" else os.kill(os.getpid(), signal.SIGSTOP)

        model.model.layers[-1].register_forward_pre_hook(hang_in_a_layer)
    return core


if __name__ == "__main__":
    from server import hanging_server  # the engine's processes find its functions under this name

    before = AsyncEngine.start

    async def start(config: Any, on_progress: Any = None, make_core: Any = None) -> AsyncEngine:
        return await before(config, on_progress, hanging_server.make_core)

    AsyncEngine.start = start  # type: ignore[assignment, method-assign]
    sys.exit(main())
