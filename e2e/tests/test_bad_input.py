"""What an installation may meet: each is a condition or an error with its cure, and what was enforced before goes on."""

from __future__ import annotations

import json

from pellucid_cli.lab.clients import get
from pellucid_cli.lab.servers import Journal, RecordingServer, speak_http

from .hosts import internet, manifest, pods
from .product import NAMESPACE, Product, eventually, only, policy

GOOD, BAD = "good.example", "bad.example"


def test_an_image_that_cannot_start_stops_the_rollout_and_the_old_pods_go_on(pellucid: Product) -> None:
    node = pellucid.plan.worker_nodes[0].name
    outside = internet(pellucid.plan)
    with (
        pods(pellucid.cluster, manifest("image", node=node, labels={"app": "image"})) as (client,),
        RecordingServer(outside, {80: speak_http}, Journal()),
        pellucid.applied(policy(only(GOOD), app="image")),
    ):
        before = {each["metadata"]["name"] for each in pellucid.pods("node")}
        bad = json.dumps({"spec": {"images": {"proxy": "pellucid.test/no-such:1"}}})
        pellucid.cluster.kubectl("patch", "transparentproxy", "default", "--type=merge", "-p", bad)

        def waits() -> bool:
            new = [each for each in pellucid.pods("node") if each["metadata"]["name"] not in before]
            states = [
                one.get("state", {}).get("waiting", {}).get("reason")
                for each in new
                for one in each["status"].get("containerStatuses", ())
            ]
            return "ErrImageNeverPull" in states

        try:
            assert eventually(waits)
            assert before <= {each["metadata"]["name"] for each in pellucid.pods("node")}, "maxUnavailable is 0"
            assert get(client, outside.ipv4, 80, GOOD).end == "answered"
            assert get(client, outside.ipv4, 80, BAD).end == "reset"
        finally:
            gone = json.dumps({"spec": {"images": None}})
            pellucid.cluster.kubectl("patch", "transparentproxy", "default", "--type=merge", "-p", gone)
        assert eventually(
            lambda: pellucid.enforced() and len(pellucid.pods("node")) == len(pellucid.plan.worker_nodes), 120, 0.5
        )


def test_a_second_installation_is_refused(pellucid: Product) -> None:
    done = pellucid.helm("install", "another", "charts/pellucid", "-n", "elsewhere", "--create-namespace", check=False)
    assert done.returncode != 0
    assert "exists and cannot be imported into the current release" in done.stderr
    assert pellucid.enforced()


def test_without_rights_a_node_goes_on_and_its_log_has_the_cure(pellucid: Product) -> None:
    kubectl = pellucid.cluster.kubectl
    node = pellucid.plan.worker_nodes[0].name
    outside = internet(pellucid.plan)
    binding = kubectl("get", "clusterrolebinding", "pellucid-node", "-o", "json")
    (pod,) = (each["metadata"]["name"] for each in pellucid.pods("node") if each["spec"]["nodeName"] == node)
    with (
        pods(pellucid.cluster, manifest("rights", node=node, labels={"app": "rights"})) as (client,),
        RecordingServer(outside, {80: speak_http}, Journal()),
        pellucid.applied(policy(only(GOOD), app="rights")),
    ):
        kubectl("delete", "clusterrolebinding", "pellucid-node")
        try:
            kubectl(
                "patch", "transparentpolicy", "p", "--type=merge", "-p", '{"spec": {"priority": 7}}'
            )  # to be told of
            told = "give the service account the right (the chart's ClusterRole and Role have it)"
            assert eventually(lambda: told in kubectl("logs", "-n", NAMESPACE, pod, "--tail=50"), 60, 0.5)
            assert get(client, outside.ipv4, 80, GOOD).end == "answered"
            assert get(client, outside.ipv4, 80, BAD).end == "reset"
        finally:
            value = json.loads(binding)
            value["metadata"] = {
                name: value["metadata"][name] for name in ("name", "labels", "annotations") if name in value["metadata"]
            }
            kubectl("apply", "-f", "-", text=json.dumps(value))
        assert eventually(pellucid.enforced, 90, 0.5)


def test_a_pod_network_that_holds_no_pod_of_the_node_is_told(pellucid: Product) -> None:
    """The TransparentProxy is accepted; each node says why it cannot take it, and goes on by what it has."""
    kubectl = pellucid.cluster.kubectl
    kubectl(
        "patch",
        "transparentproxy",
        "default",
        "--type=merge",
        "-p",
        json.dumps({"spec": {"podCIDRs": ["192.168.0.0/16"]}}),
    )
    try:

        def told() -> bool:
            findings = [each["message"] for status in pellucid.nodes().values() for each in status.get("findings", ())]
            return any("holds none of this node's own networks" in each for each in findings)

        assert eventually(told, 60, 0.5)
    finally:
        kubectl("patch", "transparentproxy", "default", "--type=merge", "-p", json.dumps({"spec": {"podCIDRs": None}}))
    assert eventually(
        lambda: pellucid.enforced() and len(pellucid.pods("node")) == len(pellucid.plan.worker_nodes), 120, 0.5
    )
