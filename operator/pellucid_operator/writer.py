"""Brings the cluster to a plan: in an order in which nothing that is written refers to what is not there, each write by itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from .cluster import NOT_FOUND, Cluster, Refused
from .plan import Plan
from .world import DAEMON_SETS, EVENTS, PROXIES, SNAPSHOTS, USER_KINDS, Key, Kind, World

log = logging.getLogger(__name__)

STATUS_EVERY_S = 10.0
"""Of one object, unless it tells of an edit for the first time, or that all is well now."""
STATUSES_A_ROUND = 40
NEXT_ROUND_S = 0.5
PIECES_STAY_S = 60.0
"""A node that reads an older index finds its pieces for so long."""
_KINDS = {kind.name: kind for kind in USER_KINDS}


class Writer:
    """due: when (time.monotonic()) something that was put off is to be written. apply() is called by one thread at a time."""

    def __init__(self, cluster: Cluster, namespace: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.due = float("inf")
        self._cluster = cluster
        self._namespace = namespace
        self._clock = clock
        self._needless_since: dict[str, float] = {}
        self._told: dict[
            Key, tuple[float, Any, bool]
        ] = {}  # when a status was written, of which generation, and whether all was well
        self._warned: dict[Key, str] = {}
        self._troubles: list[Refused] = []

    def apply(self, wanted: Plan, world: World, now: str) -> None:
        """Write what can be written. Raises Refused: the first of what could not; at once if there is no API server."""
        self.due = float("inf")
        self._troubles = []
        whole = True
        for piece in wanted.pieces.values():
            whole &= self._try(SNAPSHOTS, self._cluster.apply, piece)
        if whole and wanted.index is not None and self._try(SNAPSHOTS, self._cluster.apply, wanted.index):
            log.info("revision %s is offered", wanted.revision)  # without all its pieces no node would take it
        if wanted.proxy is not None and self._try(PROXIES, self._cluster.apply, wanted.proxy):
            log.info("TransparentProxy default is applied")
        for name, each in wanted.daemon_sets.items():
            if self._try(DAEMON_SETS, self._cluster.apply, each):
                log.info("DaemonSet %s is applied", name)
        for name in wanted.unwanted:
            if self._try(DAEMON_SETS, self._cluster.delete, (DAEMON_SETS.name, self._namespace, name)):
                log.info("DaemonSet %s is deleted: there is no TransparentProxy default", name)
        self._write_statuses(wanted.statuses)
        self._delete_needless(wanted.needless)
        self._warn(wanted, world, now)
        if self._troubles:
            raise self._troubles[0]

    def _try(self, kind: Kind, write: Callable[..., None], *what: Any) -> bool:
        """Whether it could be done. Raises Refused if nobody is there to do it."""
        try:
            write(kind, *what)
        except Refused as err:
            if not err.status:
                raise
            log.error("%s", err)
            self._troubles.append(err)
            return False
        return True

    def _put_off(self, until: float) -> None:
        self.due = min(self.due, until)

    def _write_statuses(self, statuses: Mapping[Key, dict[str, Any]]) -> None:
        now, written = self._clock(), 0
        for key, status in statuses.items():
            at, generation, was_well = self._told.get(key, (0.0, None, False))
            well = all(each["status"] == "True" for each in status["conditions"])
            first = status["observedGeneration"] != generation or (well and not was_well)
            if not first and now < at + STATUS_EVERY_S:
                self._put_off(at + STATUS_EVERY_S)
            elif written == STATUSES_A_ROUND:
                self._put_off(now + NEXT_ROUND_S)
                break
            elif self._try(_KINDS[key[0]], self._write_status, key, status):
                written += 1
                self._told[key] = (now, status["observedGeneration"], well)

    def _write_status(self, kind: Kind, key: Key, status: dict[str, Any]) -> None:
        try:
            self._cluster.write_status(kind, key, status)
        except Refused as err:
            if err.status != NOT_FOUND:  # deleted meanwhile: its event comes
                raise

    def _delete_needless(self, needless: tuple[str, ...]) -> None:
        now = self._clock()
        self._needless_since = {name: self._needless_since.get(name, now) for name in needless}
        for name, since in list(self._needless_since.items()):
            if now < since + PIECES_STAY_S:
                self._put_off(since + PIECES_STAY_S)
            elif self._try(SNAPSHOTS, self._cluster.delete, (SNAPSHOTS.name, "", name)):
                del self._needless_since[name]

    def _warn(self, wanted: Plan, world: World, now: str) -> None:
        """An Event for each object that is refused, and each node that refuses, once for each reason."""
        for key, why in wanted.warnings.items():
            if self._warned.get(key) == why:
                continue
            log.warning("%s: %s", "/".join(filter(None, key)), why)
            body = {"apiVersion": "pellucid.dev/v1alpha1", "kind": key[0], **world.objects[key[0]][key]}
            reason = "NotAccepted" if key[0] in _KINDS else "NotProgrammed"
            if self._try(EVENTS, self._cluster.warn, key[1] or self._namespace, body, reason, why, now):
                self._warned[key] = why
        for key in self._warned.keys() - wanted.warnings.keys():
            del self._warned[key]
        for key in self._told.keys() - {key for kind in USER_KINDS for key in world.of(kind)}:
            del self._told[key]
