"""Who counted what: clients, servers, the proxy's metrics and its flow records must agree on every connection."""

from __future__ import annotations

import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from tests.netns.product.stage import Stage

METRICS = "127.0.0.1:9464"


class Sample(NamedTuple):
    """name as exposed, without pellucid_."""

    name: str
    labels: dict[str, str]
    value: float


def scrape(stage: Stage) -> list[Sample]:
    """The node's metrics now. Raises OSError if they are not served."""

    def fetch() -> str:
        with urllib.request.urlopen(f"http://{METRICS}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    return [
        Sample(sample.name.removeprefix("pellucid_"), sample.labels, sample.value)
        for family in text_string_to_metric_families(stage.node.call(fetch))
        for sample in family.samples
    ]


def value(samples: list[Sample], name: str, **labels: str) -> int:
    """The sum of the samples of that name that have these labels."""
    return int(sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items()))


class _Ended(msgspec.Struct):
    why: str


class _Record(msgspec.Struct):
    verdict: str
    ended: _Ended


class FlowFile:
    """Flow records of a file that grows, counted by verdict and how they ended: {"Allow End": 3}. lines: all of them."""

    BLOCK = 1 << 20

    def __init__(self, path: Path) -> None:
        self.lines = 0
        self.ended: Counter[str] = Counter()
        self._file = path.open("rb")
        self._rest = b""
        self._decoder = msgspec.json.Decoder(_Record)

    def close(self) -> None:
        self._file.close()

    def read_on(self) -> int:
        """lines, with what has come since."""
        while block := self._file.read(self.BLOCK):
            *whole, self._rest = (self._rest + block).split(b"\n")
            self.lines += len(whole)
            self.ended.update(f"{r.verdict} {r.ended.why}" for r in map(self._decoder.decode, whole))
        return self.lines


class Account(NamedTuple):
    """One thing that several counted. counts: by who counted it."""

    what: str
    counts: dict[str, int]

    @property
    def agreed(self) -> bool:
        return len(set(self.counts.values())) == 1


def accounts(
    clients: Counter[str],
    direct: int,
    servers: list[dict[str, Any]],
    records: FlowFile,
    samples: list[Sample],
) -> list[Account]:
    """Every connection, as each side counted it. clients: by kind (tests/drivers/wire.h), those that went as their kind says; direct:
    those of the pod that no policy selects, all of kind A; servers: their last counts; samples: the last scrape."""
    asked: Counter[str] = sum((Counter(each["asked"]) for each in servers), Counter())
    right: Counter[str] = sum((Counter(each["right"]) for each in servers), Counter())
    to_servers = sum(clients[kind] for kind in "AHBCSL")
    through = to_servers + clients["X"] + clients["N"]
    lost = value(samples, "events_dropped_total")
    ended, denied = records.ended, value(samples, "kernel_decided_packets_total", rule="kernel", action="Block")

    def closed(reason: str, action: str | None = None) -> int:
        labels = {"reason": reason} | ({"action": action} if action else {})
        return value(samples, "connections_closed_total", **labels)

    def told(why: str) -> int:
        return sum(count for key, count in ended.items() if key.split()[1] == why)

    all_of_them = {
        "clients": through,
        "metric": value(samples, "connections_opened_total"),
        f"records, {lost} lost": records.lines + lost,
    }
    arrived = {"clients": to_servers + direct, "servers": sum(each["accepted"] for each in servers)}
    found = [
        Account("all", all_of_them),
        Account("reached a server", arrived),
        Account("refused by the kernel", {"clients": clients["K"], "metric": denied}),
    ]
    names = {
        "A": "answered",
        "H": "half-closed",
        "B": "bulk",
        "C": "reset by the client",
        "S": "reset by the server",
        "L": "held",
    }
    for kind, name in names.items():
        own = clients[kind] + (direct if kind == "A" else 0)
        found.append(Account(name, {"clients": own, "asked": asked[kind], "servers": right[kind]}))
    by_ending = {
        "End": clients["A"] + clients["H"] + clients["B"],
        "UpstreamReset": clients["S"],
        "Refused": clients["X"],
        "PodChanged": clients["L"],
    }
    for why, count in by_ending.items():
        found.append(Account(f"ended: {why}", {"clients": count, "metric": closed(why), "records": told(why)}))
    # One that is reset before it has said a word has no verdict, and so no place in the metric
    found.append(
        Account("ended: ClientReset", {"clients": clients["C"] + clients["N"], "records": told("ClientReset")})
    )
    found.append(
        Account("ended: ClientReset, allowed", {"clients": clients["C"], "metric": closed("ClientReset", "Allow")})
    )
    return found
