"""Metrics and flow records against what servers and clients counted; and readers that stop reading."""

from __future__ import annotations

import os
import re
import signal
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from pellucid_cli.lab.clients import get
from pellucid_cli.lab.servers import speak_http
from pellucid_cli.lab.topology import Namespace

from ..world import eventually
from .conftest import Figure
from .stage import CountingServer, Load, Stage, gone, policy, process_ids, records, wait_for_records

ADDRESS = "127.0.0.1:9090"
SITE, TRIAL, BLOCKED = "site.example", "trial.example", "blocked.example"
ALLOWED, AUDITED, REFUSED, AT_THE_DOOR = 60, 20, 30, 7
DOCUMENT = Path(__file__).parents[3] / "docs" / "metrics.md"
RULES = policy(f"""
  - {{name: door, match: {{destinations: [{{cidr: 192.0.2.11/32}}]}}, action: Block}}
  - {{name: trial, match: {{destinations: [{{domain: {TRIAL}}}]}}, action: Block, mode: Audit}}
  - {{name: site, match: {{destinations: [{{domain: {SITE}}}, {{domain: {TRIAL}}}]}}, action: Allow}}
  - {{name: rest, match: {{}}, action: Block}}
""")

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def _scrape(stage: Stage) -> Samples:
    def fetch() -> str:
        with urllib.request.urlopen(f"http://{ADDRESS}/metrics", timeout=5) as answer:
            return str(answer.read().decode())

    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(stage.node.call(fetch))
        for sample in family.samples
    }


def _value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((f"pellucid_{name}", tuple(sorted(labels.items()))), 0)


def _exchange(pod: Namespace, address: str, name: str) -> tuple[int, int]:
    """Bytes sent and received by one request."""
    request = f"GET / HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode()
    received = 0
    with pod.connect(address, 80) as connection:
        connection.sendall(request)
        while more := connection.recv(65536):
            received += len(more)
    return len(request), received


def test_totals_are_what_servers_and_clients_counted(tmp_path: Path, figure: Figure) -> None:
    with Stage(tmp_path) as stage:
        stage.serve("web", {80: speak_http})
        stage.write("policy.yaml", RULES)
        a, web = stage["a"], stage["web"]
        with stage.run("--metrics", ADDRESS, "--workers", "2") as instance:
            moved = [_exchange(a, web.addresses[n % 2], SITE) for n in range(ALLOWED)]
            moved += [_exchange(a, web.addresses[n % 2], TRIAL) for n in range(AUDITED)]
            told = wait_for_records(instance, len(moved))
            relayed = _scrape(stage)
            assert {get(a, web.addresses[n % 2], 80, BLOCKED).end for n in range(REFUSED)} == {"reset"}
            assert {get(a, "192.0.2.11", 80, SITE).end for _ in range(AT_THE_DOOR)} == {"refused"}
            through = ALLOWED + AUDITED + REFUSED
            written = len(wait_for_records(instance, through))
            samples = _scrape(stage)
        arrivals = stage.journal.arrivals()
        up, down = (sum(each[way] for each in moved) for way in (0, 1))
        expected = {
            "connections at the server": (len(arrivals), ALLOWED + AUDITED),
            "bytes at the server": (sum(arrival.received for arrival in arrivals), up),
            "connections_opened": (_value(samples, "connections_opened_total"), through),
            "connections_active": (_value(samples, "connections_active"), 0),
            "allowed": (_value(samples, "connections_closed_total", action="Allow", reason="End"), ALLOWED + AUDITED),
            "blocked": (_value(samples, "connections_closed_total", action="Block", reason="Refused"), REFUSED),
            "denied": (_value(samples, "denied_total", policy="shop/p", rule="rest", reason="RuleMatched"), REFUSED),
            "audit": (_value(samples, "audit_would_deny_total", policy="shop/p", rule="trial"), AUDITED),
            "bytes up": (_value(relayed, "bytes_total", direction="up"), up),
            "bytes down": (_value(relayed, "bytes_total", direction="down"), down),
            "first bytes": (_value(samples, "first_bytes_protocol_total", protocol="HTTP/1"), through),
            "durations": (_value(samples, "connection_duration_seconds_count"), through),
            "upstream connects": (_value(samples, "upstream_connect_seconds_count"), ALLOWED + AUDITED),
            "intercepted": (_value(samples, "kernel_events_total", event="intercepted"), through),
            "kernel": (
                _value(samples, "kernel_decided_packets_total", policy="shop/p", rule="door", action="Block"),
                AT_THE_DOOR,
            ),
            "records": (written, through),
            "bytes in records": (sum(each["bytes"]["up"] + each["bytes"]["down"] for each in told), up + down),
            "records lost": (_value(samples, "events_dropped_total", stage="worker"), 0),
            "workers": (_value(samples, "worker_up", worker="0") + _value(samples, "worker_up", worker="1"), 2),
        }
        wrong = {what: pair for what, pair in expected.items() if pair[0] != pair[1]}
        named = set(re.findall(r"^\| `(pellucid_\w+)`", DOCUMENT.read_text(), re.MULTILINE))
        served = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name, _ in samples} | {
            name for name, _ in samples
        }
        figure(
            "metrics",
            f"{len(expected) - len(wrong)} of {len(expected)} totals equal, {len(named & served)} of {len(named)} metrics served",
        )
        assert wrong == {}
        assert named - served == set()


@contextmanager
def _stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_an_agent_that_hangs_costs_records_which_are_counted_and_no_traffic(tmp_path: Path, figure: Figure) -> None:
    """The worker's pipe and its own buffer fill up; the rest is dropped and counted."""
    with Stage(tmp_path) as stage, CountingServer(stage["web"], 80) as server:
        stage.write("policy.yaml", RULES)
        a, web = stage["a"], stage["web"]
        with stage.run("--metrics", ADDRESS, "--workers", "1") as instance:
            with _stopped(process_ids(instance)["agent"]):
                with Load(a, web.addresses, 80, SITE, parallel=4) as load:
                    assert eventually(lambda: server.accepted > 6000, 60.0)
                slowest = max(_seconds(lambda: get(a, web.ipv4, 80, SITE).end) for _ in range(50))
            opened = sum(load.ended.values()) + 50
            assert eventually(lambda: len(records(instance)) + _lost(stage) == opened), (
                len(records(instance)),
                _lost(stage),
                opened,
            )
            lost = _lost(stage)
            assert get(a, web.ipv4, 80, SITE).end == "answered"
            assert eventually(lambda: len(records(instance)) + lost == opened + 1), "records do not come again"
        figure(
            "an agent that hangs",
            f"{opened} connections all answered, {lost:.0f} records lost and counted, slowest {slowest * 1000:.0f} ms",
        )
        assert load.ended == {"ok": opened - 50}
        assert lost > 0
        assert slowest < 0.5


def _lost(stage: Stage) -> float:
    return _value(_scrape(stage), "events_dropped_total", stage="worker")


def _seconds(act: object) -> float:
    begun = time.monotonic()
    assert callable(act)
    assert act() == "answered"
    return time.monotonic() - begun


def test_a_reader_of_flows_that_stops_reading_delays_nobody(tmp_path: Path, figure: Figure) -> None:
    """The flow file is a pipe that is full: nothing is lost, nobody waits, and the stop waits no longer than it says."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with Stage(tmp_path) as stage, CountingServer(stage["web"], 80) as server:
            stage.write("policy.yaml", RULES)
            a, web = stage["a"], stage["web"]
            with stage.run("--flows", str(pipe), "--workers", "1") as instance:
                with Load(a, web.addresses, 80, SITE, parallel=4) as load:
                    assert eventually(lambda: server.accepted > 1000, 30.0)
                opened = sum(load.ended.values())
                slowest = max(_seconds(lambda: get(a, web.ipv4, 80, SITE).end) for _ in range(50))
                lines = 0

                def all_read() -> bool:
                    nonlocal lines
                    try:
                        lines += os.read(reader, 1 << 20).count(b"\n")
                    except BlockingIOError:
                        pass
                    return lines == opened + 50

                assert eventually(all_read, 10.0), (lines, opened + 50)
                with Load(a, web.addresses, 80, SITE, parallel=4):
                    assert eventually(lambda: server.accepted > opened + 600, 30.0)
                guardian = process_ids(instance)["guardian"]
                begun = time.monotonic()
                os.kill(guardian, signal.SIGTERM)
                assert eventually(lambda: gone(guardian), 10.0)
                stopped_s = time.monotonic() - begun
                assert instance.stop() == 0
            figure(
                "a full pipe of flow records",
                f"{opened + 50} connections, 0 records lost, slowest {slowest * 1000:.0f} ms; stopped in {stopped_s:.1f} s",
            )
            assert load.ended == {"ok": opened}
            assert slowest < 0.5
            assert stopped_s < 5.0
    finally:
        os.close(reader)
