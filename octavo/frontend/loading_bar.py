"""Progress of what a start waits for: a download, and loading."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import rich.progress

__all__ = ["LoadingBar", "put", "say"]

LINE_SECONDS = 30.0  # between two lines of one stage, where there is no terminal


def put(text: str, stream: TextIO, end: str = "\n") -> None:
    """Prints to a standard stream. Nothing else depends on whether somebody reads it: who reads a pipe may end first, as tee
    does on a Ctrl-C that both get, and a disk behind it may be full.
    """
    try:
        print(text, file=stream, end=end, flush=True)
    except BrokenPipeError:
        with suppress(OSError):  # or what is left in its buffer would be an error at this process's end, too
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError):
        pass


def say(line: str) -> None:
    """Prints a line to stderr, as `put` does."""
    put(line, sys.stderr)


class LoadingBar:
    """Shows `update(stage, fraction, detail)` on stderr: a bar on a terminal, else a line per stage, and now and then one of
    how far it is, where the stage has details.
    """

    def __init__(self) -> None:
        self._stage, self._told = "", 0.0
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None

    def update(self, stage: str, fraction: float, detail: str = "") -> None:
        """Sets the finished part of `stage`, 0 to 1. detail: how much that is, such as `3.2 of 16.1 GB`."""
        shown, now = f"{stage}: {detail}" if detail else stage, time.monotonic()
        if sys.stderr.isatty():
            self._draw(shown, fraction)
        elif stage != self._stage or (detail and now - self._told >= LINE_SECONDS):
            say(f"octavo: {shown}")
            self._told = now
        self._stage = stage

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _draw(self, stage: str, fraction: float) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:3.0f}%"),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(stage, total=1.0)
            self._bar.start()
        if self._task is not None:
            if fraction < 1 and self._bar.tasks[0].finished:  # by an earlier stage, which has stopped its clock
                self._bar.reset(self._task)
            self._bar.update(self._task, description=stage, completed=fraction)
