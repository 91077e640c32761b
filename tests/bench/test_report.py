"""The report compares within a run only, takes the quietest try, and --check fails on whatever was missed or not measured."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from bench import plot, report
from bench.results import Results, best_peer, load, median, ratio_interval
from bench.scenarios import SCENARIOS

MACHINE = {"kernel": "6.1", "cpu": "a <CPU>", "cpus": 2, "python": "3.11"}


def line(contender: str, rate: float, **more: Any) -> dict[str, Any]:
    common = {
        "run": "1",
        "scenario": "conn64",
        "contender": contender,
        "repetition": 0,
        "try": 0,
        "foreign": 0.0,
        "noisy": False,
    }
    return common | {"rate": rate, "done": 1000, "flow_records": 1000, "cpu_per_unit": 0.1} | more


def loaded(tmp_path: Path, *lines: dict[str, Any], quiet_only: bool = False) -> Results:
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return load([path], quiet_only=quiet_only)


def requirement(results: Results, what: str) -> report.Requirement:
    return next(each for each in report.requirements(results) if each.what == what)


def test_ratio_is_to_the_best_peer_and_not_to_direct(tmp_path: Path) -> None:
    results = loaded(tmp_path, line("direct", 900), line("haproxy", 100), line("nginx", 200), line("pellucid", 220))
    found = requirement(results, "conn64: connections/s")
    assert (found.against, found.measured, found.met) == ("nginx 200", "1.10", True)


def test_repetitions_are_pooled_by_their_median(tmp_path: Path) -> None:
    results = loaded(tmp_path, *(line("haproxy", rate, repetition=i) for i, rate in enumerate((100, 900, 110))))
    assert median(results.contenders("conn64")["haproxy"], "rate") == 110


def test_the_quietest_try_counts(tmp_path: Path) -> None:
    results = loaded(
        tmp_path,
        line("nginx", 1, foreign=0.9, noisy=True),
        line("nginx", 2, foreign=0.1),
        line("nginx", 3, foreign=0.5),
    )
    assert median(results.contenders("conn64")["nginx"], "rate") == 2


def test_noisy_measurements_are_marked_or_left_out(tmp_path: Path) -> None:
    noisy = line("nginx", 1, foreign=0.9, noisy=True)
    assert "1 (1 noisy)" in report.document(loaded(tmp_path, noisy))
    assert not loaded(tmp_path, noisy, quiet_only=True).contenders("conn64")


def test_runs_without_both_sides_are_not_compared(tmp_path: Path) -> None:
    results = loaded(
        tmp_path, line("haproxy", 9000, run="0"), line("haproxy", 100), line("pellucid", 100), line("nginx", 90)
    )
    assert requirement(results, "conn64: connections/s").measured == "1"


def test_peers_of_other_runs_only_are_left_out(tmp_path: Path) -> None:
    results = loaded(tmp_path, line("haproxy", 100, run="0"), line("pellucid", 100))
    assert requirement(results, "conn64: connections/s").met is None
    assert list(results.contenders("conn64")) == ["pellucid"]


def test_lower_is_better_for_latency(tmp_path: Path) -> None:
    times = {"scenario": "rr1p", "p99_us": 50.0}
    results = loaded(
        tmp_path,
        line("haproxy", 1, p50_us=10.0, **times),
        line("nginx", 1, p50_us=8.0, **times),
        line("pellucid", 1, p50_us=9.0, **times),
    )
    contenders = results.contenders("rr1p")
    assert best_peer(contenders, SCENARIOS["rr1p"].figures[0]) == "nginx"
    assert requirement(results, "rr1p: p50 µs").met is False
    assert requirement(results, "rr1p: p99 µs").met is True


@pytest.mark.parametrize(("right", "met"), [((1000, 1000), True), ((1000, 999), False)])
def test_one_wrong_stream_in_any_repetition_fails_integrity(tmp_path: Path, right: tuple[int, ...], met: bool) -> None:
    results = loaded(
        tmp_path, *(line("pellucid", 0, scenario="verify", repetition=i, ok=ok) for i, ok in enumerate(right))
    )
    assert requirement(results, "verify: right of 1,000").met is met


def test_missing_flow_records_are_found_out(tmp_path: Path) -> None:
    results = loaded(tmp_path, line("pellucid", 1, flow_records=980))
    assert requirement(results, "conn64: flow records a connection").met is False


def test_check_fails_on_what_was_not_measured_and_on_pellucids_errors(tmp_path: Path) -> None:
    results = loaded(
        tmp_path, {"run": "1", "contender": "pellucid", "repetition": 0, "error": "not ready: a blocked name passes"}
    )
    found = report.failures(results)
    assert "pellucid, repetition 0: not ready: a blocked name passes" in found
    assert len(found) == 1 + len(report.requirements(results))


def test_an_interval_needs_three_repetitions(tmp_path: Path) -> None:
    three = [line("nginx", rate) for rate in (99.0, 100.0, 101.0)]
    assert ratio_interval(three[:2], three, "rate") is None
    low, high = ratio_interval(three, three, "rate") or (0.0, 0.0)
    assert 0.98 <= low <= 1 <= high <= 1.03


def test_write_replaces_only_the_generated_part(tmp_path: Path) -> None:
    machine = {
        "run": "1",
        "machine": MACHINE,
        "congestion_control": "reno",
        "workers": 1,
        "commit": "c",
        "versions": {"nginx": "1.22"},
    }
    results = loaded(tmp_path, machine, line("nginx", 100), line("pellucid", 100))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write(page, results)
    first = page.read_text()
    report.write(page, results)
    assert page.read_text() == first
    assert first.startswith("before\n")
    assert first.endswith("\nafter\n")
    assert "old" not in first
    assert "(page.svg)" in first
    ET.fromstring((tmp_path / "page.svg").read_text())


def test_the_plot_of_nothing_is_still_a_picture() -> None:
    ET.fromstring(plot.draw(Results()))
