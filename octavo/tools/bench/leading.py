"""An engine of several ranks whose rank 0 is in this process, so that it can be measured from within."""

from __future__ import annotations

import gc
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from octavo.config import EngineConfig
from octavo.distributed import leave
from octavo.engine.core import EngineCore
from octavo.errors import OctavoError
from octavo.frontend.engine_processes import EngineProcesses
from octavo.messages import EngineRequest, EngineStats, Message, Progress, TokenOutput

__all__ = ["LeadingCore", "engine"]


class LeadingCore(EngineCore):
    """Hands on what it is told before each step, as octavo.engine.worker does. Call `close` in the end."""

    def __init__(self, config: EngineConfig, progress: Progress | None = None):
        self._processes = EngineProcesses(config, leads=True)
        self._place, self._told = self._processes.place, list[Message]()
        threading.Thread(target=self._watch, name="octavo-watch", daemon=True).start()
        with self._failing():
            super().__init__(config, progress, self._place)
            self._place.wait_for_all()

    def add(self, *requests: EngineRequest) -> None:
        super().add(*requests)
        self._told.append(("add", list(requests)))

    def abort(self, request_id: str) -> None:
        super().abort(request_id)
        self._told.append(("abort", [request_id]))

    def step(self) -> tuple[list[TokenOutput], EngineStats]:
        with self._failing():
            self._place.share(self._told)
            self._told = []
            return super().step()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """What fails here ends this process: its group would wait at its end for ranks that wait for this one."""
        try:
            yield
        except OctavoError:
            raise  # which all ranks find alike
        except Exception:
            traceback.print_exc()
            self._processes.kill()
            os._exit(1)

    def _watch(self) -> None:
        """Runs in a thread: another rank's end is this process's, which may wait for it within a collective."""
        processes = self._processes  # which `close` takes from this object
        sentence = processes.last_words()
        if not processes.killed:
            print(f"octavo: {sentence}", file=sys.stderr, flush=True)
            processes.kill()
            os._exit(1)

    def close(self) -> None:
        """Ends the other ranks, and this process's part in their group. Nothing else may be called afterwards."""
        processes, place = self._processes, self._place
        processes.killed = True  # those that end now do so for this
        with suppress(EOFError, OSError):
            place.share([("shutdown",)])
        vars(self).clear()  # graphs that hold collectives
        gc.collect()
        leave()
        processes.kill()


@contextmanager
def engine(config: EngineConfig, progress: Progress) -> Iterator[EngineCore]:
    """An engine in this process, of any number of ranks."""
    if config.num_ranks == 1:
        yield EngineCore(config, progress)
        return
    core = LeadingCore(config, progress)
    try:
        yield core
    finally:
        core.close()
