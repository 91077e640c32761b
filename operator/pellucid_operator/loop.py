"""From events to writes: the world is planned anew when it has changed and holds still, and brought to the plan."""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import time
from collections.abc import Mapping

from prometheus_client import Counter, Gauge, Histogram

from pellucid_policy.objects import Object

from .cluster import Cluster, Refused
from .judge import Unknown
from .plan import Plan, plan
from .store import Store
from .world import DAEMON_SETS, SNAPSHOTS, USER_KINDS, WATCHED, Body, Key, Kind, Wanted, World
from .writer import Writer

log = logging.getLogger(__name__)

QUIET_S, LONGEST_S = 0.1, 2.0  # no event for so long, or at the latest
LIST_AGAIN_S = 300.0  # what no event told of: a watch that was broken off misses deletions
RETRY_S, LONGEST_RETRY_S = 1.0, 30.0
REVISIONS = 256  # whose content is remembered
STUCK_S = 120.0

PLANNED = Histogram("pellucid_operator_plan_seconds", "From everything that is there to everything that should be")
OBJECTS = Gauge("pellucid_operator_objects", "Objects of users, by whether they are accepted", ["accepted"])
PIECES = Gauge("pellucid_operator_snapshot_pieces", "Pieces of the snapshot that is offered")
BYTES = Gauge("pellucid_operator_snapshot_bytes", "Their size in all, as base64")
WRITES = Counter("pellucid_operator_writes", "Requests that changed something, by kind", ["resource"])
FAILURES = Counter("pellucid_operator_failures", "Rounds in which not all could be written")
PENDING = Gauge("pellucid_operator_pending_seconds", "How long something has been waiting to be planned and written")


class Loop:
    """on_event() may be called at any time in the event loop's thread; run() is to be a task. listed: set once all objects were listed."""

    def __init__(self, cluster: Cluster, namespace: str, wanted: Wanted, owner: Body | None) -> None:
        self.listed = asyncio.Event()
        self._cluster = cluster
        self._namespace = namespace
        self._wanted = wanted
        self._owner = owner
        self._store = Store()
        self._writer = Writer(cluster, namespace)
        self._history: dict[str, Mapping[Key, str]] = {}
        self._in_force: Mapping[Key, Object] | None = None  # None: as the snapshot in the cluster says
        self._dirty = asyncio.Event()
        self._dirty_since: float | None = None
        self._list_at = 0.0
        self._reachable = True
        self._written: dict[str, int] = {}

    def on_event(self, kind: Kind, kind_of_event: str | None, body: Body) -> None:
        """kind_of_event: ADDED, MODIFIED, DELETED; None: of a list, with which a watch began anew: deletions may have been missed."""
        if kind_of_event is None and self.listed.is_set():
            self._list_at = min(self._list_at, time.monotonic() + QUIET_S)
            self._touch()
        if self._store.event(kind, kind_of_event == "DELETED", body):
            self._touch()

    def _touch(self) -> None:
        if self._dirty_since is None:
            self._dirty_since = time.monotonic()
        self._dirty.set()

    def stuck(self) -> str:
        """Why this process should be started again; "" if it should not: also while there is no API server."""
        waited = 0.0 if self._dirty_since is None else time.monotonic() - self._dirty_since
        PENDING.set(waited)
        return f"something waits for {waited:.0f} s" if waited > STUCK_S and self._reachable else ""

    async def run(self) -> None:
        """Until it is cancelled."""
        wait_s = RETRY_S
        while True:
            began, self._dirty_since = self._dirty_since, None
            try:
                if time.monotonic() >= self._list_at:
                    await self._list()
                await self._round()
                self._reachable, wait_s = True, RETRY_S
            except (Refused, Unknown) as err:
                FAILURES.inc()
                self._reachable = not isinstance(err, Refused) or err.status != 0
                log.error("%s; tried again in %g s", err, wait_s)
                if began is not None:
                    self._dirty_since = began
                if isinstance(err, Unknown):
                    self._list_at = 0.0
                await asyncio.sleep(wait_s)
                wait_s = min(LONGEST_RETRY_S, wait_s * 2)
                continue
            await self._changed()

    async def _changed(self) -> None:
        """Returns when something has changed and holds still, or something is due."""
        try:
            async with asyncio.timeout(max(0.0, min(self._list_at, self._writer.due) - time.monotonic())):
                await self._dirty.wait()
        except TimeoutError:
            return
        began = time.monotonic()
        while time.monotonic() - began < LONGEST_S:
            self._dirty.clear()
            try:
                async with asyncio.timeout(QUIET_S):
                    await self._dirty.wait()
            except TimeoutError:
                return

    async def _list(self) -> None:
        """Everything, as it is now: the first time before anything is planned, for what is not known yet is not gone."""
        for kind in WATCHED:
            await self._list_one(kind)
        self._list_at = time.monotonic() + LIST_AGAIN_S
        self.listed.set()

    async def _list_one(self, kind: Kind, namespace: str = "") -> None:
        self._store.list_begins(kind)
        self._store.listed(kind, await asyncio.to_thread(self._cluster.listed, kind, namespace))

    async def _round(self) -> None:
        self._dirty.clear()
        await self._list_one(DAEMON_SETS, self._namespace)  # not watched: RBAC for one namespace, and kopf watches all
        wanted_by_chart, history = self._wanted, dict(self._history)
        world = World(
            self._store.all(), wanted_by_chart.daemon_sets, self._owner, wanted_by_chart.proxy, self._namespace, history, self._in_force
        )  # fmt: skip
        now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        with PLANNED.time():
            wanted = await asyncio.to_thread(plan, world, now)
        self._remember(wanted)
        try:
            await asyncio.to_thread(self._writer.apply, wanted, world, now)
        finally:
            self._measure(wanted, world)

    def _remember(self, wanted: Plan) -> None:
        self._in_force = wanted.in_force
        self._history.pop(wanted.revision, None)
        self._history[wanted.revision] = wanted.holds
        while len(self._history) > REVISIONS:
            del self._history[next(iter(self._history))]

    def _measure(self, wanted: Plan, world: World) -> None:
        users = sum(len(world.of(kind)) for kind in USER_KINDS)
        refused = sum(key[0] in {kind.name for kind in USER_KINDS} for key in wanted.warnings)
        OBJECTS.labels("false").set(refused)
        OBJECTS.labels("true").set(users - refused)
        pieces = [
            body["spec"]["piece"]["data"] for body in world.of(SNAPSHOTS).values() if "piece" in body.get("spec", {})
        ]
        PIECES.set(len(pieces))
        BYTES.set(sum(map(len, pieces)))
        for plural, count in self._cluster.writes.items():
            WRITES.labels(plural).inc(count - self._written.get(plural, 0))
            self._written[plural] = count
