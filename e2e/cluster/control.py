"""Start and end the cluster, and speak with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import images, machine, network, pki
from .plan import Plan

MANIFESTS = Path(__file__).with_name("manifests")
TOOLS = {
    "runc": "runc", "nft": "nftables", "iptables": "iptables", "conntrack": "conntrack", "mmdebstrap": "mmdebstrap",
    "buildah": "buildah", "openssl": "openssl",
    "/usr/lib/cni/ptp": "containernetworking-plugins",
}  # fmt: skip
READY_S = 90.0


def up(plan: Plan) -> None:
    """All nodes are Ready, and DNS answers; each step says how long it took. What was there of it before is taken away first."""
    started = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {what}", flush=True)

    missing = sorted({package for tool, package in TOOLS.items() if not shutil.which(tool)})
    if missing:
        raise RuntimeError(
            f"missing here: {', '.join(missing)}. Cure: apt-get install --no-install-recommends {' '.join(missing)}"
        )
    down(plan)
    files = images.made(plan.folder / "images", plan.programs)
    say("images")
    pki.make(plan)
    network.make(plan)
    say("certificates and networks")
    for node in plan.nodes:
        machine.start(plan, node)
    _until(lambda: kubectl(plan, "get", "--raw", "/readyz", check=False) == "ok", "the API server is not ready")
    say("API server")
    binding = (
        "create",
        "clusterrolebinding",
        "kube-proxy",
        "--clusterrole=system:node-proxier",
        "--user=system:kube-proxy",
    )
    kubectl(plan, *binding)
    load(plan, files)
    say(f"{len(files)} images on each node")
    for node in plan.worker_nodes:
        _until(partial(_there, plan, "node", node.name), f"{node.name} does not register")
        patch = {"spec": {"podCIDR": node.pods4, "podCIDRs": [node.pods4, node.pods6]}}
        kubectl(plan, "patch", "node", node.name, "-p", json.dumps(patch))
    kubectl(plan, "wait", "--for=condition=Ready", "node", "--all", f"--timeout={READY_S:g}s")
    say("nodes Ready")
    kubectl(plan, "apply", "-f", str(MANIFESTS / "dns.yaml"))
    kubectl(plan, "-n", "kube-system", "rollout", "status", "deployment/coredns", f"--timeout={READY_S:g}s")
    _until(partial(_there, plan, "serviceaccount", "default"), "there is no service account")
    say("DNS")
    print(f"\nKUBECONFIG={plan.kubeconfig}   in namespace {plan.namespace('cp')}: python3 -m e2e.cluster kubectl …")


def down(plan: Plan) -> None:
    for node in plan.nodes:
        machine.stop(plan, node)
    network.remove(plan)
    machine.erase(plan)


def load(plan: Plan, files: list[Path]) -> None:
    """Each worker's containerd has the images of these archives."""
    for node in plan.worker_nodes:
        socket = machine.inside(plan, node.name, ["test", "-S", "/run/containerd/containerd.sock"])
        _until(partial(_succeeds, socket), f"containerd of {node.name} does not run")
        for file in files:
            command = [str(plan.programs / "ctr"), "-n", "k8s.io", "images", "import", str(file)]
            done = subprocess.run(machine.inside(plan, node.name, command), capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{file} on {node.name}: {done.stderr.strip()}")


def kubectl(plan: Plan, *arguments: str, check: bool = True, text: str = "") -> str:
    """What it printed, without the last line end; "" if it failed and check is False. Raises RuntimeError."""
    command = outside(plan, plan.control_plane.name, [str(plan.programs / "kubectl"), *arguments])
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment(plan))
    if done.returncode and check:
        raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
    return "" if done.returncode else done.stdout.strip()


def outside(plan: Plan, name: str, command: list[str]) -> list[str]:
    """In the network namespace alone, with this machine's files and processes."""
    return ["nsenter", f"--net=/run/netns/{plan.namespace(name)}", "--", *command]


def environment(plan: Plan) -> dict[str, str]:
    return os.environ | {"KUBECONFIG": str(plan.kubeconfig)}


def _there(plan: Plan, kind: str, name: str) -> bool:
    return kubectl(plan, "get", kind, name, check=False) != ""


def _succeeds(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True).returncode == 0


def _until(attempt: Callable[[], bool], otherwise: str) -> None:
    machine.wait_for(attempt, f"{otherwise} after {READY_S:g} s; see the logs in build/e2e/log", READY_S)
