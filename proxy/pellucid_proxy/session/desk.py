"""Where the engine turns to: a session for each connection that opens, counts and a record for each that ends.

On the way of every connection, so it compiles like the engine (engine/relay.py says how); uncompiled it runs as it is.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import time
from collections.abc import Callable

import cython

from ..control import Series
from ..engine.share import Share
from ..metrics import METRICS
from .canary import PORT as CANARY_PORT
from .canary import Canary
from .ending import ENDINGS
from .judge import Judge
from .record import Tally, address_text, source_fragment, tally_series
from .session import Session

log = logging.getLogger("pellucid.worker")

ENOUGH_BYTES = 65536
"""Waiting records that are handed on at once."""

MAX_BUCKETS = 16
UNDECIDED = '"verdict":"None","reason":"Undecided","policy":null'

_HOW_ENDED = tuple(f'"ended":{{"by":"{by}","why":"{why}"}}' for by, why in ENDINGS)


@cython.cclass
class Histogram:
    """Counts of durations by upper bound (inclusive), as in metrics.METRICS[name].buckets."""

    name: str
    size: cython.int
    bounds: cython.longlong[16]  # nanoseconds; the last one is never looked at, it has no bound
    counts: cython.longlong[16]
    total: cython.longlong

    def __init__(self, name: str) -> None:
        buckets = METRICS[name].buckets
        if not cython.compiled:
            self.bounds, self.counts = [0] * MAX_BUCKETS, [0] * MAX_BUCKETS
        self.name = name
        self.size = len(buckets)
        self.total = 0
        for i in range(self.size):
            self.bounds[i] = 0 if i == self.size - 1 else round(buckets[i] * 1e9)
            self.counts[i] = 0

    @cython.ccall
    @cython.exceptval(check=False)
    def add(self, nanoseconds: cython.longlong) -> cython.void:
        i: cython.int = 0
        while i < self.size - 1 and nanoseconds > self.bounds[i]:
            i += 1
        self.counts[i] += 1
        self.total += nanoseconds

    def series(self, in_first: int = 0) -> Series:
        """in_first: how many more belong into the first bucket."""
        counts = [self.counts[i] for i in range(self.size)]
        counts[0] += in_first
        buckets = tuple(zip(METRICS[self.name].buckets, counts, strict=True))
        return Series(self.name, "histogram", (), self.total * 1e-9, buckets)


@cython.cclass
class Clock:
    """Wall-clock text for monotonic times, RFC 3339 in UTC with milliseconds."""

    offset: cython.longlong  # wall minus monotonic, nanoseconds
    second: cython.longlong
    so_far: str  # the text up to the second

    def __init__(self) -> None:
        self.second = -1
        self.so_far = ""
        self.adjust()

    def adjust(self) -> None:
        """Follow the wall clock, which may have been set."""
        self.offset = time.time_ns() - time.monotonic_ns()

    @cython.ccall
    def text(self, monotonic_ns: cython.longlong) -> str:
        milliseconds: cython.longlong = (monotonic_ns + self.offset) // 1_000_000
        second: cython.longlong = milliseconds // 1000
        if second != self.second:
            self.second = second
            self.so_far = time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(second))
        rest: cython.int = milliseconds - second * 1000
        return f"{self.so_far}{rest:03d}Z"


@cython.cfunc
def _seconds(nanoseconds: cython.longlong) -> str:
    whole: cython.longlong = nanoseconds // 1_000_000_000
    micros: cython.int = nanoseconds // 1000 - whole * 1_000_000
    return f"{whole}.{micros:06d}"


@cython.cclass
class Desk:
    """on_records(full) is called when a first record waits, and when ENOUGH_BYTES do (full). on_tick is the engine's tick.

    limit: bytes of records that may wait, unsent ones (the owner's) included; more are dropped and counted. 0: no records at all.
    """

    most_of_pod: cython.int
    most_pending: cython.int
    shares: dict[bytes, Share]  # by a pod's first address; none without connections
    shed_connections: cython.longlong
    shed_pending: cython.longlong
    on_tick: Callable[[], None]
    clock: Clock
    judge: Judge
    node: str
    node_name: str
    on_records: Callable[[bool], None]
    limit: cython.Py_ssize_t
    waiting: cython.Py_ssize_t
    unsent: cython.Py_ssize_t
    records: list[str]
    opened: cython.longlong
    canaries: dict[bytes, int]  # answers by address
    failures: cython.longlong
    dropped: cython.longlong
    bytes_up: cython.longlong
    bytes_down: cython.longlong
    protocols: dict[str, int]
    duration: Histogram
    first_byte: Histogram
    connect: Histogram
    lag: Histogram

    def __init__(
        self, judge: Judge, node: str, limit: int, on_records: Callable[[bool], None], on_tick: Callable[[], None]
    ) -> None:
        self.on_tick = on_tick
        self.clock = Clock()
        self.judge = judge
        self.most_of_pod = judge.settings.max_connections_per_pod
        self.most_pending = judge.settings.max_pending_per_pod
        self.shares = {}
        self.shed_connections = self.shed_pending = 0
        self.node_name = node
        self.canaries = {ipaddress.ip_address(text).packed: 0 for text in judge.settings.canary}
        self.node = f'"node":{json.dumps(node)}'
        self.on_records = on_records
        self.limit = limit
        self.waiting = self.unsent = 0
        self.records = []
        self.opened = self.failures = self.dropped = self.bytes_up = self.bytes_down = 0
        self.protocols = {}
        self.duration = Histogram("connection_duration_seconds")
        self.first_byte = Histogram("first_byte_seconds")
        self.connect = Histogram("upstream_connect_seconds")
        self.lag = Histogram("worker_loop_lag_seconds")

    # The engine calls these

    def session(self, source: bytes, destination: bytes, port: int) -> Session:
        """Addresses are packed. A connection that is one too many of its pod gets a session that refuses it."""
        self.opened += 1
        pod: bytes = self.judge.enforced.first_address.get(source, source)
        share: Share | None = self.shares.get(pod)
        if share is None:
            share = self.shares[pod] = Share(pod)
        session: Session = Session(self.judge, source, destination, port, share)
        if port == CANARY_PORT and destination in self.canaries:
            session = Canary(self.judge, source, destination, share, self.node_name)
        if share.connections >= self.most_of_pod:
            session.too_many = True
            self.shed_connections += 1
        elif share.pending >= self.most_pending:
            session.too_many = True
            self.shed_pending += 1
        share.connections += 1
        return session

    def closed(
        self,
        session: Session,
        source_port: cython.int,
        why: cython.int,
        opened: cython.longlong,
        connected: cython.longlong,
        answered: cython.longlong,
        now: cython.longlong,
        up: cython.longlong,
        down: cython.longlong,
    ) -> None:
        """why: index of ending.ENDINGS. Times in monotonic nanoseconds, 0 for what never was; up and down in bytes."""
        share: Share = session.share
        share.connections -= 1
        if not share.connections:
            del self.shares[share.pod]
        tally: Tally | None = session.tally
        if tally is not None:
            tally.closed[why] += 1
        session.guard = None  # it refers back to the session
        if isinstance(session, Canary):
            self.canaries[session.destination] += not session.too_many
            return
        self.bytes_up += up
        self.bytes_down += down
        self.protocols[session.protocol] = self.protocols.get(session.protocol, 0) + 1
        self.duration.add(now - opened)
        if connected:
            self.connect.add(connected - opened)
        if answered:
            self.first_byte.add(answered - opened)
        if session.audited is not None:
            self.judge.tallies.of(session.audited).audited += 1
        if self.waiting + self.unsent >= self.limit:
            self.dropped += self.limit > 0
            return
        line = self.line(
            session, source_port, why, opened, now - opened, answered - opened if answered else 0, up, down
        )
        self.records.append(line)
        first = not self.waiting
        self.waiting += len(line)
        if first or self.waiting >= ENOUGH_BYTES:
            self.on_records(self.waiting >= ENOUGH_BYTES)

    def failed(self) -> None:
        """Something raised where the engine cannot let it through."""
        self.failures += 1
        log.exception("a connection was refused because deciding about it failed")

    def lagged(self, nanoseconds: int) -> None:
        """A batch of events took long."""
        self.lag.add(nanoseconds)

    def tick(self) -> None:
        self.on_tick()

    # The worker calls these

    def keep_up_to(self, limit: int) -> None:
        """From now on so many bytes of records may wait; 0: no more records are made."""
        self.limit = limit

    def take(self) -> bytes:
        """The records that wait; they are the caller's now."""
        taken = "".join(self.records).encode()
        self.records.clear()
        self.waiting = 0
        return taken

    def left(self, count: int) -> None:
        """Of the bytes that were taken so many could not be passed on yet."""
        self.unsent = count

    def adjust_clock(self) -> None:
        self.clock.adjust()

    def series(self, active: int, quick_batches: int) -> list[Series]:
        """All time series, as metrics.METRICS names them. active: connections now; quick_batches: loops in the first bucket."""
        return [
            Series("connections_pending", "gauge", (), sum(each.pending for each in self.shares.values())),
            Series("connections_shed", "counter", ("connections_per_pod",), self.shed_connections),
            Series("connections_shed", "counter", ("pending_per_pod",), self.shed_pending),
            *(
                Series("canary_answers", "counter", ("IPv4" if len(address) == 4 else "IPv6",), count)
                for address, count in self.canaries.items()
            ),
            Series("unknown_pods", "counter", ("known",), self.judge.unknown_known),
            Series("unknown_pods", "counter", ("expired",), self.judge.unknown_expired),
            Series("connections_opened", "counter", (), self.opened),
            Series("connections_active", "gauge", (), active),
            Series("decisions_failed", "counter", (), self.failures),
            Series("bytes", "counter", ("up",), self.bytes_up),
            Series("bytes", "counter", ("down",), self.bytes_down),
            Series("events_dropped", "counter", ("worker",), self.dropped),
            self.duration.series(),
            self.first_byte.series(),
            self.connect.series(),
            self.lag.series(quick_batches),
            *(Series("first_bytes_protocol", "counter", (kind,), count) for kind, count in self.protocols.items()),
            *tally_series(self.judge.tallies),
        ]

    @cython.cfunc
    def line(
        self,
        session: Session,
        source_port: cython.int,
        why: cython.int,
        opened: cython.longlong,
        duration: cython.longlong,
        first_byte: cython.longlong,
        up: cython.longlong,
        down: cython.longlong,
    ) -> str:
        """One flow record with its line end; docs/flow-records.md describes it.

        A name needs no escaping: a sniffer returns letters, digits, hyphens, underscores and dots only.
        """
        tally: Tally | None = session.tally
        identity = session.identity
        verdict: str = UNDECIDED if tally is None else tally.fragment
        source: str = source_fragment(session.source, "", "", "", "") if identity is None else identity.source
        revision: str = "" if identity is None else identity.revision
        name: str = "null" if session.name is None else f'"{session.name}"'
        first: str = _seconds(first_byte) if first_byte else "null"
        audit: str = ""
        if session.audited is not None:
            audit = f',"audit":{{{self.judge.tallies.of(session.audited).fragment}}}'
        address: str = address_text(session.destination)
        port: cython.int = session.port
        return (
            f'{{"time":"{self.clock.text(opened)}",{verdict},"revision":"{revision}","source":{source}{source_port}}},'
            f'"destination":{{"address":"{address}","port":{port},"name":{name}}},"protocol":"{session.protocol}",'
            f'"bytes":{{"up":{up},"down":{down}}},"durationSeconds":{_seconds(duration)},"firstByteSeconds":{first},'
            f"{_HOW_ENDED[why]}{audit},{self.node}}}\n"
        )
