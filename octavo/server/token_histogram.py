"""A histogram that is observed at every token: prometheus_client's takes several microseconds, a tenth of a streamed token."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.utils import floatToGoString

__all__ = ["Series", "TokenHistogram"]


class Series:
    """The observations of one set of labels. To be observed by one thread."""

    def __init__(self, bounds: Sequence[float]):
        self._bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0  # the last: above all bounds

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value


class TokenHistogram:
    """As prometheus_client's Histogram, as far as `labels` and its own registry need it. buckets: upper bounds, ascending."""

    def __init__(self, name: str, help: str, labelnames: Sequence[str], registry: CollectorRegistry, buckets: Sequence[float]):
        self._name, self._help, self._labelnames, self._bounds = name, help, labelnames, buckets
        self._series: dict[tuple[str, ...], Series] = {}
        registry.register(self)

    def labels(self, *values: str) -> Series:
        return self._series.setdefault(values, Series(self._bounds))

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._help, labels=self._labelnames)
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        for values, series in self._series.items():
            family.add_metric(values, list(zip(names, accumulate(series.counts), strict=True)), series.sum)
        yield family

    def describe(self) -> Sequence[Metric]:
        return [HistogramMetricFamily(self._name, self._help, labels=self._labelnames)]
