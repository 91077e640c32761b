"""Pods and the internet as network namespaces of this machine: clients and servers run in them without an image of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.cluster import machine
from e2e.cluster.plan import INTERNET4, INTERNET6, INTERNET_HOSTS, PAUSE_IMAGE, Plan
from pellucid_cli.lab.topology import Namespace

from .conftest import Cluster

READY_S = 60.0


@dataclass(frozen=True)
class Host(Namespace):
    """A namespace that another mount namespace names. where: the path of its file, as this process sees it. node: where it runs."""

    where: str = ""
    node: str = ""

    @property
    def path(self) -> str:
        return self.where


def internet(plan: Plan, number: int = INTERNET_HOSTS[0]) -> Host:
    """One of the addresses behind the router; servers that bind to any address have all of them."""
    name = plan.namespace("internet")
    return Host(name, (f"{INTERNET4}.{number}", f"{INTERNET6}:{number}"), where=f"/run/netns/{name}")


def node_host(plan: Plan, name: str) -> Host:
    """A node itself."""
    node = next(each for each in plan.nodes if each.name == name)
    return Host(plan.namespace(name), (node.ipv4, node.ipv6), where=f"/run/netns/{plan.namespace(name)}", node=name)


def manifest(
    name: str, *, node: str, namespace: str = "default", labels: dict[str, str] | None = None, **spec: Any
) -> dict[str, Any]:
    """A pod that does nothing, to be entered; spec: more of its spec."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app": name} | (labels or {})},
        "spec": {
            "nodeSelector": {"kubernetes.io/hostname": node},
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "pause", "image": PAUSE_IMAGE, "imagePullPolicy": "Never"}],
            **spec,
        },
    }


def entered(cluster: Cluster, name: str, namespace: str = "default") -> Host:
    """A pod that is Ready or becomes so, as a host."""
    cluster.kubectl("wait", "-n", namespace, "--for=condition=Ready", f"pod/{name}", f"--timeout={READY_S:g}s")
    pod = json.loads(cluster.kubectl("get", "pod", "-n", namespace, name, "-o", "json"))
    addresses = tuple(each["ip"] for each in pod["status"]["podIPs"])
    return found(cluster.plan, pod["spec"]["nodeName"], addresses)


def found(plan: Plan, node: str, addresses: Sequence[str]) -> Host:
    """The namespace on node that has these addresses."""
    for where in sorted(Path(f"/proc/{machine.pid_of(plan, node)}/root/run/netns").glob("cni-*")):
        host = Host(where.name, tuple(addresses), where=str(where), node=node)
        if set(addresses) <= set(_addresses(host)):
            return host
    raise LookupError(f"{node} has no namespace with {', '.join(addresses)}")


def _addresses(host: Host) -> Iterator[str]:
    said = host.run(["ip", "-j", "address"], check=False).stdout
    for link in json.loads(said or "[]"):
        yield from (each["local"] for each in link["addr_info"] if "local" in each)


@contextmanager
def pods(cluster: Cluster, *manifests: dict[str, Any]) -> Iterator[list[Host]]:
    """They run, in the order of manifests; afterwards they are gone."""
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(manifests)})
    cluster.kubectl("apply", "-f", "-", text=text)
    try:
        yield [entered(cluster, each["metadata"]["name"], each["metadata"]["namespace"]) for each in manifests]
    finally:
        cluster.kubectl("delete", "-f", "-", "--now", "--ignore-not-found", text=text)
