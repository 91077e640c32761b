"""The control plane is away, and a node's processes are started again meanwhile: enforcement goes on by what lies on the node's disk."""

from __future__ import annotations

import os
import time
from pathlib import Path

from e2e.cluster import machine
from pellucid_cli.lab.clients import Traffic, get
from pellucid_cli.lab.servers import Journal, RecordingServer, speak_http
from tests.netns.product.stage import kill

from .conftest import Figure
from .hosts import internet, manifest, pods
from .product import Product, eventually, only, policy

GOOD, BAD = "good.example", "bad.example"
AWAY_S = float(os.environ.get("AWAY_S", "20"))
"""How long; the promise is two minutes: make e2e ARGS='-k away' AWAY_S=120."""


def guardian_of(pod: dict[str, object]) -> int:
    """The first process of a pod's container, as this machine sees it."""
    uid = str(pod["metadata"]["uid"])  # type: ignore[index]
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            try:
                words = (each / "cmdline").read_bytes().split(b"\0")
                if b"--cluster" in words and uid in (each / "cgroup").read_text() and _first(each):
                    return int(each.name)
            except OSError:
                continue
    raise LookupError(f"no process of pod {uid}")


def _first(process: Path) -> bool:
    status = (process / "status").read_text()
    return next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1] == "1"


def test_without_a_control_plane_enforcement_goes_on_also_from_disk(pellucid: Product, figure: Figure) -> None:
    here, there = (each.name for each in pellucid.plan.worker_nodes[:2])
    outside, journal = internet(pellucid.plan), Journal()
    manifests = [
        manifest("away-here", node=here, labels={"app": "away"}),
        manifest("away-there", node=there, labels={"app": "away"}),
    ]
    with (
        pods(pellucid.cluster, *manifests) as (restarted, untouched),
        RecordingServer(outside, {80: speak_http}, journal),
        pellucid.applied(policy(only(GOOD), app="away")),
    ):
        (own,) = (each for each in pellucid.pods("node") if each["spec"]["nodeName"] == here)
        first = guardian_of(own)
        machine.stop(pellucid.plan, pellucid.plan.control_plane)
        began = time.monotonic()
        try:
            with Traffic(lambda: get(untouched, outside.ipv4, 80, GOOD), rate=20) as allowed, Traffic(
                lambda: get(restarted, outside.ipv4, 80, BAD), rate=20
            ) as forbidden:  # fmt: skip
                assert allowed.wait(lambda one: one.answer.end == "answered", 10)
                kill(first)
                killed = time.monotonic()
                assert eventually(lambda: get(restarted, outside.ipv4, 80, GOOD).end == "answered", 60, 0.02)
                back = time.monotonic() - killed
                assert forbidden.wait(lambda _one: time.monotonic() - began >= AWAY_S, AWAY_S + 10)
        finally:
            machine.start(pellucid.plan, pellucid.plan.control_plane)
        assert eventually(lambda: pellucid.cluster.kubectl("get", "--raw", "/readyz", check=False) == "ok")
        ends = [one.answer.end for one in allowed.tries()]
        leaked = sum(arrival.name == BAD for arrival in journal.arrivals())
        figure(
            f"API server, etcd, scheduler and controllers away for {AWAY_S:g} s",
            f"{ends.count('answered')} of {len(ends)} allowed connections answered, {leaked} of {len(forbidden.tries())} forbidden ones "
            f"leaked; a node's processes killed meanwhile enforce from disk {back:.1f} s later",
        )
        assert ends.count("answered") == len(ends)
        assert leaked == 0
        assert eventually(pellucid.enforced, 120, 0.5), "all is as before"
    with pellucid.applied(policy(only(BAD), app="away")):
        pass  # and edits are enforced again
