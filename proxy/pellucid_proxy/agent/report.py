"""What the agent knows of the node, as metrics, as status and as health."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import platform
import time
from collections.abc import Iterable

from .. import __version__
from ..control import Series
from ..engine.relay import compiled
from ..metrics import METRICS
from ..session.desk import Histogram
from ..settings import NodeSettings
from ..supervisor.messages import AgentConfig
from .data_path import conntrack_series, conntrack_use
from .enforcer import Enforcer
from .flow_hub import FlowHub
from .flows import FlowFile
from .repairs import Repairs
from .status import NodeStatus, WorkerStatus
from .strain import strains
from .workers import Workers

ENGINE_FORM = "compiled" if compiled else "uncompiled"
SCRAPE_TIMEOUT_S = 2.0

STARTING, ENFORCING, DRAINING, STOPPING = "starting", "enforcing", "draining", "stopping"
FOLDER, LAST_GOOD = "folder", "last-good"


class Report:
    """The agent writes the fields, everybody else reads through the methods. settings and enforcer: None until they are known."""

    def __init__(
        self,
        config: AgentConfig,
        node: str,
        workers: Workers,
        flows: FlowFile | None,
        hub: FlowHub,
    ) -> None:
        self.phase = STARTING
        self.source = FOLDER
        self.problems: tuple[str, ...] = ()
        self.snapshot = ""  # the revision of the cluster's snapshot that is enforced
        self.settings: NodeSettings | None = None
        self.enforcer: Enforcer | None = None
        self.repairs: Repairs | None = None
        self._config = config
        self._options = config.options
        self._folder = os.path.abspath(config.options.policy) if config.options.policy else ""
        self._node = node
        self._workers = workers
        self._flows = flows
        self._hub = hub
        self._separation = config.separation
        self._started_at = time.monotonic()
        self._last_apply_s: float | None = None
        self._apply_seconds = Histogram("policy_apply_seconds")
        self._loop = asyncio.get_running_loop()
        self._served: list[Series] = []

    @property
    def revision(self) -> str:
        """What is enforced; "" before the first."""
        return self.enforcer.enforced.revision if self.enforcer and self.enforcer.enforced else ""

    def applied(self, seconds: float) -> None:
        """A change was in force so long after it was written."""
        self._last_apply_s = seconds
        self._apply_seconds.add(round(seconds * 1e9))

    def healthy(self) -> str:
        """Why the node enforces no policy; "" if it does. From any thread.

        A folder that is refused is no illness: whoever restarts an unhealthy node would turn a mistyped file into an outage.
        """
        return "" if self.phase == ENFORCING else self.phase

    def scrape(self) -> Iterable[Series]:
        """All series of the node; those of the last time if the loop does not answer. To be called in other threads than the loop's."""
        asked = asyncio.run_coroutine_threadsafe(self.series(), self._loop)
        try:
            self._served = asked.result(SCRAPE_TIMEOUT_S)
        except (TimeoutError, concurrent.futures.CancelledError):
            asked.cancel()
        return self._served

    async def series(self) -> list[Series]:
        """What workers, kernel and agent counted."""
        kernel = self.enforcer.kernel_series() if self.enforcer else _nothing()
        by_worker, from_kernel = await asyncio.gather(self._workers.stats(), kernel)
        found = [*self._own(), *from_kernel, *conntrack_series()]
        for index, series in by_worker.items():
            found.append(Series("worker_up", "gauge", (str(index),), 0 if series is None else 1))
            found += (each for each in series or () if _counted_by_workers(each))
        found += (each for each in self._workers.past if _counted_by_workers(each))
        return found

    async def status(self) -> NodeStatus:
        """This moment of the node."""
        by_worker = await self._workers.stats()
        workers = tuple(
            WorkerStatus(link.index, link.alive, link.revision, *_said(by_worker.get(link.index)))
            for link in self._workers.links
        )
        enforced = self.enforcer.enforced if self.enforcer else None
        settings = self.settings
        return NodeStatus(
            version=__version__,
            node=self._node,
            pid=self._config.run,
            instance=self._options.instance or str(self._config.run),
            phase=self.phase,
            revision=self.revision,
            source=self.source,
            folder=self._folder,
            problems=self.problems,
            workers=workers,
            connections=sum(worker.connections or 0 for worker in workers),
            groups=len(enforced.groups) if enforced else 0,
            pods=len(enforced.pods) if enforced else 0,
            policies=tuple(
                f"{key.kind} {key.namespace}/{key.name}" if key.namespace else f"{key.kind} {key.name}"
                for key in (enforced.policies if enforced else ())
            ),
            scope=settings.scope if settings else (),
            listen=_listen(settings) if settings else (),
            engine_form=ENGINE_FORM,
            uptime_s=time.monotonic() - self._started_at,
            last_apply_s=self._last_apply_s,
            flows=self._options.flows,
            flows_dropped=self._flows.dropped if self._flows else 0,
            metrics=self._options.metrics,
            rules=self.repairs.problems if self.repairs else (),
            worker_user=self._separation.user,
            unconfined=self._separation.lacking,
            strains=strains(*conntrack_use(), {index: each for index, each in by_worker.items() if each is not None}),
        )

    async def counted(self, name: str) -> dict[tuple[str, ...], float]:
        """What the workers counted of a metric, by its labels."""
        found: dict[tuple[str, ...], float] = {}
        for series in (await self._workers.stats()).values():
            for each in series or ():
                if each.name == name:
                    found[each.labels] = found.get(each.labels, 0.0) + float(each.value)
        return found

    def _own(self) -> list[Series]:
        found = [
            Series("build_info", "gauge", (__version__, platform.python_version(), ENGINE_FORM), 1),
            Series("policy_problems", "gauge", (), len(self.problems)),
            self._apply_seconds.series(),
            Series("process_restarts", "counter", ("supervisor",), self._config.supervisor_ends),
            Series("process_restarts", "counter", ("agent",), self._config.ends),
            Series("process_restarts", "counter", ("worker",), sum(link.ends for link in self._workers.links)),
        ]
        found += self._hub.series()
        if self.revision:
            found.append(Series("policy_revision_info", "gauge", (self.revision,), 1))
        if self.repairs:
            found += self.repairs.series()
        if self._flows:
            found.append(Series("events_dropped", "counter", ("writer",), self._flows.dropped))
        return found


def _counted_by_workers(series: Series) -> bool:
    metric = METRICS.get(series.name)
    return metric is not None and metric.counted_by == "worker"


def _said(series: list[Series] | None) -> tuple[int | None, tuple[str, ...]]:
    """How many there are, and what the worker is confined by, as it says."""
    if series is None:
        return None, ()
    connections = int(sum(each.value for each in series if each.name == "connections_active"))
    return connections, tuple(each.labels[0] for each in series if each.name == "workers_confined")


def _listen(settings: NodeSettings) -> tuple[str, ...]:
    return (f"127.0.0.1:{settings.listen_port}", *([f"[::1]:{settings.listen_port}"] if settings.ipv6 else []))


async def _nothing() -> list[Series]:
    return []
