"""The `octavo` command over the fake engine: quick to start, and as slow at answering as a test needs.

The environment variable FAKE_LOAD says how many seconds loading takes, FAKE_DELAY how many a token does. SIGUSR1 kills the
engine.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from server.fake_engine import FakeEngine

from octavo.cli import main
from octavo.frontend.async_engine import AsyncEngine


async def start(config: Any, on_progress: Any = None, make_core: Any = None) -> FakeEngine:
    on_progress("loading", 0.5)
    await asyncio.sleep(float(os.environ.get("FAKE_LOAD", "0")))
    engine = FakeEngine(" word" * int(os.environ.get("FAKE_WORDS", "60")))
    engine.delay = float(os.environ.get("FAKE_DELAY", "0"))
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, engine.die, "The fake engine died.")
    return engine


AsyncEngine.start = start  # type: ignore[assignment, method-assign]
sys.exit(main())
