"""Terminal output of a server: loading progress, and the load report once it is ready."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import TYPE_CHECKING

from octavo.errors import OctavoError

if TYPE_CHECKING:
    import rich.progress

    from octavo.server.serving import Served

__all__ = ["DEMO_PROMPT", "LoadingBar", "greet", "say"]

DEMO_PROMPT = "def read(self"
DEMO_SEED = 3  # gives the same answer at every start


def say(line: str) -> None:
    """Prints a line to stderr."""
    print(line, file=sys.stderr, flush=True)


async def greet(served: Served, listening: Callable[[], bool], address: str, demo: bool, started: float) -> None:
    """Prints the load report, an answer of the demo model with a command to try, and that the server is ready."""
    for line in served.engine.info.report:
        print(line, flush=True)
    if demo and served.engine.tokenizer is not None:
        try:
            await _show(served)
        except OctavoError as error:
            say(f"octavo: {error}")
        local = _local(address)
        body = f'{{"model": "{served.names[0]}", "prompt": "class Stack:", "max_tokens": 64}}'
        print(f"\nTry it:\n  curl {local}/v1/completions -H 'Content-Type: application/json' -d '{body}'\n")
    while not listening():
        await asyncio.sleep(0.005)
    print(f"Octavo is ready on {_reachable(address)} ({time.time() - started:.1f} s)", flush=True)


def _reachable(address: str) -> str:
    """A URL that can be opened, where the server listens on all addresses."""
    scheme, _, listened = address.partition("://")
    host, _, port = listened.rpartition(":")
    everywhere = host in ("0.0.0.0", "[::]")
    return f"{scheme}://localhost:{port} and this machine's other addresses" if everywhere else address


def _local(address: str) -> str:
    """What curl needs to reach the server from this machine, before the path."""
    if address.startswith("unix:"):
        return f"--unix-socket {address.removeprefix('unix:')} http://localhost"
    scheme, port = address.partition(":")[0], address.rpartition(":")[2]
    return f"{'-k ' if scheme == 'https' else ''}{scheme}://localhost:{port}"


async def _show(served: Served) -> None:
    from octavo.messages import SamplingParams

    print(f"\nA first completion:\n\n{DEMO_PROMPT}", end="", flush=True)
    params = SamplingParams(**{**served.engine.default_sampling, "max_tokens": 64, "seed": DEMO_SEED})
    began, tokens = time.monotonic(), 0
    async with aclosing(served.engine.generate(await served.encode(DEMO_PROMPT), params, "demo")) as deltas:
        async for delta in deltas:
            tokens += len(delta.token_ids)
            print(delta.text, end="", flush=True)
    print(f"\n\n({tokens} tokens in {time.monotonic() - began:.2f} s)")


class LoadingBar:
    """Shows `update(stage, fraction)` on stderr: a bar on a terminal, else a line per stage."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None

    def update(self, stage: str, fraction: float) -> None:
        """Sets the finished part of `stage`, 0 to 1."""
        if sys.stderr.isatty():
            self._draw(stage, fraction)
        elif stage != self._stage:
            print(f"octavo: {stage}", file=sys.stderr, flush=True)
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
            self._bar.update(self._task, description=stage, completed=fraction)
