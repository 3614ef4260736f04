"""The metrics of one engine, and the timing of its requests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from octavo.frontend.outputs import Delta
from octavo.messages import EngineStats
from octavo.server.token_histogram import Series, TokenHistogram

__all__ = ["SHORT", "EngineMetrics", "RequestWatch"]

SHORT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_GAP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_LONG = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))
_STEP = (1, *(2**e for e in range(3, 15)))
_FEW = (1, 2, 5, 10, 20)
REASONS = ("stop", "length", "abort", "error")


class EngineMetrics:
    """The metrics of one engine. child(kind, name, help, further labels, **options) makes a series.

    latest: of its steps. prompt_total, generated_total: tokens so far; queries_total, hits_total: of the prefix cache.
    """

    def __init__(self, child: Callable[..., Any]):
        self._child = child
        self._waiting: dict[str, RequestWatch] = {}
        self.latest = EngineStats()
        self.prompt_total = self.generated_total = self.queries_total = self.hits_total = self._counted = 0

        self._running = self._gauge("num_requests_running", "Requests in the step now running.")
        self._queued = self._gauge("num_requests_waiting", "Requests that wait: for room, or for their grammars.")
        self._capacity, self._deferred = (
            self._gauge("num_requests_waiting_by_reason", "Requests that wait, by what for.", reason=reason)
            for reason in ("capacity", "deferred")
        )
        self._cache = self._gauge("kv_cache_usage_perc", "Used part of the KV cache; 1 is all of it.")
        self._queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._image_queries = self._counter("mm_cache_queries", "Images looked up in the encoder cache.")
        self._image_hits = self._counter("mm_cache_hits", "Images found in the encoder cache.")
        self._preemptions = self._counter("num_preemptions", "Requests that lost their blocks and were computed again.")
        self._step = self._histogram("iteration_tokens_total", "Tokens in one step.", _STEP)

        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens taken in.")
        self.cached_tokens = self._counter("prompt_tokens_cached", "Of those, tokens found in the prefix cache.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.", SHORT)
        self.gap: Series = self._child(
            TokenHistogram, "inter_token_latency_seconds", "Between a token and the next one of its sequence.", {}, buckets=_GAP
        )
        self.mean_gap = self._histogram("request_time_per_output_token_seconds", "Mean of a request's gaps.", _GAP)
        self.e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", _LONG)
        self.queue = self._histogram("request_queue_time_seconds", "Arrival to first step.", _LONG)
        self.inference = self._histogram("request_inference_time_seconds", "First step to last token.", _LONG)
        self.prefill = self._histogram("request_prefill_time_seconds", "First step to first token.", _LONG)
        self.decode = self._histogram("request_decode_time_seconds", "First token to last token.", _LONG)
        self.request_prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self.request_computed = self._histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens of a request that were not cached.", _TOKENS
        )
        self.request_generation = self._histogram("request_generation_tokens", "Generated tokens of a request.", _TOKENS)
        self.longest = self._histogram("request_max_num_generation_tokens", "Tokens of a request's longest sequence.", _TOKENS)
        self.params_n = self._histogram("request_params_n", "Sequences that a request asks for.", _FEW)
        self.params_max_tokens = self._histogram("request_params_max_tokens", "max_tokens of a request.", _TOKENS)
        self.request_preemptions = self._histogram("request_num_preemptions", "Preemptions of a request.", _FEW)
        for reason in REASONS:
            self.success(reason, 0)

    def watch(self, request_id: str, prompt_tokens: int, n: int, max_tokens: int | None = None) -> RequestWatch:
        """Starts timing a request. The caller must `close` the watch."""
        first_sequence = request_id if n == 1 else f"{request_id}-0"
        watch = self._waiting[first_sequence] = RequestWatch(self, first_sequence, prompt_tokens, n, max_tokens)
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
        self.count_generated()
        self.latest = stats
        self.queries_total += stats.prefix_cache_queries
        self.hits_total += stats.prefix_cache_hits
        self._running.set(stats.num_running)
        self._queued.set(stats.num_waiting + stats.num_deferred)
        self._capacity.set(stats.num_waiting)
        self._deferred.set(stats.num_deferred)
        self._cache.set(stats.kv_cache_usage)
        for counter, amount in (
            (self._queries, stats.prefix_cache_queries),
            (self._hits, stats.prefix_cache_hits),
            (self._image_queries, stats.image_queries),
            (self._image_hits, stats.image_hits),
            (self._preemptions, stats.num_preemptions),
        ):
            if amount:
                counter.inc(amount)
        if stats.iteration_tokens:
            self._step.observe(stats.iteration_tokens)
        for request_id in stats.scheduled_first:
            if watch := self._waiting.pop(request_id, None):
                watch.scheduled()

    def count_generated(self) -> None:
        """Brings the counter of generated tokens up to date, which a token would take longer to do than all else here."""
        if more := self.generated_total - self._counted:
            self.generation_tokens.inc(more)
            self._counted += more

    def _gauge(self, name: str, help: str, **labels: str) -> Gauge:
        found: Gauge = self._child(Gauge, name, help, labels)
        return found

    def _counter(self, name: str, help: str) -> Counter:
        found: Counter = self._child(Counter, name, help, {})
        return found

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        found: Histogram = self._child(Histogram, name, help, {}, buckets=buckets)
        return found


class RequestWatch:
    """Times one request: a prompt and its n sequences.

    cached: tokens of the prompt that were in the prefix cache. generated: tokens of all sequences. reasons: why those ended
    that have.
    """

    def __init__(self, metrics: EngineMetrics, request_id: str, prompt_tokens: int, n: int, max_tokens: int | None = None):
        self._metrics, self._id, self.prompt_tokens, self._max_tokens = metrics, request_id, prompt_tokens, max_tokens
        self._arrived = self._first_step = time.monotonic()
        self._last: list[float | None] = [None] * n  # time of each sequence's latest token
        self._counts, self._preemptions = [0] * n, [0] * n
        self._first_token: float | None = None
        self.cached = 0
        self.reasons: list[str] = []
        self._failed = False

    @property
    def generated(self) -> int:
        return sum(self._counts)

    @property
    def seconds(self) -> float:
        """Since the request came."""
        return time.monotonic() - self._arrived

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
            self.cached = min(delta.num_cached_tokens, self.prompt_tokens)
            metrics.ttft.observe(now - self._arrived)
            metrics.prefill.observe(now - self._first_step)
            metrics.prompt_tokens.inc(self.prompt_tokens)
            metrics.cached_tokens.inc(self.cached)
            metrics.prompt_total += self.prompt_tokens
        if count:
            index = delta.index
            if (last := self._last[index]) is not None:
                metrics.gap.observe(now - last)
            self._last[index] = now
            self._counts[index] += count
            metrics.generated_total += count
        if delta.finish_reason is not None:
            self._preemptions[delta.index] = delta.num_preemptions
            self.reasons.append(delta.finish_reason)
            metrics.success(delta.finish_reason)

    def failed(self) -> None:
        """The engine could not go on with the request: what has not ended counts as an error, not as aborted."""
        self._failed = True

    def close(self) -> None:
        """Ends the timing: the request is complete, or the client disconnected."""
        now, metrics = time.monotonic(), self._metrics
        metrics.forget(self._id)
        if unfinished := len(self._counts) - len(self.reasons):
            reason = "error" if self._failed else "abort"
            self.reasons += [reason] * unfinished
            metrics.success(reason, unfinished)
            return
        first, generated = self._first_token or now, self.generated
        metrics.e2e.observe(now - self._arrived)
        metrics.inference.observe(now - self._first_step)
        metrics.decode.observe(now - first)
        if max(self._counts) > 1:
            metrics.mean_gap.observe((now - first) / (max(self._counts) - 1))
        metrics.request_prompt.observe(self.prompt_tokens)
        metrics.request_computed.observe(self.prompt_tokens - self.cached)
        metrics.request_generation.observe(generated)
        metrics.longest.observe(max(self._counts))
        metrics.params_n.observe(len(self._counts))
        if self._max_tokens is not None:
            metrics.params_max_tokens.observe(self._max_tokens)
        metrics.request_preemptions.observe(sum(self._preemptions))
