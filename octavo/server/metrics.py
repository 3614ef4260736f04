"""Prometheus metrics under vLLM's names, so that existing dashboards and autoscalers work unchanged.

docs/metrics.md has the table of them all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import Metric

from octavo.messages import EngineStats
from octavo.server.engine_metrics import SHORT, EngineMetrics, RequestWatch

__all__ = ["Metrics"]

_LABELS = ("model_name", "engine")
# Old names that dashboards still read -> where their values are now.
OLD_NAMES = {
    "gpu_cache_usage_perc": "kv_cache_usage_perc",
    "gpu_prefix_cache_queries": "prefix_cache_queries",
    "gpu_prefix_cache_hits": "prefix_cache_hits",
    "time_per_output_token_seconds": "inter_token_latency_seconds",
}
SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")  # by level


class Metrics:
    """All metrics of a server, in a separate registry. The label `engine` is an engine's number."""

    def __init__(
        self,
        model_name: str,
        engines: int = 1,
        cache_config: Mapping[str, Any] | None = None,
        weights: Sequence[tuple[str, str, int]] = (),
    ):
        disable_created_metrics()  # type: ignore[no-untyped-call]  # otherwise every series appears twice
        self._registry = CollectorRegistry()
        self._model_name = model_name
        self._families: dict[str, Any] = {}
        self.engines = [EngineMetrics(partial(self._child, str(number))) for number in range(engines)]
        self._requests = Counter(
            "http_requests", "Answered HTTP requests.", ("method", "handler", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "http_request_duration_seconds",
            "From an HTTP request to the end of its answer.",
            ("method", "handler"),
            buckets=SHORT,
            registry=self._registry,
        )
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)
        self._registry.register(_OldNames(self._families))
        self.sleeps(0)
        if cache_config is not None:
            values = {name: str(value) for name, value in cache_config.items()}
            info = Gauge("vllm:cache_config_info", "The KV cache.", ("engine", *values), registry=self._registry)
            for number in range(engines):
                info.labels(str(number), *values.values()).set(1)
        held = Gauge(
            "octavo:weight_bytes", "Weights as a rank holds them.", (*_LABELS, "role", "scheme"), registry=self._registry
        )
        for number in range(engines):
            for role, scheme, size in weights:
                held.labels(model_name, str(number), role, scheme).set(size)

    def watch(
        self, request_id: str, prompt_tokens: int, n: int, engine: int = 0, max_tokens: int | None = None
    ) -> RequestWatch:
        """Starts timing a request. The caller must `close` the watch."""
        return self.engines[engine].watch(request_id, prompt_tokens, n, max_tokens)

    def on_step(self, stats: EngineStats, engine: int = 0) -> None:
        """Updates the metrics from the statistics of one step."""
        self.engines[engine].on_step(stats)

    def answered(self, method: str, handler: str, status: int, seconds: float) -> None:
        """Counts an HTTP request. `handler`: the path of its route, or "none"."""
        self._requests.labels(method, handler, f"{status // 100}xx").inc()
        self._seconds.labels(method, handler).observe(seconds)

    def sleeps(self, level: int) -> None:
        """All engines sleep on this level; 0: they are awake."""
        for number in range(len(self.engines)):
            for each, state in enumerate(SLEEP_STATES):
                gauge = self._child(str(number), Gauge, "engine_sleep_state", "1 for its state.", {"sleep_state": state})
                gauge.set(each == level)

    async def text(self) -> bytes:
        """The metrics in Prometheus' text format. A thread writes it, which takes milliseconds for each engine."""
        for engine in self.engines:  # here, since steps do it, too: two threads would count tokens twice
            engine.count_generated()
        return await asyncio.to_thread(generate_latest, self._registry)

    def _child(self, engine: str, kind: type[Any], name: str, help: str, labels: Mapping[str, str], **options: Any) -> Any:
        """The series of an engine and of further labels; their family is made the first time."""
        if name not in self._families:
            self._families[name] = kind(f"vllm:{name}", help, (*_LABELS, *labels), registry=self._registry, **options)
        return self._families[name].labels(self._model_name, engine, *labels.values())


class _OldNames:
    """A collector of the same values under OLD_NAMES: observing them twice would cost time at every token."""

    def __init__(self, families: Mapping[str, Any]):
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for old, new in OLD_NAMES.items():
            for found in self._families[new].collect():
                again = Metric(f"vllm:{old}", f"Old name of vllm:{new}.", found.type)
                again.samples = [_renamed(sample, new, old) for sample in found.samples]
                yield again

    def describe(self) -> Sequence[Metric]:
        return ()


def _renamed(sample: Any, new: str, old: str) -> Any:
    return sample._replace(name=sample.name.replace(new, old, 1))
