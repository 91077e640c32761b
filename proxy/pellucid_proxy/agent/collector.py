"""Series of workers and agent as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ..control import Series
from ..metrics import METRICS, PREFIX

Key = tuple[str, tuple[str, ...]]
Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily

_FAMILIES: dict[str, type[Family]] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


class SeriesCollector(Collector):
    """Serves what gather returns, at each scrape anew. gather is called in a thread of the HTTP server."""

    def __init__(self, gather: Callable[[], Iterable[Series]]) -> None:
        self._gather = gather

    def collect(self) -> Iterator[Metric]:
        return families(merged(self._gather()))

    def describe(self) -> Iterator[Metric]:
        """What a registry compares for doubles; empty, so that registering does not scrape."""
        return iter(())


def merged(series: Iterable[Series]) -> list[Series]:
    """Those of equal name and labels added up, in order of name and labels.

    What does not fit metrics.METRICS is left out: one worker gone astray must not cost the node its metrics.
    """
    by_key: dict[Key, Series] = {}
    for each in series:
        if not _fits(each):
            continue
        key = (each.name, each.labels)
        known = by_key.get(key)
        by_key[key] = each if known is None else _sum(known, each)
    return [by_key[key] for key in sorted(by_key)]


def families(series: Iterable[Series]) -> Iterator[Metric]:
    """Metric families with their samples; series are in order of name. A metric without series has none: it was never counted."""
    family: Family | None = None
    current = ""
    for each in series:
        if each.name != current or family is None:
            if family is not None:
                yield family
            family, current = _family(each.name), each.name
        if isinstance(family, HistogramMetricFamily):
            family.add_metric(each.labels, _cumulative(each.buckets), each.value)
        else:
            family.add_metric(each.labels, each.value)
    if family is not None:
        yield family


def _family(name: str) -> Family:
    metric = METRICS[name]
    return _FAMILIES[metric.kind](PREFIX + name, metric.help, labels=metric.labels)


def _fits(series: Series) -> bool:
    metric = METRICS.get(series.name)
    return (
        metric is not None
        and metric.kind == series.kind
        and len(metric.labels) == len(series.labels)
        and tuple(bound for bound, _ in series.buckets) == metric.buckets
    )


def _sum(one: Series, other: Series) -> Series:
    buckets = tuple((bound, a + b) for (bound, a), (_, b) in zip(one.buckets, other.buckets, strict=True))
    return Series(one.name, one.kind, one.labels, one.value + other.value, buckets)


def _cumulative(buckets: tuple[tuple[float, int], ...]) -> list[tuple[str, float]]:
    total = 0
    found: list[tuple[str, float]] = []
    for bound, count in buckets:
        total += count
        found.append((floatToGoString(bound), total))
    return found
