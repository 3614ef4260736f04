"""Prometheus metrics under vLLM's names, so that existing dashboards work unchanged."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from octavo.frontend.outputs import Delta
from octavo.messages import EngineStats

__all__ = ["Metrics", "RequestWatch"]

_LABELS = ("model_name", "engine")
_SHORT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_GAP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_LONG = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))
_STEP = (1, *(2**e for e in range(3, 15)))


class Metrics:
    """All metrics of a server, in a separate registry. The label `engine` is an engine's number."""

    def __init__(self, model_name: str, engines: int = 1):
        disable_created_metrics()  # type: ignore[no-untyped-call]  # otherwise every series appears twice
        self._registry = CollectorRegistry()
        self._model_name = model_name
        self._families: dict[str, Any] = {}
        self._engines = [EngineMetrics(partial(self._child, str(number))) for number in range(engines)]

    def watch(self, request_id: str, prompt_tokens: int, n: int, engine: int = 0) -> RequestWatch:
        """Starts timing a request. The caller must `close` the watch."""
        return self._engines[engine].watch(request_id, prompt_tokens, n)

    def on_step(self, stats: EngineStats, engine: int = 0) -> None:
        """Updates the metrics from the statistics of one step."""
        self._engines[engine].on_step(stats)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _child(self, engine: str, kind: type[Any], name: str, help: str, labels: Mapping[str, str], **options: Any) -> Any:
        """The series of an engine and of further labels; their family is made the first time."""
        if name not in self._families:
            self._families[name] = kind(f"vllm:{name}", help, (*_LABELS, *labels), registry=self._registry, **options)
        return self._families[name].labels(self._model_name, engine, *labels.values())


class EngineMetrics:
    """The metrics of one engine. child(kind, name, help, further labels, **options) makes a series."""

    def __init__(self, child: Callable[..., Any]):
        self._child = child
        self._waiting: dict[str, RequestWatch] = {}

        self._running = self._gauge("num_requests_running", "Requests in the step now running.")
        self._queued = self._gauge("num_requests_waiting", "Requests that wait for room.")
        self._cache = self._gauge("kv_cache_usage_perc", "Used part of the KV cache; 1 is all of it.")
        self._queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._preemptions = self._counter("num_preemptions", "Requests that lost their blocks and were computed again.")
        self._step = self._histogram("iteration_tokens_total", "Tokens in one step.", _STEP)

        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens taken in.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.", _SHORT)
        self.gap = self._histogram("inter_token_latency_seconds", "Between a token and the next one of its sequence.", _GAP)
        self.e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", _LONG)
        self.queue = self._histogram("request_queue_time_seconds", "Arrival to first step.", _LONG)
        self.prefill = self._histogram("request_prefill_time_seconds", "First step to first token.", _LONG)
        self.decode = self._histogram("request_decode_time_seconds", "First token to last token.", _LONG)
        self.request_prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self.request_generation = self._histogram("request_generation_tokens", "Generated tokens of a request.", _TOKENS)
        for reason in ("stop", "length", "abort"):
            self.success(reason, 0)

    def watch(self, request_id: str, prompt_tokens: int, n: int) -> RequestWatch:
        """Starts timing a request. The caller must `close` the watch."""
        first_sequence = request_id if n == 1 else f"{request_id}-0"
        watch = self._waiting[first_sequence] = RequestWatch(self, first_sequence, prompt_tokens, n)
        return watch

    def forget(self, request_id: str) -> None:
        """Stops waiting for the request's first step."""
        self._waiting.pop(request_id, None)

    def success(self, reason: str, amount: int = 1) -> None:
        """Counts finished sequences."""
        found: Counter = self._child(Counter, "request_success", "Finished requests.", {"finished_reason": reason})
        found.inc(amount)

    def on_step(self, stats: EngineStats) -> None:
        """As Metrics.on_step."""
        self._running.set(stats.num_running)
        self._queued.set(stats.num_waiting)
        self._cache.set(stats.kv_cache_usage)
        self._queries.inc(stats.prefix_cache_queries)
        self._hits.inc(stats.prefix_cache_hits)
        self._preemptions.inc(stats.num_preemptions)
        if stats.iteration_tokens:
            self._step.observe(stats.iteration_tokens)
        for request_id in stats.scheduled_first:
            if watch := self._waiting.pop(request_id, None):
                watch.scheduled()

    def _gauge(self, name: str, help: str) -> Gauge:
        found: Gauge = self._child(Gauge, name, help, {})
        return found

    def _counter(self, name: str, help: str) -> Counter:
        found: Counter = self._child(Counter, name, help, {})
        return found

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        found: Histogram = self._child(Histogram, name, help, {}, buckets=buckets)
        return found


class RequestWatch:
    """Times one request: a prompt and its n sequences."""

    def __init__(self, metrics: EngineMetrics, request_id: str, prompt_tokens: int, n: int):
        self._metrics, self._id, self._prompt_tokens = metrics, request_id, prompt_tokens
        self._arrived = self._first_step = time.monotonic()
        self._last: list[float | None] = [None] * n  # time of each sequence's latest token
        self._first_token: float | None = None
        self._generated = 0
        self._unfinished = n

    def scheduled(self) -> None:
        """Records that the request left the queue."""
        self._first_step = time.monotonic()
        self._metrics.queue.observe(self._first_step - self._arrived)

    def saw(self, delta: Delta) -> None:
        """Records the tokens of a delta."""
        now, metrics = time.monotonic(), self._metrics
        count = len(delta.token_ids)
        if self._first_token is None:
            self._first_token = now
            metrics.ttft.observe(now - self._arrived)
            metrics.prefill.observe(now - self._first_step)
            metrics.prompt_tokens.inc(self._prompt_tokens)
        last = self._last[delta.index]
        if count and last is not None:
            metrics.gap.observe(now - last)
        if count:
            self._last[delta.index] = now
            self._generated += count
            metrics.generation_tokens.inc(count)
        if delta.finish_reason is not None:
            self._unfinished -= 1
            metrics.success(delta.finish_reason)

    def close(self) -> None:
        """Ends the timing: the request is complete, or the client disconnected."""
        now, metrics = time.monotonic(), self._metrics
        metrics.forget(self._id)
        if self._unfinished:
            metrics.success("abort", self._unfinished)
            return
        metrics.e2e.observe(now - self._arrived)
        metrics.decode.observe(now - (self._first_token or now))
        metrics.request_prompt.observe(self._prompt_tokens)
        metrics.request_generation.observe(self._generated)
