"""Lines of the log: the engines' throughput from time to time, and one for each request if asked for.

A thread writes them, because standard error may be a pipe that nobody reads for a while.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from dataclasses import fields
from queue import Full, Queue

from octavo.messages import SamplingParams, StructuredOutput
from octavo.server.console import say
from octavo.server.engine_metrics import EngineMetrics, RequestWatch
from octavo.server.metrics import Metrics
from octavo.text.tokenizer import Tokenizer

__all__ = ["LineWriter", "RequestLines", "throughput_lines"]

INTERVAL = 10.0  # seconds between two lines of an engine's throughput
MOST_LINES = 10_000  # that wait to be written; more are dropped, and counted
MOST_VALUE = 200  # characters of a sampling parameter
_UNPRINTABLE = re.compile(r"[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")  # they end lines, or steer terminals


class LineWriter:
    """Writes lines to standard error in a thread, in their order."""

    def __init__(self) -> None:
        self._lines: Queue[str] = Queue(MOST_LINES)
        self._dropped = 0
        threading.Thread(target=self._run, name="octavo-log", daemon=True).start()

    def write(self, line: str) -> None:
        """Never waits: a line for which there is no room is dropped."""
        try:
            self._lines.put_nowait(line)
        except Full:
            self._dropped += 1

    def _run(self) -> None:
        while True:
            say(self._lines.get())
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                say(f"octavo: {dropped} lines of the log were dropped, because nobody read them fast enough.")


class RequestLines:
    """One line for each request, once it has ended: id, numbers of tokens, why it ended, time, sampling parameters.

    most: characters of the prompt to add; 0 adds none.
    """

    def __init__(self, writer: LineWriter, tokenizer: Tokenizer | None, most: int = 0):
        self._writer, self._tokenizer, self._most = writer, tokenizer, most

    def write(self, request_id: str, watch: RequestWatch, params: SamplingParams, prompt: list[int]) -> None:
        """Of a request that has ended."""
        counts = f"{watch.prompt_tokens} prompt tokens ({watch.cached} cached), {watch.generated} generated"
        line = f"octavo: request {request_id}: {counts}, {'+'.join(watch.reasons)}, {watch.seconds:.3f} s, {_set(params)}"
        self._writer.write(line + self._beginning(prompt))

    def _beginning(self, prompt: list[int]) -> str:
        if not self._most:
            return ""
        if self._tokenizer is None:
            return f", prompt {prompt[: self._most]}"
        text = self._tokenizer.decode(prompt[: self._most], skip_special_tokens=False)[: self._most]
        return f", prompt {_UNPRINTABLE.sub(lambda found: json.dumps(found[0])[1:-1], json.dumps(text, ensure_ascii=False))}"


def _set(params: SamplingParams) -> str:
    """The parameters that are not SamplingParams' defaults, on one line."""
    values = [(f.name, getattr(params, f.name)) for f in fields(params) if getattr(params, f.name) != f.default]
    shown = [f"{name}={value.kind if isinstance(value, StructuredOutput) else _short(value)}" for name, value in values]
    return " ".join(shown) or "default sampling"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MOST_VALUE else f"{text[:MOST_VALUE]}..."


async def throughput_lines(metrics: Metrics, writer: LineWriter, interval: float = INTERVAL) -> None:
    """Writes a line for each engine that has worked in the last `interval` seconds, for ever."""
    rates = [_Rates(engine) for engine in metrics.engines]
    while True:
        await asyncio.sleep(interval)
        for number, rate in enumerate(rates):
            if (line := rate.line()) is not None:
                writer.write(f"octavo: Engine {number:03d}: {line}")


class _Rates:
    """An engine's tokens a second since the last line. The words are those that scripts look for in vLLM's log."""

    def __init__(self, engine: EngineMetrics):
        self._engine, self._then = engine, time.monotonic()
        self._before = self._totals()

    def _totals(self) -> tuple[int, int, int, int]:
        engine = self._engine
        return engine.prompt_total, engine.generated_total, engine.queries_total, engine.hits_total

    def line(self) -> str | None:
        """None where nothing was done and nothing waits."""
        now, totals, latest = time.monotonic(), self._totals(), self._engine.latest
        prompt, generated, queries, hits = (a - b for a, b in zip(totals, self._before, strict=True))
        seconds, self._then, self._before = now - self._then, now, totals
        waiting = latest.num_waiting + latest.num_deferred
        if not (prompt or generated or latest.num_running or waiting):
            return None
        return (
            f"Avg prompt throughput: {prompt / seconds:.1f} tokens/s, Avg generation throughput: "
            f"{generated / seconds:.1f} tokens/s, Running: {latest.num_running} reqs, Waiting: {waiting} reqs, "
            f"GPU KV cache usage: {100 * latest.kv_cache_usage:.1f}%, "
            f"Prefix cache hit rate: {100 * hits / queries if queries else 0:.1f}%"
        )
