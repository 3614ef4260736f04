"""Processes of one machine as ranks, over gloo. Starting one takes seconds, so a group is used for many questions."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from octavo.engine.place import Place

__all__ = ["RankProcesses"]


class RankProcesses:
    """`size` processes; `run(fn, *args)` gives what fn(place, *args) gives on each, in the order of ranks."""

    def __init__(self, size: int, directory: Path):
        context = multiprocessing.get_context("spawn")
        links = [context.Pipe() for _ in range(1, size)]
        self.connections, self.processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            own = [first for first, _ in links] if rank == 0 else []
            source = links[rank - 1][1] if rank else None
            place = Place(rank, size, str(directory / "ranks"), own, source)
            process = context.Process(target=_answer, args=(theirs, place), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(mine)
            self.processes.append(process)
        for link in links:
            for end in link:
                end.close()

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """Raises the first rank's error as AssertionError, with its traceback as text."""
        for connection in self.connections:
            connection.send((fn, args))
        found = [connection.recv() for connection in self.connections]
        for kind, value in found:
            assert kind == "value", value
        return [value for _, value in found]

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(10)
            process.kill()


def _answer(connection: Connection, place: Place) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            fn, args = connection.recv()
        except (EOFError, OSError):
            return
        try:
            connection.send(("value", fn(place, *args)))
        except BaseException:
            connection.send(("error", f"rank {place.rank}:\n{traceback.format_exc()}"))
