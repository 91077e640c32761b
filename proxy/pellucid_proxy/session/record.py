"""What is told of a connection once it ended: one line of JSON, and the counts that become metrics.

Everything that does not change from one connection to the next is text already when it is needed: a source once a pod,
a verdict once a rule, an address once an address.
"""

from __future__ import annotations

import ipaddress
import json
import time
from bisect import bisect_left
from functools import lru_cache
from typing import TYPE_CHECKING

from pellucid_policy.verdict import Action, RuleKey, Verdict

from ..control import Series
from ..metrics import METRICS
from .ending import ENDINGS

if TYPE_CHECKING:
    from .session import Session

BLOCK = Action.BLOCK  # looked up in its enum it costs a microsecond in Python 3.11


def source_fragment(address: bytes, namespace: str, pod: str, uid: str, service_account: str) -> str:
    """JSON of a record's source up to the port's value."""
    known = {
        "namespace": namespace,
        "pod": pod,
        "uid": uid,
        "serviceAccount": service_account,
        "address": address_text(address),
    }
    return json.dumps(known, separators=(",", ":"))[:-1] + ',"port":'


@lru_cache(maxsize=4096)
def address_text(packed: bytes) -> str:
    return str(ipaddress.ip_address(packed))


class Tally:
    """One verdict: its text in a record, and how many connections of it ended in which way."""

    def __init__(self, verdict: Verdict) -> None:
        self.action = str(verdict.action)
        self.reason = str(verdict.reason)
        self.rule = verdict.rule
        self.closed = [0] * len(ENDINGS)
        self.fragment = f'"verdict":"{self.action}","reason":"{self.reason}","policy":{_policy(verdict.rule)}'


def _policy(rule: RuleKey | None) -> str:
    if rule is None:
        return "null"
    known = {"kind": rule.kind, "namespace": rule.namespace, "name": rule.policy, "rule": rule.rule}
    return json.dumps(known, separators=(",", ":"))


class Tallies:
    """Counts by verdict, over all revisions of the policy."""

    def __init__(self) -> None:
        self._by_key: dict[tuple[str, str, RuleKey | None], Tally] = {}
        self._by_identity: dict[int, tuple[Verdict, Tally]] = {}

    def of(self, verdict: Verdict) -> Tally:
        """The tally of verdict. By the object first: a compiled policy has one object a verdict, and hashing it is slow."""
        known = self._by_identity.get(id(verdict))
        if known is not None:
            return known[1]
        key = (str(verdict.action), str(verdict.reason), verdict.rule)
        tally = self._by_key.get(key)
        if tally is None:
            tally = self._by_key[key] = Tally(verdict)
        if len(self._by_identity) > 65536:
            self._by_identity.clear()
        self._by_identity[id(verdict)] = (verdict, tally)  # with the verdict: its id is not used again meanwhile
        return tally

    def forget_objects(self) -> None:
        """Let go of the verdicts of policies no longer in force; the counts stay."""
        self._by_identity.clear()

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._by_key.values())


class Histogram:
    """Counts by upper bound (inclusive), as in metrics.METRICS[name].buckets."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bounds = METRICS[name].buckets
        self.counts = [0] * len(self.bounds)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def series(self) -> Series:
        return Series(self.name, "histogram", (), self.total, tuple(zip(self.bounds, self.counts, strict=True)))


class Clock:
    """Wall-clock text for monotonic times, RFC 3339 in UTC with milliseconds. offset_ns: wall minus monotonic."""

    def __init__(self, offset_ns: int) -> None:
        self.offset_ns = offset_ns
        self._second = -1
        self._text = ""

    def text(self, monotonic_ns: int) -> str:
        milliseconds = (monotonic_ns + self.offset_ns) // 1_000_000
        second = milliseconds // 1000
        if second != self._second:
            self._second = second
            self._text = time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(second))
        return f"{self._text}{milliseconds - second * 1000:03d}Z"


def flow_line(
    session: Session,
    source_port: int,
    why: int,
    time_text: str,
    node_fragment: str,
    duration_ns: int,
    first_byte_ns: int,
    up: int,
    down: int,
) -> str:
    """One flow record with its line end; docs/flow-records.md describes it. first_byte_ns: 0 if the server said nothing.

    A name needs no escaping: a sniffer returns letters, digits, hyphens, underscores and dots only.
    """
    tally, identity, audited = session.tally, session.identity, session.audited
    verdict = tally.fragment if tally is not None else UNDECIDED
    if identity is not None:
        source, revision = identity.source, identity.revision
    else:
        source, revision = source_fragment(session.source, "", "", "", ""), ""
    name = "null" if session.name is None else f'"{session.name}"'
    first = "null" if not first_byte_ns else _seconds(first_byte_ns)
    audit = "" if audited is None else f',"audit":{{{session.judge.tallies.of(audited).fragment}}}'
    by, ended = ENDINGS[why]
    return (
        f'{{"time":"{time_text}",{verdict},"revision":"{revision}","source":{source}{source_port}}},'
        f'"destination":{{"address":"{address_text(session.destination)}","port":{session.port},"name":{name}}},'
        f'"protocol":"{session.protocol}","bytes":{{"up":{up},"down":{down}}},"durationSeconds":{_seconds(duration_ns)},'
        f'"firstByteSeconds":{first},"ended":{{"by":"{by}","why":"{ended}"}}{audit},{node_fragment}}}\n'
    )


UNDECIDED = '"verdict":"None","reason":"Undecided","policy":null'


def _seconds(nanoseconds: int) -> str:
    microseconds = nanoseconds // 1000
    return f"{microseconds // 1_000_000}.{microseconds % 1_000_000:06d}"


class Counts:
    """Everything a worker counts besides its tallies."""

    def __init__(self, tallies: Tallies) -> None:
        self.tallies = tallies
        self.opened = 0
        self.bytes_up = 0
        self.bytes_down = 0
        self.failed = 0
        self.dropped_records = 0
        self.protocols: dict[str, int] = {}
        self.audit_denied: dict[tuple[str, str], int] = {}
        self.duration = Histogram("connection_duration_seconds")
        self.first_byte = Histogram("first_byte_seconds")
        self.connect = Histogram("upstream_connect_seconds")
        self.lag = Histogram("worker_loop_lag_seconds")

    def closed(
        self, session: Session, why: int, opened: int, connected: int, answered: int, now: int, up: int, down: int
    ) -> None:
        """Count an ended connection; times in monotonic nanoseconds, 0 for what never was."""
        if session.tally is not None:
            session.tally.closed[why] += 1
        self.bytes_up += up
        self.bytes_down += down
        self.protocols[session.protocol] = self.protocols.get(session.protocol, 0) + 1
        self.duration.add((now - opened) * 1e-9)
        if connected:
            self.connect.add((connected - opened) * 1e-9)
        if answered:
            self.first_byte.add((answered - opened) * 1e-9)
        audited = session.audited
        if audited is not None and audited.action is BLOCK:
            key = _names(audited.rule)
            self.audit_denied[key] = self.audit_denied.get(key, 0) + 1

    def series(self, active: int, quick_batches: int) -> list[Series]:
        """All time series, as metrics.METRICS names them. active: connections now; quick_batches: loops shorter than the first bound."""
        found = [
            Series("connections_opened", "counter", (), self.opened),
            Series("connections_active", "gauge", (), active),
            Series("bytes", "counter", ("up",), self.bytes_up),
            Series("bytes", "counter", ("down",), self.bytes_down),
            Series("events_dropped", "counter", ("worker",), self.dropped_records),
            self.duration.series(),
            self.first_byte.series(),
            self.connect.series(),
        ]
        self.lag.counts[0] = quick_batches
        found.append(self.lag.series())
        found += [
            Series("first_bytes_protocol", "counter", (protocol,), count) for protocol, count in self.protocols.items()
        ]
        found += [Series("audit_would_deny", "counter", names, count) for names, count in self.audit_denied.items()]
        closed: dict[tuple[str, str], int] = {}
        denied: dict[tuple[str, str, str], int] = {}
        for tally in self.tallies:
            for why, count in enumerate(tally.closed):
                if count:
                    closed[tally.action, ENDINGS[why].why] = closed.get((tally.action, ENDINGS[why].why), 0) + count
            if tally.action == BLOCK and any(tally.closed):
                policy, rule = _names(tally.rule)
                denied[policy, rule, tally.reason] = denied.get((policy, rule, tally.reason), 0) + sum(tally.closed)
        found += [Series("connections_closed", "counter", labels, count) for labels, count in closed.items()]
        found += [Series("denied", "counter", labels, count) for labels, count in denied.items()]
        return found


def _names(rule: RuleKey | None) -> tuple[str, str]:
    """policy and rule as labels: namespace/name, or the name alone of a ClusterTransparentPolicy."""
    if rule is None:
        return "", ""
    return (f"{rule.namespace}/{rule.policy}" if rule.namespace else rule.policy), rule.rule
