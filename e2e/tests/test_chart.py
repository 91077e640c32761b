"""The chart as helm and the API server see it, and what its service accounts may not do."""

from __future__ import annotations

import json

import pytest

from tools import manifests

from .conftest import Figure
from .product import CHART, NAMESPACE, Product

OPERATOR, NODE, CANARY = (
    f"system:serviceaccount:{NAMESPACE}:pellucid-{name}" for name in ("operator", "node", "canary")
)


def test_helm_finds_no_fault_with_it(pellucid: Product) -> None:
    assert "0 chart(s) failed" in pellucid.helm("lint", str(CHART)).stdout


def test_the_rendered_manifests_are_those_of_the_chart() -> None:
    assert manifests.FILE.read_text() == manifests.rendered(), "run: make manifests"


def test_the_api_server_takes_every_rendered_object(pellucid: Product) -> None:
    said = pellucid.cluster.kubectl(
        "apply", "--dry-run=server", "--server-side", "--force-conflicts", "-f", str(manifests.FILE)
    )
    assert len(said.splitlines()) >= 20


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("agent.drain=5", "drain"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("agent.terminationGracePeriodSeconds=0", "terminationGracePeriodSeconds"),
        ("operator.logLevel=loud", "logLevel"),
        ("image.digest=abc", "digest"),
    ],
)
def test_a_value_that_is_none_is_refused_by_name(pellucid: Product, value: str, why: str) -> None:
    done = pellucid.helm("template", "x", str(CHART), "--set", value, check=False)
    assert done.returncode != 0
    assert why in done.stderr


FORBIDDEN = [
    (OPERATOR, "get", "secrets"), (OPERATOR, "list", "pods"), (OPERATOR, "create", "pods"), (OPERATOR, "patch", "nodes"),
    (OPERATOR, "update", "transparentpolicies.pellucid.dev"), (OPERATOR, "delete", "transparentnodes.pellucid.dev"),
    (OPERATOR, "create", "clusterroles.rbac.authorization.k8s.io"), (OPERATOR, "update", "deployments.apps"),
    (NODE, "get", "secrets"), (NODE, "create", "transparentsnapshots.pellucid.dev"), (NODE, "patch", "pods"),
    (NODE, "get", "transparentpolicies.pellucid.dev"), (NODE, "update", "nodes"), (NODE, "delete", "daemonsets.apps"),
    (NODE, "list", "namespaces"), (NODE, "create", "pods/exec"), (CANARY, "get", "pods"), (CANARY, "list", "transparentnodes.pellucid.dev"),
]  # fmt: skip


def test_the_service_accounts_may_do_what_they_need_and_no_more(pellucid: Product, figure: Figure) -> None:
    def may(account: str, verb: str, resource: str) -> bool:
        return pellucid.cluster.kubectl("auth", "can-i", verb, resource, f"--as={account}", "-A", check=False) == "yes"

    allowed = [each for each in FORBIDDEN if may(*each)]
    assert may(NODE, "watch", "transparentsnapshots.pellucid.dev")
    assert may(OPERATOR, "watch", "transparentpolicies.pellucid.dev")
    figure(
        "rights of the service accounts",
        f"{len(FORBIDDEN) - len(allowed)} of {len(FORBIDDEN)} things that they do not need are forbidden",
    )
    assert allowed == []


def test_a_node_may_write_its_own_transparent_node_and_no_other(pellucid: Product) -> None:
    """With the token of the pod that runs there."""
    here, there = (each.name for each in pellucid.plan.worker_nodes[:2])
    (pod,) = (each for each in pellucid.pods("node") if each["spec"]["nodeName"] == here)
    bound = [
        "--bound-object-kind=Pod",
        f"--bound-object-name={pod['metadata']['name']}",
        f"--bound-object-uid={pod['metadata']['uid']}",
    ]
    token = pellucid.cluster.kubectl("create", "token", "pellucid-node", "-n", NAMESPACE, *bound)

    def write(name: str) -> str:
        patch = json.dumps({"metadata": {"labels": {"tried": "yes"}}})
        done = pellucid.kubectl_by_token(token, "patch", "transparentnode", name, "--type=merge", "-p", patch)
        return "" if done.returncode == 0 else done.stderr

    assert write(here) == ""
    assert "only the TransparentNode named after its node" in write(there)
