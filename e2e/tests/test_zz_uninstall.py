"""The last test: afterwards nothing of the product is on the nodes, and traffic goes on."""

from __future__ import annotations

import json
import time
from itertools import pairwise

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
        with (
            Traffic(lambda: get(client, outside.ipv4, 80, "one.example"), rate=50) as allowed,
            Traffic(lambda: get(client, outside.ipv4, 80, "other.example"), rate=20) as forbidden,
        ):
            assert allowed.wait(lambda one: one.answer.end == "answered", 10)
            assert forbidden.wait(lambda one: one.answer.end == "reset", 10)
            began = time.monotonic()
            pellucid.helm("uninstall", "pellucid", "-n", NAMESPACE, "--timeout", "3m")
            took = time.monotonic() - began
            assert forbidden.wait(lambda one: one.answer.end == "answered", 5, count=3)
        free = next(one.ended for one in forbidden.tries() if one.started > began and one.answer.end == "answered")
        answers = [one.ended for one in allowed.tries() if one.answer.end == "answered"]
        gap = max(after - before for before, after in pairwise(answers))
        lost = len(allowed.tries()) - len(answers)
        left = {each.name: left_on(pellucid, each.name) for each in pellucid.plan.worker_nodes}
        where = json.dumps({name: what for name, what in left.items() if what}) if any(left.values()) else "nothing"
        figure(
            "helm uninstall",
            f"{took:.0f} s; allowed traffic: {lost} of {len(allowed.tries())} lost, longest gap {gap * 1000:.0f} ms; policy gone after "
            f"{free - began:.1f} s; left on the nodes: {where}",
        )
        assert not any(left.values())
        assert lost == 0
        assert gap < 5
    assert eventually(lambda: not pellucid.get("pods", "-n", NAMESPACE)["items"], 60)
    said = pellucid.cluster.kubectl(
        "get",
        "clusterrole,clusterrolebinding,validatingadmissionpolicy,transparentnode,transparentsnapshot",
        "-o",
        "name",
    )
    assert [line for line in said.splitlines() if "pellucid" in line] == []
    pellucid.cluster.kubectl("delete", "transparentpolicy", "--all", "-A")
