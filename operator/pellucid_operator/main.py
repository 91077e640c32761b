"""The operator's life: kopf watches, the loop plans and writes. One of it runs in a cluster (Deployment, one replica, Recreate)."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import kopf
import prometheus_client
import yaml

from .cluster import Cluster, Refused
from .loop import RETRY_S, Loop
from .world import DAEMON_SETS, PROXIES, WATCHED, Body, Kind, Wanted

log = logging.getLogger(__name__)

STOPPED, FAILED, WRONG = 0, 1, 2
WORKERS = 256


@dataclass(frozen=True, slots=True)
class Options:
    """namespace: Pellucid's own. wanted: folder of what is to be made (world.Wanted).

    deployment: the operator's own, which owns the DaemonSets; "": nobody does.

    probe: ADDR:PORT of the liveness probe. metrics: ADDR:PORT, "" for none."""

    namespace: str
    wanted: str
    deployment: str = ""
    probe: str = "0.0.0.0:8080"
    metrics: str = "0.0.0.0:9465"
    log_level: str = "INFO"


def run(options: Options) -> int:
    """Until SIGTERM; the exit status."""
    _log(options.log_level)
    try:
        wanted = read_wanted(options.wanted)
    except (OSError, ValueError) as err:
        log.error("--wanted: %s", err)
        return WRONG
    try:
        cluster = Cluster()
        owner = _owner(cluster, options)
    except Refused as err:
        log.error("%s", err)
        return FAILED
    except Exception as err:  # noqa: BLE001  # of the client's own configuration, which raises what it likes
        log.error("the cluster cannot be asked: %s; run this in a pod, or give a KUBECONFIG", err)
        return FAILED
    if options.metrics:
        address, _, port = options.metrics.rpartition(":")
        prometheus_client.start_http_server(int(port), address.strip("[]"))
    asyncio.run(_serve(options, cluster, wanted, owner))
    return STOPPED


async def _serve(options: Options, cluster: Cluster, wanted: Wanted, owner: Body | None) -> None:
    loop = Loop(cluster, options.namespace, wanted, owner)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    planning = asyncio.create_task(loop.run(), name="plan")
    listed = asyncio.create_task(loop.listed.wait(), name="wait for the kinds")
    asked = asyncio.create_task(stop.wait(), name="wait for the end")
    await asyncio.wait({planning, listed, asked}, return_when=asyncio.FIRST_COMPLETED)
    watching = asyncio.create_task(
        _watch(options, loop, stop), name="kopf"
    )  # who watches kinds that are not there yet never will
    done, pending = await asyncio.wait({watching, planning, asked}, return_when=asyncio.FIRST_COMPLETED)
    stop.set()
    for each in (listed, *pending):
        each.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for each in done:
        each.result()


async def _watch(options: Options, loop: Loop, stop: asyncio.Event) -> None:
    """kopf's part: a watch for each kind, and the liveness probe."""
    registry = kopf.OperatorRegistry()
    kopf.on.login(registry=registry, id="login")(_login)
    for kind in WATCHED:
        group, _, version = kind.path.removeprefix("apis/").removeprefix("api/").rpartition("/")
        kopf.on.event(group, version, kind.plural, registry=registry, id=kind.plural)(
            functools.partial(_on_event, loop, kind)
        )
    kopf.on.probe(registry=registry, id="pending")(functools.partial(_probe, loop))
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True  # kinds do not come and go; without them it ends, and is started again
    settings.networking.request_timeout = 60.0
    settings.queueing.worker_limit = WORKERS
    settings.queueing.idle_timeout = (
        0.05  # each object has a worker for so long after its last event: more would starve the others
    )
    settings.persistence.finalizer = "pellucid.dev/never"
    address, _, port = options.probe.rpartition(":")
    await kopf.operator(
        registry=registry,
        settings=settings,
        standalone=True,
        identity=cast("Any", "pellucid-operator"),  # else it asks who this user is, whom no file knows
        clusterwide=True,
        liveness_endpoint=f"http://{address}:{port}/healthz",
        stop_flag=stop,
    )


async def _on_event(loop: Loop, kind: Kind, *, type: str | None, body: kopf.Body, **_: Any) -> None:  # noqa: A002  # kopf's name
    loop.on_event(kind, type, dict(body))


def _login(**about: Any) -> kopf.ConnectionInfo | None:
    return kopf.login_with_service_account(**about) or kopf.login_with_kubeconfig(**about)


async def _probe(loop: Loop, **_: Any) -> str:
    """Fails while something waits for longer than it may: the kubelet starts this process again."""
    if stuck := loop.stuck():
        raise kopf.PermanentError(stuck)
    return "fine"


def read_wanted(folder: str) -> Wanted:
    """What the chart's ConfigMap wants, one object a file. Raises OSError, ValueError."""
    daemon_sets: dict[str, Body] = {}
    proxy: Body | None = None
    for path in sorted(Path(folder).glob("*.yaml")):
        try:
            value = yaml.safe_load(path.read_text())
        except yaml.YAMLError as err:
            raise ValueError(f"{path}: {err}") from err
        kind = value.get("kind") if isinstance(value, dict) else None
        if kind == DAEMON_SETS.name:
            daemon_sets[value["metadata"]["name"]] = value
        elif kind == PROXIES.name:
            proxy = value
        else:
            raise ValueError(
                f"{path}: is neither a DaemonSet nor a TransparentProxy; the chart's ConfigMap holds one a file"
            )
    if not daemon_sets:
        raise ValueError(f"{folder}: holds no DaemonSet (*.yaml); mount the chart's ConfigMap pellucid-wanted there")
    return Wanted(daemon_sets, proxy)


def _owner(cluster: Cluster, options: Options) -> Body | None:
    """With the Deployment go the DaemonSets that it has made. Waits for the API server."""
    path = f"/apis/apps/v1/namespaces/{options.namespace}/deployments/{options.deployment}"
    while options.deployment:
        try:
            meta = cluster.get(path)["metadata"]
            return {"apiVersion": "apps/v1", "kind": "Deployment", "name": meta["name"], "uid": meta["uid"]}
        except Refused as err:
            if err.status:
                raise
            log.error("%s; tried again in %g s", err, RETRY_S)
            time.sleep(RETRY_S)
    return None


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        told = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            told["error"] = self.formatException(record.exc_info)
        return json.dumps(told)


def _log(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s") if sys.stderr.isatty() else _Json())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("kopf").setLevel(logging.WARNING)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)  # of the kubelet's probes
