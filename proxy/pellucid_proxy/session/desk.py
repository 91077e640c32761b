"""Where the engine turns to: a session for each connection that opens, counts and a record for each that ends."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable

from .judge import Judge
from .record import Clock, Counts, flow_line
from .session import Session

log = logging.getLogger("pellucid.worker")

ENOUGH_BYTES = 65536
"""Waiting records that are handed on at once."""


class Desk:
    """on_records(full) is called when a first record waits, and when ENOUGH_BYTES do (full). on_tick is the engine's tick.

    limit: bytes of records that may wait, unsent ones (the owner's) included; more are dropped and counted. 0: no records at all.
    """

    def __init__(
        self, judge: Judge, node: str, limit: int, on_records: Callable[[bool], None], on_tick: Callable[[], None]
    ) -> None:
        self.counts = Counts(judge.tallies)
        self.clock = Clock(time.time_ns() - time.monotonic_ns())
        self.unsent = 0
        self.tick = on_tick
        self._judge = judge
        self._node = f'"node":{json.dumps(node)}'
        self._limit = limit
        self._on_records = on_records
        self._records: list[str] = []
        self._waiting = 0

    def session(self, source: bytes, destination: bytes, port: int) -> Session:
        """Addresses are packed."""
        self.counts.opened += 1
        return Session(self._judge, source, destination, port)

    def closed(
        self,
        session: Session,
        source_port: int,
        why: int,
        opened: int,
        connected: int,
        answered: int,
        now: int,
        up: int,
        down: int,
    ) -> None:
        """why: index of ending.ENDINGS. Times in monotonic nanoseconds, 0 for what never was; up and down in bytes."""
        self.counts.closed(session, why, opened, connected, answered, now, up, down)
        session.guard = None  # it refers back to the session
        if self._waiting + self.unsent >= self._limit:
            self.counts.dropped_records += self._limit > 0
            return
        first_byte = answered - opened if answered else 0
        line = flow_line(
            session, source_port, why, self.clock.text(opened), self._node, now - opened, first_byte, up, down
        )
        self._records.append(line)
        before = self._waiting
        self._waiting += len(line)
        if not before or self._waiting >= ENOUGH_BYTES:
            self._on_records(self._waiting >= ENOUGH_BYTES)

    def take(self) -> bytes:
        """The records that wait; they are the caller's now."""
        taken = "".join(self._records).encode()
        self._records.clear()
        self._waiting = 0
        return taken

    def failed(self) -> None:
        """Something raised where the engine cannot let it through."""
        self.counts.failed += 1
        log.exception("a connection was refused because deciding about it failed")

    def lagged(self, nanoseconds: int) -> None:
        """A batch of events took long."""
        self.counts.lag.add(nanoseconds * 1e-9)
