"""Every kind of destination of a cluster, through the proxy: decided by it, answered, and with the right source address at the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pellucid_cli.lab.clients import get
from pellucid_cli.lab.servers import Arrival, Journal, RecordingServer, speak_http

from .conftest import Figure
from .hosts import Host, internet, manifest, node_host, pods
from .product import Product, eventually, policy

NAME, PORT, NODE_PORT = "any.example", 8080, 30080
KINDS = (
    "pod on the same node",
    "pod on another node",
    "ClusterIP",
    "headless",
    "NodePort",
    "external",
    "itself, by a service",
)


def service(name: str, app: str, **spec: object) -> dict[str, object]:
    ports = [{"port": 80, "targetPort": PORT, **({"nodePort": NODE_PORT} if spec.get("type") == "NodePort" else {})}]
    return {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
        "spec": {"selector": {"app": app}, "ports": ports, "ipFamilyPolicy": "RequireDualStack", **spec},
    }  # fmt: skip


@contextmanager
def services(pellucid: Product, *found: dict[str, object]) -> Iterator[dict[str, list[str]]]:
    """Their addresses of both families by name, once they lead somewhere."""
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(found)})
    pellucid.cluster.kubectl("apply", "-f", "-", text=text)
    try:
        names = [str(each["metadata"]["name"]) for each in found]  # type: ignore[index]
        yield {name: pellucid.get("service", name)["spec"]["clusterIPs"] for name in names}
    finally:
        pellucid.cluster.kubectl("delete", "-f", "-", text=text)


def of_family(addresses: tuple[str, ...] | list[str], version: int) -> str:
    return next(each for each in addresses if (":" in each) == (version == 6))


@pytest.mark.parametrize("source", ["Pod", "Node"])
def test_every_kind_of_destination_is_reached_through_the_proxy(pellucid: Product, figure: Figure, source: str) -> None:
    here, there = (each.name for each in pellucid.plan.worker_nodes[:2])
    outside, journal = internet(pellucid.plan), Journal()
    faults: dict[tuple[str, int], str] = {}
    spec = f"""
  - {{name: by-name, match: {{destinations: [{{domain: {NAME}}}]}}, action: Allow, egress: {{sourceAddress: {source}}}}}
  - {{name: rest, match: {{}}, action: Block}}
"""
    manifests = [
        manifest("asks", node=here),
        manifest("near", node=here),
        manifest("far", node=there),
    ]
    with (
        pods(pellucid.cluster, *manifests) as (client, near, far),
        RecordingServer(outside, {80: speak_http}, journal),
        RecordingServer(near, {PORT: speak_http}, journal),
        RecordingServer(far, {PORT: speak_http}, journal),
        RecordingServer(client, {PORT: speak_http}, journal),
        services(
            pellucid,
            service("far", "far"),
            service("headless", "far", clusterIP="None"),
            service("port", "far", type="NodePort"),
            service("own", "asks"),
        ) as by_name,
        pellucid.applied(policy(spec, app="asks")),
    ):
        node = node_host(pellucid.plan, there)
        for version in (4, 6):
            targets = {
                "pod on the same node": (of_family(near.addresses, version), PORT, near),
                "pod on another node": (of_family(far.addresses, version), PORT, far),
                "ClusterIP": (of_family(by_name["far"], version), 80, far),
                "headless": (of_family(far.addresses, version), PORT, far),
                "NodePort": (of_family(node.addresses, version), NODE_PORT, far),
                "external": (of_family(outside.addresses, version), 80, outside),
                "itself, by a service": (of_family(by_name["own"], version), 80, client),
            }
            for kind, (address, port, server) in targets.items():
                faults[kind, version] = fault(client, address, port, server, journal, source, version)
    good = sum(not each for each in faults.values())
    mode = pellucid.plan.proxy_mode
    figure(
        f"destinations, kube-proxy {mode}, source {source}",
        f"{good} of {len(faults)} answered with the right source at the server",
    )
    assert {case: each for case, each in faults.items() if each} == {}


def fault(client: Host, address: str, port: int, server: Host, journal: Journal, source: str, version: int) -> str:
    """What was wrong with a connection; "" if nothing."""
    seen: list[Arrival] = []

    def answered() -> bool:
        since = len(journal)
        if get(client, address, port, NAME).end != "answered":
            return False
        seen[:] = journal.arrivals(since)
        return True

    if not eventually(answered, 10):  # a service leads nowhere for a moment
        return f"client: {get(client, address, port, NAME)}"
    if len(seen) != 1 or seen[0].server != server.name:
        return f"servers: {[(each.server, each.source) for each in seen]}"
    if get(client, address, port, "other.example").end == "answered":
        return "a name that is forbidden was answered"
    own = seen[0].source == of_family(client.addresses, version)
    masqueraded = server is client or not server.node or port == NODE_PORT  # by the proxy; by the node; by kube-proxy
    if source == "Pod" and not masqueraded and not own:
        return f"source: {seen[0].source}"
    if source == "Node" and own:
        return f"source: {seen[0].source}"
    return ""
