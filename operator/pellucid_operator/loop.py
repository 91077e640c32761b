"""From events to writes: the world is kept, planned anew when it has changed and holds still, and brought to the plan."""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import time
from collections.abc import Mapping
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from .cluster import Cluster, Refused
from .plan import Plan, plan
from .world import (
    DAEMON_SETS,
    NAMESPACES,
    PROXIES,
    SNAPSHOTS,
    USER_KINDS,
    WATCHED,
    Body,
    Key,
    Kind,
    Wanted,
    World,
    key_of,
)

log = logging.getLogger(__name__)

QUIET_S, LONGEST_S = 0.1, 2.0  # no event for so long, or at the latest
LIST_AGAIN_S = 300.0  # what no event told of: a watch that was broken off misses deletions
RETRY_S, LONGEST_RETRY_S = 1.0, 30.0
STATUS_EVERY_S = 10.0  # of one object, but for the first
PIECES_STAY_S = 60.0
REVISIONS = 256  # whose content is remembered
STUCK_S = 120.0

COMPILED = Histogram("pellucid_operator_plan_seconds", "From everything that is there to everything that should be")
OBJECTS = Gauge("pellucid_operator_objects", "Objects of users, by whether they are accepted", ["accepted"])
PIECES = Gauge("pellucid_operator_snapshot_pieces", "Pieces of the snapshot that is offered")
BYTES = Gauge("pellucid_operator_snapshot_bytes", "Their size in all, as base64")
WRITES = Counter("pellucid_operator_writes", "Requests that changed something, by kind", ["resource"])
FAILURES = Counter("pellucid_operator_failures", "Rounds that the API server did not let end")
PENDING = Gauge("pellucid_operator_pending_seconds", "How long something has been waiting to be planned and written")


class Loop:
    """on_event() may be called at any time by the loop's thread; run() is to be a task."""

    def __init__(self, cluster: Cluster, namespace: str, wanted: Wanted, owner: Body | None) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._wanted = wanted
        self._owner = owner
        self._objects: dict[str, dict[Key, Body]] = {kind.name: {} for kind in (*WATCHED, DAEMON_SETS)}
        self._history: dict[str, Mapping[Key, str]] = {}
        self._dirty = asyncio.Event()
        self._dirty_since: float | None = None
        self._list_at = 0.0
        self._status_at: dict[Key, float] = {}
        self._waiting_statuses: dict[Key, float] = {}  # when each of those may be written
        self._needless_since: dict[str, float] = {}
        self._warned: dict[Key, str] = {}
        self._written: dict[str, int] = {}

    def on_event(self, kind: Kind, kind_of_event: str | None, body: Body) -> None:
        """kind_of_event: ADDED, MODIFIED, DELETED; None: of a list, with which a watch began anew."""
        key = key_of(kind.name, body)
        if kind_of_event is None and self._list_at:
            self._list_at = min(self._list_at, time.monotonic() + QUIET_S)
        if kind_of_event == "DELETED":
            self._objects[kind.name].pop(key, None)
        else:
            kept = _kept(kind, body)
            if self._objects[kind.name].get(key) == kept:
                return
            self._objects[kind.name][key] = kept
        self._touch()

    def _touch(self) -> None:
        if self._dirty_since is None:
            self._dirty_since = time.monotonic()
        self._dirty.set()

    def stuck(self) -> str:
        """Why this process should be started again; "" if it should not."""
        waited = 0.0 if self._dirty_since is None else time.monotonic() - self._dirty_since
        PENDING.set(waited)
        return f"something waits for {waited:.0f} s" if waited > STUCK_S else ""

    async def run(self) -> None:
        """Until it is cancelled."""
        wait_s = RETRY_S
        while True:
            try:
                if time.monotonic() >= self._list_at:
                    await self._list()
                await self._round()
                wait_s = RETRY_S
            except Refused as err:
                FAILURES.inc()
                log.error("%s", err)
                await asyncio.sleep(wait_s)
                wait_s = min(LONGEST_RETRY_S, wait_s * 2)
                self._touch()
                continue
            await self._changed()

    async def _changed(self) -> None:
        """Returns when something has changed and holds still, or something is due."""
        due = min([self._list_at, *(at for at in self._later())]) - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, due)):
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

    def _later(self) -> list[float]:
        """When what was put off is due."""
        return [at + PIECES_STAY_S for at in self._needless_since.values()] + list(self._waiting_statuses.values())

    async def _list(self) -> None:
        """Everything, as it is now: the first time before anything is planned, for what is not known yet is not gone."""
        for kind in WATCHED:
            await self._list_one(kind)
        self._list_at = time.monotonic() + LIST_AGAIN_S

    async def _list_one(self, kind: Kind, namespace: str = "") -> None:
        found = await asyncio.to_thread(self._cluster.listed, kind, namespace)
        self._objects[kind.name] = {key: _kept(kind, body) for key, body in found.items()}

    async def _round(self) -> None:
        self._dirty.clear()
        await self._list_one(DAEMON_SETS, self._namespace)  # not watched: RBAC for one namespace, and kopf watches all
        began = self._dirty_since
        world = World(
            {name: dict(found) for name, found in self._objects.items()},
            self._wanted.daemon_sets,
            self._owner,
            self._wanted.proxy,
            self._namespace,
            dict(self._history),
        )
        now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        with COMPILED.time():
            wanted = await asyncio.to_thread(plan, world, now)
        self._remember(wanted)
        await asyncio.to_thread(self._apply, wanted, world, now)
        self._measure(wanted, world)
        if self._dirty_since == began and not self._dirty.is_set():
            self._dirty_since = None

    def _remember(self, wanted: Plan) -> None:
        self._history.pop(wanted.revision, None)
        self._history[wanted.revision] = wanted.holds
        while len(self._history) > REVISIONS:
            del self._history[next(iter(self._history))]

    def _apply(self, wanted: Plan, world: World, now: str) -> None:
        """In a thread. Raises Refused; what was written until then is right."""
        if wanted.proxy is not None:
            self._cluster.apply(PROXIES, wanted.proxy)
            log.info("TransparentProxy default is applied")
        for piece in wanted.pieces.values():
            self._cluster.apply(SNAPSHOTS, piece)
        if wanted.index is not None:
            self._cluster.apply(SNAPSHOTS, wanted.index)
            log.info("revision %s is offered", wanted.revision)
        for each in wanted.daemon_sets.values():
            self._cluster.apply(DAEMON_SETS, each)
            log.info("DaemonSet %s is applied", each["metadata"]["name"])
        for name in wanted.unwanted:
            self._cluster.delete(DAEMON_SETS, (DAEMON_SETS.name, self._namespace, name))
            log.info("DaemonSet %s is deleted: there is no TransparentProxy default", name)
        self._write_statuses(wanted)
        self._delete_needless(wanted)
        self._warn(wanted, world, now)

    def _write_statuses(self, wanted: Plan) -> None:
        kinds = {kind.name: kind for kind in USER_KINDS}
        now = time.monotonic()
        waiting: dict[Key, float] = {}
        for key, status in wanted.statuses.items():
            due = self._status_at.get(key, 0.0)
            if due > now:
                waiting[key] = due
                continue
            try:
                self._cluster.write_status(kinds[key[0]], key, status)
            except Refused as err:
                if err.status != 404:  # deleted meanwhile: its event comes
                    raise
            self._status_at[key] = now + STATUS_EVERY_S if _settled(status) else now
        self._waiting_statuses = waiting
        for key in self._status_at.keys() - {key for kind in USER_KINDS for key in self._objects[kind.name]}:
            self._status_at.pop(key, None)

    def _delete_needless(self, wanted: Plan) -> None:
        now = time.monotonic()
        self._needless_since = {name: self._needless_since.get(name, now) for name in wanted.needless}
        for name, since in list(self._needless_since.items()):
            if now - since >= PIECES_STAY_S:
                self._cluster.delete(SNAPSHOTS, (SNAPSHOTS.name, "", name))
                del self._needless_since[name]

    def _warn(self, wanted: Plan, world: World, now: str) -> None:
        """An Event for each object that is refused, once for each reason."""
        for key, why in wanted.refused.items():
            if self._warned.get(key) == why:
                continue
            self._warned[key] = why
            log.warning("%s: %s", "/".join(filter(None, key)), why)
            body = {"apiVersion": "pellucid.dev/v1alpha1", "kind": key[0], **world.objects[key[0]][key]}
            self._cluster.warn(key[1] or self._namespace, body, "NotAccepted", why, now)
        for key in self._warned.keys() - wanted.refused.keys():
            del self._warned[key]

    def _measure(self, wanted: Plan, world: World) -> None:
        users = sum(len(world.objects[kind.name]) for kind in USER_KINDS)
        OBJECTS.labels("false").set(len(wanted.refused))
        OBJECTS.labels("true").set(users - len(wanted.refused))
        pieces = [body for key, body in self._objects[SNAPSHOTS.name].items() if "piece" in body.get("spec", {})]
        PIECES.set(len(pieces))
        BYTES.set(sum(len(body["spec"]["piece"]["data"]) for body in pieces))
        for plural, count in self._cluster.writes.items():
            WRITES.labels(plural).inc(count - self._written.get(plural, 0))
            self._written[plural] = count


def _settled(status: Mapping[str, Any]) -> bool:
    """Whether all is told that an edit makes one wait for: the next word may come later."""
    return all(each["status"] == "True" for each in status.get("conditions") or ())


def _kept(kind: Kind, body: Body) -> Body:
    """What of an object is remembered: without what others manage, and of namespaces the labels."""
    meta = body["metadata"]
    if kind is NAMESPACES:
        return {"metadata": {"name": meta["name"], "labels": dict(meta.get("labels") or {})}}
    metadata = {name: value for name, value in meta.items() if name not in ("managedFields", "resourceVersion")}
    if kind is DAEMON_SETS:
        return {"metadata": metadata}
    return {name: value for name, value in body.items() if name != "metadata"} | {"metadata": metadata}
