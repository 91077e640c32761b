"""Pods that come, change and go: none of their connections is decided by another's policy, none before its own."""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack

from e2e.cluster import machine
from pellucid_cli.lab.clients import Traffic, get
from pellucid_cli.lab.servers import Journal, RecordingServer, speak_http

from .conftest import Figure
from .hosts import Host, entered, internet, manifest, pods
from .product import Product, eventually, only, policy

GOOD, BAD = "good.example", "bad.example"
STARTS = 8


def first_answers(cluster_pod: Host, server: str, count: int) -> list[str]:
    return [get(cluster_pod, server, 80, BAD).end for _ in range(count)]


def test_a_new_pod_is_held_to_its_policy_from_its_first_packet(pellucid: Product, figure: Figure) -> None:
    """Its namespace is entered as soon as there is one, long before the API server knows its address: what it asks for is forbidden."""
    node = pellucid.plan.worker_nodes[0].name
    outside, journal = internet(pellucid.plan), Journal()
    asked = answered = 0
    with RecordingServer(outside, {80: speak_http}, journal), pellucid.applied(policy(only(GOOD), app="starts")):
        for number in range(STARTS):
            text = json.dumps(manifest(f"starts-{number}", node=node, labels={"app": "starts"}))
            before = set(_namespaces(pellucid, node))
            pellucid.cluster.kubectl("apply", "-f", "-", text=text)
            assert eventually(lambda before=before: bool(set(_namespaces(pellucid, node)) - before), 30, 0.01)  # type: ignore[misc]
            (new,) = set(_namespaces(pellucid, node)) - before
            host = Host(new, (), where=f"{_folder(pellucid, node)}/{new}", node=node)
            assert eventually(lambda host=host: _has_route(host), 30, 0.01)  # type: ignore[misc]
            for address in outside.addresses:
                end = get(host, address, 80, BAD).end
                asked += 1
                answered += end == "answered"
            entered(pellucid.cluster, f"starts-{number}")
            assert get(host, outside.ipv4, 80, GOOD).end == "answered"
            pellucid.cluster.kubectl("delete", "pod", f"starts-{number}", "--now")
        names = [arrival.name for arrival in journal.arrivals()]
    figure(
        "pods that have just started",
        f"{asked} forbidden connections before they were ready, {names.count(BAD)} reached the server",
    )
    assert names.count(BAD) == answered == 0
    assert names.count(GOOD) == STARTS


def _folder(pellucid: Product, node: str) -> str:
    return f"/proc/{machine.pid_of(pellucid.plan, node)}/root/run/netns"


def _namespaces(pellucid: Product, node: str) -> list[str]:
    return [each for each in os.listdir(_folder(pellucid, node)) if each.startswith("cni-")]


def _has_route(host: Host) -> bool:
    """Its network is complete, in both families."""
    said = [host.run(["ip", family, "route", "show", "default"], check=False).stdout for family in ("-4", "-6")]
    tentative = host.run(["ip", "-6", "address", "show", "tentative"], check=False).stdout
    return all(said) and not tentative


REFUSED = ("reset", "refused")  # by a worker, by the kernel


def test_labels_of_pods_and_namespaces_count_within_a_second(pellucid: Product, figure: Figure) -> None:
    node = pellucid.plan.worker_nodes[-1].name
    outside = internet(pellucid.plan)
    delays = []
    admin = """---
apiVersion: pellucid.dev/v1alpha1
kind: ClusterTransparentPolicy
metadata: {name: quarantine}
spec:
  tier: Admin
  namespaceSelector: {matchLabels: {quarantine: "yes"}}
  rules: [{name: nothing, match: {}, action: Block}]
"""
    with (
        pods(pellucid.cluster, manifest("labelled", node=node)) as (client,),
        RecordingServer(outside, {80: speak_http}, Journal()),
        pellucid.applied(policy(only(GOOD), app="held") + admin),
        ExitStack() as stack,
    ):
        stack.callback(pellucid.cluster.kubectl, "label", "namespace", "default", "quarantine-")
        pellucid.cluster.kubectl("label", "namespace", "default", "quarantine-")
        traffic = stack.enter_context(Traffic(lambda: get(client, outside.ipv4, 80, BAD), rate=50))

        def change(*command: str, ends: tuple[str, ...]) -> None:
            began = time.monotonic()
            pellucid.cluster.kubectl(*command)
            assert traffic.wait(lambda one: one.answer.end in ends, 30), (command, traffic.tries()[-1])
            delays.append(
                next(one.ended for one in traffic.tries() if one.started > began and one.answer.end in ends) - began
            )

        assert traffic.wait(lambda one: one.answer.end == "answered", 30)
        change("label", "pod", "labelled", "app=held", "--overwrite", ends=REFUSED)
        change("label", "pod", "labelled", "app=free", "--overwrite", ends=("answered",))
        change("label", "namespace", "default", "quarantine=yes", ends=REFUSED)
        change("label", "namespace", "default", "quarantine-", ends=("answered",))
    figure("labels of pods and namespaces", f"in force {max(delays) * 1000:.0f} ms after the start of kubectl at most")
    assert max(delays) < 1.0


def _forget_last_address(pellucid: Product, node: str) -> None:
    """The network plugin gives the first free address next, which is the one that was freed last."""
    for number in (0, 1):
        pellucid.cluster.inside(node, "rm", "-f", f"/run/cni-ipam/ptp/last_reserved_ip.{number}")


def test_an_address_that_is_another_pods_now_has_that_pods_policy(pellucid: Product, figure: Figure) -> None:
    """Deleted and made anew, again and again, until an address was used twice by pods of different policies."""
    node = pellucid.plan.worker_nodes[0].name
    outside, journal = internet(pellucid.plan), Journal()
    used: dict[str, set[str]] = {}
    wrong, reused = [], 0
    with (
        RecordingServer(outside, {80: speak_http}, journal),
        pellucid.applied(policy(only(GOOD), name="pa", app="kind-a") + policy(only(BAD), name="pb", app="kind-b")),
    ):
        for number in range(12):
            kind, own, others = ("kind-a", GOOD, BAD) if number % 2 == 0 else ("kind-b", BAD, GOOD)
            _forget_last_address(pellucid, node)
            with pods(pellucid.cluster, manifest(f"reuse-{number}", node=node, labels={"app": kind})) as (host,):
                reused += bool(used.get(host.ipv4, set()) - {kind})
                used.setdefault(host.ipv4, set()).add(kind)
                ends = {name: get(host, outside.ipv4, 80, name).end for name in (own, others)}
                if ends != {own: "answered", others: "reset"}:
                    wrong.append((number, ends))
    figure(
        "addresses used again",
        f"12 pods, {reused} with an address that one of the other policy had before: {len(wrong)} wrong verdicts",
    )
    assert wrong == []
    assert reused >= 6
