"""The node's TransparentNode, kept as the node is: written when something changes, and now and then so that silence means something."""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET
from msgspec.structs import replace

from pellucid_policy import installation
from pellucid_policy.meta import API_VERSION
from pellucid_policy.model import Condition

from ..kube.access import ApiError
from ..kube.client import Client
from .node_report import Canaries, node_status
from .report import Report

log = logging.getLogger(__name__)

MANAGER = "pellucid-node"
LOOK_S = 0.25
ALIVE_S = 300.0  # ± 20 %
CANARY_S = 30.0
RETRY_S = 2.0


class Owner(NamedTuple):
    """What the object goes with."""

    api_version: str
    kind: str
    name: str
    uid: str


class NodeObject:
    """run() is to be a task."""

    def __init__(self, client: Client, name: str, owner: Owner, report: Report, offered: Callable[[], str]) -> None:
        self._client = client
        self._name = name
        self._owner = owner
        self._report = report
        self._offered = offered
        self._canaries: Canaries | None = None
        self._written: installation.NodeStatus | None = None
        self._due = 0.0

    async def run(self) -> None:
        """Until it is cancelled."""
        path = f"/apis/{API_VERSION}/transparentnodes/{self._name}"
        made = False
        while True:
            try:
                if not made:
                    await self._client.apply(path, self._object({}), MANAGER)
                    made = True
                await self._look(path)
                await asyncio.sleep(LOOK_S)
            except ApiError as err:
                if err.status == 404:
                    made = False  # somebody deleted it
                log.warning("the TransparentNode is not written: %s", err)
                self._written = None
                await asyncio.sleep(RETRY_S * random.uniform(0.5, 1.5))

    async def _look(self, path: str) -> None:
        now = await self._status()
        if self._written is not None and _same(now, self._written) and time.monotonic() < self._due:
            return
        await self._client.apply(f"{path}/status", self._object(msgspec.to_builtins(now)), MANAGER)
        self._written = now
        self._due = time.monotonic() + ALIVE_S * random.uniform(0.8, 1.2)

    async def _status(self) -> installation.NodeStatus:
        told = await self._report.status()
        before: tuple[Condition, ...] = ()
        if self._written is not None and self._written.conditions is not UNSET:
            before = self._written.conditions
        return node_status(
            told,
            offered=self._offered(),
            enforced=self._report.snapshot,
            silent=await self._silent(),
            now=dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            before=before,
        )

    async def _silent(self) -> tuple[int, ...] | None:
        settings = self._report.settings
        if settings is None:
            return None
        now = time.monotonic()
        if self._canaries is None:
            versions = sorted({6 if ":" in network else 4 for network in settings.scope})
            self._canaries = Canaries(versions, CANARY_S, now)
        counted = await self._report.counted("canary_answers")
        for version in (4, 6):
            self._canaries.count(version, int(counted.get((f"IPv{version}",), 0)), now)
        return self._canaries.silent(now)

    def _object(self, status: dict[str, Any]) -> dict[str, Any]:
        owner = {
            "apiVersion": self._owner.api_version,
            "kind": self._owner.kind,
            "name": self._owner.name,
            "uid": self._owner.uid,
        }
        made: dict[str, Any] = {
            "apiVersion": API_VERSION,
            "kind": "TransparentNode",
            "metadata": {"name": self._name, **({} if status else {"ownerReferences": [owner]})},
        }
        return {**made, "status": status} if status else made


def _same(one: installation.NodeStatus, other: installation.NodeStatus) -> bool:
    """But for counts that change all the time, of which findings are full."""
    return replace(one, findings=_kinds(one)) == replace(other, findings=_kinds(other))


def _kinds(status: installation.NodeStatus) -> Any:
    return sorted({each.type for each in status.findings}) if isinstance(status.findings, tuple) else UNSET
