"""A new version on every node, and back, under load: nothing is lost, nothing is cut, both ways."""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial

from pellucid_cli.lab.clients import TlsSession, Traffic
from pellucid_cli.lab.servers import Journal, RecordingServer, speak_https
from tests.netns.product.stage import CountingServer, Load

from .conftest import Figure
from .hosts import internet, manifest, pods
from .product import NAMESPACE, Product, eventually, only, policy

SITE = "site.example"
STREAMS = 8
PATIENCE_S = 120.0


def revisions(pellucid: Product) -> set[str]:
    """Of the pods of the DaemonSet that are Ready."""
    return {
        each["metadata"]["labels"]["controller-revision-hash"]
        for each in pellucid.pods("node")
        if any(one["type"] == "Ready" and one["status"] == "True" for one in each["status"].get("conditions", ()))
    }


def rolled(pellucid: Product, before: set[str]) -> bool:
    """Whether every node has a Ready pod of another revision than before, and none of it."""
    return (
        len(pellucid.pods("node")) == len(pellucid.plan.worker_nodes)
        and not revisions(pellucid) & before
        and pellucid.verified()
    )


def test_an_upgrade_and_a_rollback_lose_nothing_under_load(pellucid: Product, figure: Figure) -> None:
    nodes = [each.name for each in pellucid.plan.worker_nodes]
    outside = internet(pellucid.plan)
    manifests = [manifest(f"load-{name}", node=name, labels={"app": "load"}) for name in nodes]
    with (
        pods(pellucid.cluster, *manifests) as clients,
        CountingServer(outside, 80) as server,
        RecordingServer(outside, {443: speak_https}, Journal()),
        pellucid.applied(policy(only(SITE), app="load")),
        ExitStack() as stack,
    ):
        streams = [
            stack.enter_context(Traffic(stack.enter_context(TlsSession(client, address, 443, SITE)).request, rate=4))
            for client in clients
            for address in outside.addresses
        ]
        loads = [Load(client, outside.addresses, 80, SITE, parallel=3) for client in clients]
        took = []
        began = time.monotonic()
        with ExitStack() as running:
            for each in loads:
                running.enter_context(each)
            for act in ("upgrade", "rollback"):
                before, started = revisions(pellucid), time.monotonic()
                if act == "upgrade":
                    pellucid.install("agent.extraEnv[0].name=UPGRADED", "agent.extraEnv[0].value=yes", verb="upgrade")
                else:
                    pellucid.helm("rollback", "pellucid", "-n", NAMESPACE)
                assert eventually(partial(rolled, pellucid, before), PATIENCE_S, 0.5), pellucid.pods("node")
                took.append(time.monotonic() - started)
                assert {one.answer.end for each in streams for one in each.tries()} == {"answered"}
        seconds = time.monotonic() - began
    ended: dict[str, int] = {}
    for each in loads:
        for how, count in each.ended.items():
            ended[how] = ended.get(how, 0) + count
    lost = sum(ended.values()) - ended.get("ok", 0)
    figure(
        "helm upgrade and rollback",
        f"{lost} of {sum(ended.values())} connections lost at {sum(ended.values()) / seconds:.0f}/s, 0 of {len(streams)} TLS streams cut "
        f"in {sum(len(each.tries()) for each in streams)} requests; "
        f"rolled in {took[0]:.0f} s and {took[1]:.0f} s",
    )
    assert ended == {"ok": server.accepted}
    assert sum(ended.values()) / seconds >= 500
