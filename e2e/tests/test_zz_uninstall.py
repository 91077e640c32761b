"""The last test: afterwards nothing of the product is on the nodes, and traffic goes on."""

from __future__ import annotations

import json
import time

from pellucid_cli.lab.clients import Traffic, get
from pellucid_cli.lab.servers import Journal, RecordingServer, speak_http

from .conftest import Figure
from .hosts import internet, manifest, node_host, pods
from .product import NAMESPACE, Product, eventually, only, policy

STAYS = {"CustomResourceDefinition", "TransparentProxy"}


def left_on(pellucid: Product, node: str) -> dict[str, str]:
    host = node_host(pellucid.plan, node)
    found = {
        "tables": "\n".join(
            line for line in host.run(["nft", "list", "tables"]).stdout.splitlines() if "pellucid" in line
        ),
        "rules": "\n".join(
            line for f in ("-4", "-6") for line in host.run(["ip", f, "rule"]).stdout.splitlines() if "15001" in line
        ),
        "routes": host.run(["ip", "route", "show", "table", "15001"], check=False).stdout,
        "listeners": host.run(["ss", "-Hltn", "sport = :15001"]).stdout,
    }
    return {what: said for what, said in found.items() if said.strip()}


def test_after_an_uninstall_under_traffic_nothing_is_left_and_traffic_flows(pellucid: Product, figure: Figure) -> None:
    node = pellucid.plan.worker_nodes[0].name
    outside = internet(pellucid.plan)
    with (
        pods(pellucid.cluster, manifest("stays", node=node, labels={"app": "a"})) as (client,),
        RecordingServer(outside, {80: speak_http}, Journal()),
    ):
        pellucid.cluster.kubectl("apply", "-f", "-", text=policy(only("one.example")))
        pellucid.settled()
        with Traffic(lambda: get(client, outside.ipv4, 80, "other.example"), rate=20) as traffic:
            assert traffic.wait(lambda one: one.answer.end == "reset", 10)
            began = time.monotonic()
            pellucid.helm("uninstall", "pellucid", "-n", NAMESPACE, "--timeout", "3m")
            took = time.monotonic() - began
            assert traffic.wait(lambda one: one.answer.end == "answered", 5, count=3)
            tries = [one for one in traffic.tries() if one.started > began]
            free = next(one.ended for one in tries if one.answer.end == "answered")
            silent = [one for one in tries if one.answer.end not in ("answered", "reset", "refused")]
        left = {each.name: left_on(pellucid, each.name) for each in pellucid.plan.worker_nodes}
        where = json.dumps({name: what for name, what in left.items() if what}) if any(left.values()) else "nothing"
        figure(
            "helm uninstall",
            f"{took:.0f} s; traffic flows directly {free - began:.1f} s after its start, {len(silent)} of {len(tries)} unanswered; "
            f"left on the nodes: {where}",
        )
        assert not any(left.values())
        assert not silent
    assert eventually(lambda: not pellucid.get("pods", "-n", NAMESPACE)["items"], 60)
    said = pellucid.cluster.kubectl(
        "get",
        "clusterrole,clusterrolebinding,validatingadmissionpolicy,transparentnode,transparentsnapshot",
        "-o",
        "name",
    )
    assert [line for line in said.splitlines() if "pellucid" in line] == []
    pellucid.cluster.kubectl("delete", "transparentpolicy", "--all", "-A")
