"""What `octavo quantize` shows: how far it is, and with --verify how much each layer lost."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar
from torch import Tensor

from octavo.convert.calibration import LayerLosses
from octavo.convert.quantize_plan import Piece, Plan
from octavo.platform import Platform
from octavo.quant import QTensor, dequantize
from octavo.quant.formats import read_weight
from octavo.tools.rich_tables import console, gb, table
from octavo.weights.checkpoint import Checkpoint, RowReader, Rows, Scratch

__all__ = ["LossReport", "Progress", "layer_errors", "verify"]

WORST = 10  # layers shown
WIDTH = 100  # columns that they may take


class Progress:
    """A bar with GB/s of what is read and the time left on a terminal, elsewhere a line for each file. On stderr."""

    def __init__(self, total: int):
        self.total, self.done, self.began = total, 0, time.monotonic()
        self._lock = threading.Lock()
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"),
                TransferSpeedColumn(), TimeRemainingColumn(),
            )  # fmt: skip
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=self.total)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None and self.done:
            seconds = time.monotonic() - self.began
            print(f"octavo: {gb(self.done)} in {seconds:.1f} s, {self._speed():.2f} GB/s", file=sys.stderr, flush=True)

    def start(self, name: str) -> None:
        """A new file."""
        if self._bar is not None:
            self._bar.update(self._task, description=name)
            return
        left = f", {self._speed():.2f} GB/s, {(self.total - self.done) / 1e9 / self._speed():.0f} s left" if self.done else ""
        print(f"octavo: {name}, {100 * self.done / max(self.total, 1):.0f}% done{left}", file=sys.stderr, flush=True)

    def advance(self, nbytes: int) -> None:
        """Any thread calls this."""
        with self._lock:
            self.done += nbytes
        if self._bar is not None:
            self._bar.advance(self._task, nbytes)

    def _speed(self) -> float:
        return self.done / 1e9 / max(time.monotonic() - self.began, 1e-9)


class LossReport:
    """Says a line for each layer that calibration has rounded: the relative error of its outputs, plain and calibrated."""

    def __init__(self, say: Callable[[str], None]):
        self.say, self.sums = say, [0.0, 0.0]
        self.matrices = 0

    def __call__(self, number: int, count: int, losses: LayerLosses) -> None:
        """Learns of layer `number` of `count`."""
        errors = [[(part / one.size) ** 0.5 for part in (one.plain, one.calibrated)] for one in losses.values() if one.size]
        for plain, calibrated in errors:
            self.sums = [self.sums[0] + plain, self.sums[1] + calibrated]
        self.matrices += len(errors)
        if errors:
            means = [sum(column) / len(errors) for column in zip(*errors, strict=True)]
            self.say(f"layer {number + 1} of {count}: output error {means[0]:.3%} rounded plainly, {means[1]:.3%} calibrated")
        if number + 1 == count and self.matrices:
            plain, calibrated = (total / self.matrices for total in self.sums)
            self.say(f"mean output error ||x (FP8 - w)|| / ||x w||: {plain:.3%} rounded plainly, {calibrated:.3%} calibrated")


def layer_errors(plan: Plan, output: Path, platform: Platform, threads: int) -> dict[str, float]:
    """||stored - w|| / ||w|| of each quantized matrix, both read from their files."""
    with closing(Checkpoint(output)) as written, ThreadPoolExecutor(threads) as pool:
        errors = pool.map(lambda piece: _error(piece, plan.checkpoint, written, platform), plan.quantized)
        return {piece.module: error for piece, error in zip(plan.quantized, errors, strict=True)}


def _error(piece: Piece, source: Checkpoint, written: Checkpoint, platform: Platform) -> float:
    before, after = (RowReader(checkpoint, platform, Scratch()) for checkpoint in (source, written))
    lost = size = 0.0
    for part in piece.row_parts():
        w, stored = (_dense(reader, piece, part) for reader in (before, after))
        lost += float((stored - w).square().sum(dtype=stored.dtype))
        size += float(w.square().sum())
    return (lost / size) ** 0.5 if size else 0.0


def _dense(reader: RowReader, piece: Piece, part: Rows) -> Tensor:
    found = read_weight(reader, piece.module, piece.shape, part)
    return dequantize(found) if isinstance(found, QTensor) else found.float()


def verify(plan: Plan, output: Path, platform: Platform, threads: int, say: Callable[[str], None]) -> None:
    """Prints the layers that lost most, and the mean."""
    errors = layer_errors(plan, output, platform, threads)
    rows = [(module, f"{error:.5f}") for module, error in sorted(errors.items(), key=lambda item: -item[1])[:WORST]]
    title = "relative error of the weights, worst layers first"
    console(WIDTH).print(table(title, ["layer", "||FP8 - w|| / ||w||"], rows))
    say(f"mean of {len(errors)} layers {sum(errors.values()) / len(errors):.5f}, worst {max(errors.values()):.5f}")
