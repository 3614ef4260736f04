"""Time on a GPU, without the host's."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["in_graph"]


def in_graph(calls: Sequence[Callable[[], Any]], number: int, rounds: int) -> float:
    """Microseconds of one call: the median of `rounds` replays of a captured graph of `number` calls, which take turns."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in (*calls, calls[0]):  # compiles, and lets libraries take their workspace
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(number):
            calls[i % len(calls)]()
    times = []
    for _ in range(rounds + 1):  # the first is the warm-up
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / number)
    return float(statistics.median(times[1:]))
