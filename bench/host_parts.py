"""Where a step's time goes on the host of one rank, and what its device waits for between two replays of graphs."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch

__all__ = ["HostParts", "Replays"]


class HostParts:
    """Seconds in each of some functions, without those that they call and are wrapped too. Use as a context manager: what was
    wrapped is restored at its end."""

    def __init__(self) -> None:
        self.seconds, self._open, self._last = defaultdict[str, float](float), list[str](), 0.0
        self._before: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> HostParts:
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, function in reversed(self._before):
            delattr(owner, name) if function is None else setattr(owner, name, function)

    def wrap(self, label: str, owner: Any, *names: str) -> None:
        """Times owner's functions `names`, of a class, an object or a module."""
        for name in names:
            self._before.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, self._timed(label, getattr(owner, name)))

    def wrap_engine(self, core: Any) -> None:
        """The parts of a step of an EngineCore."""
        from octavo.engine import core as core_module
        from octavo.engine import pipeline, step_tokens
        from octavo.stages import Stages

        graphs = core.runner.graphs
        self.wrap("step", core, "step")
        self.wrap("schedule", core.scheduler, "schedule")
        self.wrap("update", core.scheduler, "update")
        self.wrap("launch", core, "_launch")
        self.wrap("outputs", core, "_take")
        self.wrap("tokens to the first stage's device", core_module, "latest")
        self.wrap("run", core.runner, "run")
        self.wrap("graph's inputs", graphs, "run", "_send")
        self.wrap("block tables", graphs, "_send_tables")
        self.wrap("state in", graphs, "arrived")
        self.wrap("state out", pipeline.Pipeline, "hand_on")
        for graph in {id(graph): graph for graph in graphs._graphs.values()}.values():
            self.wrap("replay", graph, "replay")
        self.wrap("sample", core.runner, "_sample")
        self.wrap("tell tokens", pipeline.Pipeline, "tell")
        self.wrap("wait for a state", Stages, "receive")
        self.wrap("wait for tokens", Stages, "receive_numbers")
        self.wrap("wait for own device", step_tokens.StepTokens, "to_host")

    def _timed(self, label: str, before: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(before)
        def timed(*args: Any, **more: Any) -> Any:
            self._tick()
            self._open.append(label)
            try:
                return before(*args, **more)
            finally:
                self._tick()
                self._open.pop()

        return timed

    def _tick(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._last
        self._last = now


class Replays:
    """Marks on the device around each replay of an engine's graphs, and when the host asked for it."""

    def __init__(self, core: Any):
        self.marks: list[tuple[float, Any, Any]] = []
        self.device = torch.accelerator.current_accelerator()
        for graph in {id(graph): graph for graph in core.runner.graphs._graphs.values()}.values():
            graph.replay = partial(self._run, graph.replay)
        self.zero = self._mark()
        self.zero.synchronize()
        self.began = time.perf_counter()

    def _mark(self) -> Any:
        mark = torch.Event(self.device, enable_timing=True)
        mark.record()
        return mark

    def _run(self, replay: Callable[[], None]) -> None:
        now, first = time.perf_counter(), self._mark()
        replay()
        self.marks.append((now, first, self._mark()))

    @property
    def busy(self) -> float:
        """Seconds of all replays, which it waits for."""
        torch.accelerator.synchronize()
        return sum(float(first.elapsed_time(last)) for _, first, last in self.marks) / 1e3

    def gaps(self) -> tuple[float, float, int]:
        """Seconds between replays in which the host had not asked for the next one yet; those in which it had; how many gaps
        were of the first kind. The two clocks are compared once, so that a gap's parts are wrong by some microseconds."""
        host, device, late = 0.0, 0.0, 0
        end: float | None = None
        for asked, first, last in self.marks:
            start = float(self.zero.elapsed_time(first)) / 1e3
            if end is not None:
                waited = min(max(asked - self.began - end, 0.0), start - end)
                host, device, late = host + waited, device + start - end - waited, late + (waited > 0)
            end = float(self.zero.elapsed_time(last)) / 1e3
        return host, device, late
