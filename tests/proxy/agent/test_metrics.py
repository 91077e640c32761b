"""Series become metrics, and the documents say what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from pellucid_proxy.agent.collector import SeriesCollector, merged
from pellucid_proxy.control import Series
from pellucid_proxy.metrics import LABELS, METRICS, exposed_name, markdown

ROOT = Path(__file__).resolve().parents[3]
BOUNDED = {
    "action", "reason", "policy", "rule", "direction", "process", "protocol", "stage", "worker", "event", "revision", "version", "python",
    "engine", "cause", "outcome", "limit", "family",
}  # fmt: skip


def lag(*counts: int, total: float = 1.0) -> Series:
    bounds = METRICS["worker_loop_lag_seconds"].buckets
    padded = (*counts, *[0] * (len(bounds) - len(counts)))
    return Series("worker_loop_lag_seconds", "histogram", (), total, tuple(zip(bounds, padded, strict=True)))


def exposed(*series: Series) -> list[str]:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(SeriesCollector(lambda: series))
    return [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]


def test_labels_take_values_of_bounded_sets_only() -> None:
    assert {label for labels in LABELS.values() for label in labels} <= BOUNDED


def test_histograms_and_only_they_have_buckets_and_the_last_is_inf() -> None:
    for name, metric in METRICS.items():
        assert (metric.kind == "histogram") == bool(metric.buckets), name
        assert list(metric.buckets) == sorted(set(metric.buckets)), name
        assert not metric.buckets or metric.buckets[-1] == float("inf"), name


def test_the_document_holds_the_table() -> None:
    assert markdown() in (ROOT / "docs" / "metrics.md").read_text()


def test_counters_alone_end_in_total() -> None:
    assert exposed_name("bytes") == "pellucid_bytes_total"
    assert exposed_name("connections_active") == "pellucid_connections_active"


def test_series_of_all_workers_are_added_up() -> None:
    one = Series("bytes", "counter", ("up",), 5)
    other = Series("bytes", "counter", ("up",), 7)
    assert exposed(one, other, Series("bytes", "counter", ("down",), 1)) == [
        'pellucid_bytes_total{direction="down"} 1.0',
        'pellucid_bytes_total{direction="up"} 12.0',
    ]


def test_histograms_are_added_bucket_by_bucket_and_exposed_cumulated() -> None:
    lines = exposed(lag(1, 2, total=0.5), lag(0, 3, total=0.25))
    assert 'pellucid_worker_loop_lag_seconds_bucket{le="0.0001"} 1.0' in lines
    assert 'pellucid_worker_loop_lag_seconds_bucket{le="0.0005"} 6.0' in lines
    assert 'pellucid_worker_loop_lag_seconds_bucket{le="+Inf"} 6.0' in lines
    assert "pellucid_worker_loop_lag_seconds_count 6.0" in lines
    assert "pellucid_worker_loop_lag_seconds_sum 0.75" in lines


@pytest.mark.parametrize(
    "astray",
    [
        Series("no_such_metric", "counter", (), 1),
        Series("bytes", "gauge", ("up",), 1),
        Series("bytes", "counter", (), 1),
        Series("bytes", "counter", ("up", "down"), 1),
        Series("worker_loop_lag_seconds", "histogram", (), 1.0, ((1.0, 1),)),
    ],
)
def test_a_series_that_fits_no_metric_costs_nothing_but_itself(astray: Series) -> None:
    good = Series("bytes", "counter", ("up",), 5)
    assert merged([astray, good]) == [good]


def test_label_values_are_escaped() -> None:
    assert exposed(Series("denied", "counter", ('a"b', "r\n", "x"), 1)) == [
        r'pellucid_denied_total{policy="a\"b",reason="x",rule="r\n"} 1.0'
    ]


def test_every_metric_has_a_sentence_and_a_plain_name() -> None:
    for name, metric in METRICS.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name), name
        assert not name.startswith("pellucid_"), name
        assert not name.endswith("_total"), name
        assert metric.help, name
