"""A user who may edit one namespace, and tries to reach further."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from pellucid_cli.lab.clients import get
from pellucid_cli.lab.servers import Journal, RecordingServer, speak_http

from .conftest import Figure
from .hosts import internet, manifest, pods
from .product import NAMESPACE, Product, only, policy

OWN, OTHER, USER = "team-own", "team-other", "mallory"
GOOD, BAD = "good.example", "bad.example"
POLICY = "transparentpolicy"


@pytest.fixture
def teams(pellucid: Product) -> Iterator[Product]:
    """Two namespaces; USER has the role edit in one, and each has a policy."""
    kubectl = pellucid.cluster.kubectl
    for name in (OWN, OTHER):
        kubectl("create", "namespace", name)
    kubectl("create", "rolebinding", "edits", "-n", OWN, "--clusterrole=edit", f"--user={USER}")
    kubectl("apply", "-f", "-", text=policy(only(GOOD), namespace=OWN) + policy(only(GOOD), namespace=OTHER))
    try:
        yield pellucid
    finally:
        for name in (OWN, OTHER):
            kubectl("delete", "namespace", name)


def kind(name: str, spec: str, of: str = "ClusterTransparentPolicy") -> str:
    return f"apiVersion: pellucid.dev/v1alpha1\nkind: {of}\nmetadata: {{name: {name}}}\nspec: {spec}\n"


ANY = "{tier: Admin, podSelector: {}, rules: [{match: {}, action: Allow}]}"
AUTHORITY = '{names: ["*.example"], namespaces: {}, key: {secretRef: {name: ca}}}'
MERGE = ("--type=merge", "-p")
ATTEMPTS: dict[str, tuple[tuple[str, ...], str]] = {
    "a policy for another namespace": (("apply", "-f", "-"), policy(only(BAD), name="mine", namespace=OTHER)),
    "change another namespace's policy": (("patch", POLICY, "p", "-n", OTHER, *MERGE, '{"spec": {"mode": "Audit"}}'), ""),
    "delete another namespace's policy": (("delete", POLICY, "p", "-n", OTHER), ""),
    "read another namespace's policy": (("get", POLICY, "p", "-n", OTHER), ""),
    "read another namespace's status": (("get", POLICY, "p", "-n", OTHER, "-o", "jsonpath={.status}"), ""),
    "list everybody's policies": (("get", POLICY, "-A"), ""),
    "a policy for the cluster": (("apply", "-f", "-"), kind("mine", ANY)),
    "read the cluster's policies": (("get", "clustertransparentpolicy"), ""),
    "an authority to open TLS": (("apply", "-f", "-"), kind("mine", AUTHORITY, "InterceptionAuthority")),
    "change the installation": (("patch", "transparentproxy", "default", *MERGE, '{"spec": {"defaultAction": "Allow"}}'), ""),
    "take the installation away": (("delete", "transparentproxy", "default"), ""),
    "read what nodes enforce": (("get", "transparentsnapshot", "current"), ""),
    "write what nodes enforce": (("patch", "transparentsnapshot", "current", *MERGE, '{"spec": {"index": {"pieces": []}}}'), ""),
    "read a node's status": (("get", "transparentnode"), ""),
    "forge a node's status": (("patch", "transparentnode", "n1", "--subresource=status", *MERGE, '{"status": {"revision": "x"}}'), ""),
    "forge its own policy's status": (
        ("patch", POLICY, "p", "-n", OWN, "--subresource=status", *MERGE, '{"status": {"revision": "x"}}'), "",
    ),
    "delete the nodes' pods": (("delete", "daemonset", "pellucid-node", "-n", NAMESPACE), ""),
    "enter a node's pod": (("auth", "can-i", "create", "pods/exec", "-n", NAMESPACE, "-q"), ""),
    "read the product's secrets": (("get", "secrets", "-n", NAMESPACE), ""),
    "label its own namespace out of a selector": (("label", "namespace", OWN, "quarantine=no"), ""),
    "take the admission policy away": (("delete", "validatingadmissionpolicy", "pellucid-own-node"), ""),
}  # fmt: skip


def test_a_namespaces_user_reaches_no_further(teams: Product, figure: Figure) -> None:
    kubectl = teams.cluster.kubectl
    succeeded = []
    for what, (command, text) in ATTEMPTS.items():
        try:
            kubectl(f"--as={USER}", *command, text=text)
            succeeded.append(what)
        except RuntimeError:
            continue
    kubectl(f"--as={USER}", "patch", POLICY, "p", "-n", OWN, *MERGE, '{"spec": {"priority": 7}}')  # its own it may
    figure(
        "a namespace's user",
        f"{len(ATTEMPTS) - len(succeeded)} of {len(ATTEMPTS)} attempts to reach further are refused",
    )
    assert succeeded == []


def test_a_namespaces_policy_reaches_only_its_own_pods(teams: Product) -> None:
    """The widest that a tenant can write: every pod, everything."""
    node = teams.plan.worker_nodes[0].name
    outside = internet(teams.plan)
    wide = policy("  - {name: all, match: {}, action: Block}\n", name="wide", namespace=OWN, spec="priority: 0")
    wide = wide.replace("{matchLabels: {app: a}}", "{}")
    labels = {"app": "a"}
    manifests = [
        manifest("mine", node=node, namespace=OWN, labels=labels),
        manifest("theirs", node=node, namespace=OTHER, labels=labels),
    ]
    with (
        pods(teams.cluster, *manifests) as (mine, theirs),
        RecordingServer(outside, {80: speak_http}, Journal()),
        teams.applied(wide),
    ):
        assert get(mine, outside.ipv4, 80, GOOD).end in ("reset", "refused")
        assert get(theirs, outside.ipv4, 80, GOOD).end == "answered"
        assert (
            json.loads(
                teams.pellucid(
                    "explain", f"{OTHER}/theirs", f"{outside.ipv4}:80", "--request", f"GET http://{GOOD}/", "-o", "json"
                ).stdout
            )["policy"]["namespace"]
            == OTHER
        )
