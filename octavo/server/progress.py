"""The progress of loading: a bar on a terminal, a line for each stage anywhere else."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.progress

__all__ = ["Progress"]


class Progress:
    """Shows `update(stage, fraction)` on stderr."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None

    def update(self, stage: str, fraction: float) -> None:
        """`stage` is done to this part, 0 to 1."""
        if sys.stderr.isatty():
            self._draw(stage, fraction)
        elif stage != self._stage:
            print(f"octavo: {stage}", file=sys.stderr, flush=True)
        self._stage = stage

    def close(self) -> None:
        """Takes the bar away."""
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
            self._bar.update(self._task, description=stage, completed=fraction)
