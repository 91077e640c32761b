"""That the cluster is one: what the product's tests stand on."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import pytest

from e2e.cluster import machine
from e2e.cluster.control import MANIFESTS
from e2e.cluster.plan import INTERNET4, INTERNET6
from e2e.cluster.programs import kubernetes_version

from .conftest import Cluster, Figure

PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def web(cluster: Cluster) -> Cluster:
    """A server on each node, and pod client on n1."""
    cluster.apply(MANIFESTS / "web.yaml")
    cluster.kubectl("rollout", "status", "daemonset/web", f"--timeout={PATIENCE_S:g}s")
    cluster.kubectl("wait", "--for=condition=Ready", "pod/client", f"--timeout={PATIENCE_S:g}s")
    return cluster


def got(cluster: Cluster, url: str) -> tuple[str, str]:
    """(node, address of the asker) as the server says; the client asks."""
    said = cluster.kubectl("exec", "client", "--", "curl", "-gsS", "--max-time", "5", url)
    node, asker = said.split()
    return node, asker


def reaches_both(cluster: Cluster, url: str) -> bool:
    return {got(cluster, url)[0] for _ in range(20)} == {node.name for node in cluster.plan.worker_nodes}


def eventually(attempt: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not attempt():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_nodes_are_ready_and_of_the_version_that_was_built(cluster: Cluster, figure: Figure) -> None:
    nodes = json.loads(cluster.kubectl("get", "nodes", "-o", "json"))["items"]
    ready = {
        node["metadata"]["name"]: node["status"]["nodeInfo"]["kubeletVersion"]
        for node in nodes
        if any(each["type"] == "Ready" and each["status"] == "True" for each in node["status"]["conditions"])
    }
    figure(
        "cluster", f"{len(ready)} nodes Ready, Kubernetes {kubernetes_version()}, kube-proxy {cluster.plan.proxy_mode}"
    )
    assert ready == {node.name: kubernetes_version() for node in cluster.plan.worker_nodes}
    assert all(len(node["spec"]["podCIDRs"]) == 2 for node in nodes), "dual stack"


def test_a_node_is_a_machine_of_its_own(cluster: Cluster) -> None:
    """Its network, processes and files are no other's: what a DaemonSet does to one node is not seen on the next."""
    cluster.inside("n1", "nft", "add", "table", "inet", "only_n1")
    try:
        assert "only_n1" in cluster.inside("n1", "nft", "list", "tables")
        assert "only_n1" not in cluster.inside("n2", "nft", "list", "tables")
        assert "only_n1" not in subprocess.run(["nft", "list", "tables"], capture_output=True, text=True).stdout
        assert cluster.inside("n1", "hostname") == "n1"
        assert len(cluster.inside("n1", "pgrep", "-x", "kubelet").split()) == 1
    finally:
        cluster.inside("n1", "nft", "delete", "table", "inet", "only_n1")


def test_pods_reach_each_other_by_every_kind_of_address(web: Cluster, figure: Figure) -> None:
    pods = json.loads(web.kubectl("get", "pods", "-l", "app=web", "-o", "json"))["items"]
    client = json.loads(web.kubectl("get", "pod", "client", "-o", "json"))
    own = {each["ip"] for each in client["status"]["podIPs"]}
    service = json.loads(web.kubectl("get", "service", "web", "-o", "json"))
    reached = 0
    for pod in pods:
        for address in (each["ip"] for each in pod["status"]["podIPs"]):
            node, asker = got(web, f"http://[{address}]:8080/" if ":" in address else f"http://{address}:8080/")
            assert node == pod["spec"]["nodeName"]
            assert asker in own, "a pod's address stays as it is within the cluster"
            reached += 1
    for address in service["spec"]["clusterIPs"]:
        url = f"http://[{address}]/" if ":" in address else f"http://{address}/"
        assert eventually(partial(reaches_both, web, url))
        reached += 1
    assert got(web, "http://web.default.svc.cluster.local/")[0] in ("n1", "n2")
    figure("reached from a pod", f"{reached} addresses of pods and services, both families, and a name")


@pytest.mark.parametrize("address", [f"{INTERNET4}.1", f"[{INTERNET6}:1]", "www.internet.test"])
def test_the_internet_sees_the_nodes_address(web: Cluster, address: str) -> None:
    program = (
        "import socket\n"
        "from http.server import *\n"
        "class S(ThreadingHTTPServer): address_family = socket.AF_INET6\n"
        "class H(BaseHTTPRequestHandler):\n"
        "  def do_GET(self):\n"
        "    said = f\"internet {self.client_address[0].removeprefix('::ffff:')}\".encode()\n"
        "    self.send_response(200); self.send_header('Content-Length', str(len(said))); self.end_headers(); self.wfile.write(said)\n"
        "  def log_message(self, *_): pass\n"
        "S(('::', 8080), H).serve_forever()\n"
    )
    server = web.start_on("internet", sys.executable, "-c", program)
    try:
        node = web.plan.worker_nodes[0]

        def answered() -> bool:
            try:
                return got(web, f"http://{address}:8080/") in (("internet", node.ipv4), ("internet", node.ipv6))
            except RuntimeError:
                return False  # the server is not up yet

        assert eventually(answered)
    finally:
        server.kill()
        server.wait()


def test_a_node_that_lost_power_is_ready_again(web: Cluster, figure: Figure) -> None:
    node = web.plan.worker_nodes[-1]
    web.inside(node.name, "nft", "add", "table", "inet", "before")
    began = time.monotonic()
    machine.reboot(web.plan, node)

    def ready() -> bool:
        said = web.kubectl(
            "get", "node", node.name, "-o", "jsonpath={.status.nodeInfo.bootID} {.status.conditions[-1].status}"
        )
        pods = web.kubectl(
            "get", "pods", "-l", "app=web", f"--field-selector=spec.nodeName={node.name}", "-o",
            "jsonpath={.items[0].status.containerStatuses[0].restartCount} {.items[0].status.containerStatuses[0].ready}",
        )  # fmt: skip
        return said.endswith("True") and pods == "1 true"

    assert eventually(ready)
    figure("a node that lost power", f"its pods are ready again after {time.monotonic() - began:.1f} s")
    assert "before" not in web.inside(node.name, "nft", "list", "tables")
