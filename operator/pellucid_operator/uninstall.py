"""Take the product off the nodes before its chart goes: after that nobody could."""

from __future__ import annotations

import logging
import time

from .cluster import Cluster
from .world import DAEMON_SETS, NODES, SNAPSHOTS, key_of

log = logging.getLogger(__name__)

LOOK_S = 0.5
NAMES = ("pellucid-node", "pellucid-canary")
GONE, LEFT = 0, 1


def uninstall(cluster: Cluster, namespace: str, deployment: str, timeout_s: float) -> int:
    """No operator, no DaemonSet, no pod of it, no TransparentNode and no snapshot is left; LEFT if some are after timeout_s.

    Each node's agent takes its rules away and deletes its own TransparentNode last. Raises Refused."""
    cluster.scale_down(namespace, deployment)
    deadline = time.monotonic() + timeout_s
    while _pods(cluster, namespace, "operator") and time.monotonic() < deadline:
        time.sleep(LOOK_S)  # it would make the DaemonSets again
    for name in NAMES:
        cluster.delete(DAEMON_SETS, (DAEMON_SETS.name, namespace, name))
    left: list[str] = []
    while time.monotonic() < deadline:
        left = [
            *_pods(cluster, namespace, "node"),
            *(f"TransparentNode {each['metadata']['name']}" for each in cluster.listed(NODES)),
        ]
        if not left:
            break
        time.sleep(LOOK_S)
    for each in cluster.listed(SNAPSHOTS):
        cluster.delete(SNAPSHOTS, key_of(SNAPSHOTS.name, each))
    if left:
        for each in cluster.listed(NODES):  # of nodes that are not there any more
            cluster.delete(NODES, key_of(NODES.name, each))
        log.error("still there after %g s: %s; see docs/kubernetes.md, Uninstall", timeout_s, ", ".join(left))
        return LEFT
    log.info("every node has taken its rules away")
    return GONE


def _pods(cluster: Cluster, namespace: str, component: str) -> list[str]:
    selector = f"app.kubernetes.io/name=pellucid,app.kubernetes.io/component={component}".replace("=", "%3D").replace(
        ",", "%2C"
    )
    found = cluster.get(f"/api/v1/namespaces/{namespace}/pods?labelSelector={selector}")
    return [f"pod {each['metadata']['name']}" for each in found["items"]]
