"""A policy from `kubectl apply` to the nodes, and what becomes of one that is bad."""

from __future__ import annotations

import json
import statistics
import time
from contextlib import ExitStack
from typing import Any

import pytest

from pellucid_cli.lab.clients import Traffic, get
from pellucid_cli.lab.servers import Journal, RecordingServer, speak_http

from .conftest import Figure
from .hosts import internet, manifest, pods
from .product import Product, condition, eventually, only, policy

SITES = ("one.example", "other.example")
EDITS = 100


def percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def test_an_edit_is_enforced_on_all_nodes_within_a_second(pellucid: Product, figure: Figure) -> None:
    """Seen from a pod of each node: the first answer that the new policy gives, counted from before `kubectl apply` starts."""
    nodes = [each.name for each in pellucid.plan.worker_nodes]
    outside = internet(pellucid.plan)
    manifests = [manifest(f"edit-{name}", node=name, labels={"app": "a"}) for name in nodes]
    with (
        pods(pellucid.cluster, *manifests) as clients,
        RecordingServer(outside, {80: speak_http}, Journal()),
        pellucid.applied(policy(only(SITES[0]))),
        ExitStack() as stack,
    ):
        traffic = [
            stack.enter_context(Traffic(lambda client=client: get(client, outside.ipv4, 80, SITES[0]), rate=50))  # type: ignore[misc]
            for client in clients
        ]
        assert all(each.wait(lambda one: one.answer.end == "answered", 30) for each in traffic)
        seconds = []
        for number in range(1, EDITS + 1):
            expected = "answered" if number % 2 == 0 else "reset"
            started = time.monotonic()
            pellucid.cluster.kubectl("apply", "-f", "-", text=policy(only(SITES[number % 2])))
            for each in traffic:
                assert each.wait(lambda one, end=expected: one.answer.end == end, 30), (number, each.tries()[-1])  # type: ignore[misc]
            seconds.append(
                max(
                    next(one.ended for one in each.tries() if one.started > started and one.answer.end == expected)
                    for each in traffic
                )
                - started
            )
    figure(
        "an edit, enforced on all nodes",
        f"{len(seconds)} edits: p50 {statistics.median(seconds) * 1000:.0f} ms, p99 {percentile(seconds, 99) * 1000:.0f} ms, "
        f"max {max(seconds) * 1000:.0f} ms after the start of kubectl apply",
    )
    assert percentile(seconds, 99) < 1.0


def status_of(pellucid: Product, name: str, namespace: str = "default") -> dict[str, Any]:
    found: dict[str, Any] = pellucid.get("transparentpolicy", "-n", namespace, name).get("status", {})
    return found


def message_of(status: dict[str, Any], kind: str) -> str:
    return next((each.get("message", "") for each in status.get("conditions", ()) if each["type"] == kind), "")


def test_a_bad_edit_is_told_and_the_last_accepted_version_stays_in_force(pellucid: Product) -> None:
    """What passes admission, and is refused by who reads it."""
    bad = policy("  - {name: allowed, match: {destinations: [{cidr: 10.0.0.1/8}]}, action: Allow}\n")
    node = pellucid.plan.worker_nodes[0].name
    outside = internet(pellucid.plan)
    with (
        pods(pellucid.cluster, manifest("bad-edit", node=node, labels={"app": "a"})) as (client,),
        RecordingServer(outside, {80: speak_http}, Journal()),
        pellucid.applied(policy(only(SITES[0]))),
    ):
        pellucid.cluster.kubectl("apply", "-f", "-", text=bad)
        assert eventually(lambda: condition(status_of(pellucid, "p"), "Accepted") == "False")
        assert "10.0.0.0/8" in message_of(status_of(pellucid, "p"), "Accepted")
        with pellucid.applied_beside_bad(policy(only(SITES[1]), name="q", app="other")):
            assert get(client, outside.ipv4, 80, SITES[0]).end == "answered"
            assert get(client, outside.ipv4, 80, SITES[1]).end == "reset"


@pytest.mark.parametrize("verdict", ["Allow", "Block"])
def test_a_node_explains_and_shows_the_flows_of_its_pods(pellucid: Product, verdict: str) -> None:
    name = SITES[0] if verdict == "Allow" else SITES[1]
    node = pellucid.plan.worker_nodes[-1].name
    outside = internet(pellucid.plan)
    with (
        pods(pellucid.cluster, manifest("told", node=node, labels={"app": "a"})) as (client,),
        RecordingServer(outside, {80: speak_http}, Journal()),
        pellucid.applied(policy(only(SITES[0]))),
    ):
        asked = pellucid.pellucid(
            "explain", "default/told", f"{outside.ipv4}:80", "--request", f"GET http://{name}/", "-o", "json"
        )
        assert asked.returncode == (0 if verdict == "Allow" else 1), asked.stderr
        assert json.loads(asked.stdout)["policy"]["name"] == "p"

        watching = pellucid.watching("observe", "-f", "--pod", "default/told", "--verdict", verdict, "-o", "json")
        try:
            with Traffic(lambda: get(client, outside.ipv4, 80, name), rate=2):
                assert watching.stdout is not None
                told = json.loads(watching.stdout.readline())
        finally:
            watching.terminate()
            watching.communicate()
        assert (told["policy"]["name"], told["verdict"], told["node"]) == ("p", verdict, node)
