"""Pellucid in the cluster, as its users have it: a chart, its objects, and `kubectl pellucid`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from e2e.cluster import control, machine
from e2e.cluster.plan import API_PORT, Plan

from .conftest import Cluster

CHART = Path("charts/pellucid").absolute()
NAMESPACE = "pellucid-system"
READY_S = 60.0
TRUE = "True"


def eventually(holds: Callable[[], bool], timeout_s: float = READY_S, every_s: float = 0.1) -> bool:
    """Whether it comes to hold within timeout_s; asked again and again."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(every_s)
    return True


class Product:
    """One installation. image: REPOSITORY:TAG, on all nodes already."""

    def __init__(self, cluster: Cluster, image: str) -> None:
        self.cluster = cluster
        self.plan: Plan = cluster.plan
        self.repository, _, self.tag = image.rpartition(":")

    def helm(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        program = str(self.plan.programs / "helm")
        command = control.outside(self.plan, self.plan.control_plane.name, [program, *arguments])
        done = subprocess.run(command, capture_output=True, text=True, env=control.environment(self.plan))
        if check and done.returncode:
            raise RuntimeError(f"helm {' '.join(arguments)}: {done.stderr.strip()}")
        return done

    def install(
        self, *values: str, verb: str = "install", chart: Path = CHART, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """helm install or upgrade; values: NAME=VALUE."""
        chosen = [f"image.repository={self.repository}", f"image.tag={self.tag}", "image.pullPolicy=Never", *values]
        sets = [word for each in chosen for word in ("--set", each)]
        return self.helm(verb, "pellucid", str(chart), "-n", NAMESPACE, "--create-namespace", *sets, check=check)

    def pellucid(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`kubectl pellucid`, to its end."""
        command, environment = self._plugin(arguments)
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    def watching(self, *arguments: str) -> subprocess.Popen[str]:
        """`kubectl pellucid`, which goes on; its output is to be read. The caller ends it."""
        command, environment = self._plugin(arguments)
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    def _plugin(self, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        command = [sys.executable, "-c", "from pellucid_cli.kubectl.main import main; main()", *arguments]
        environment = control.environment(self.plan) | {"KUBECTL": str(self.plan.programs / "kubectl")}
        environment["PYTHONPATH"] = ":".join(each for each in sys.path if each)
        return control.outside(self.plan, self.plan.control_plane.name, command), environment

    def kubectl_by_token(self, token: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """kubectl as the bearer of a token, and as nobody else."""
        server = f"https://{self.plan.control_plane.ipv4}:{API_PORT}"
        who = [
            f"--server={server}",
            f"--certificate-authority={self.plan.pki}/ca.crt",
            f"--token={token}",
            "--kubeconfig=/dev/null",
        ]
        command = control.outside(
            self.plan, self.plan.control_plane.name, [str(self.plan.programs / "kubectl"), *who, *arguments]
        )
        return subprocess.run(command, capture_output=True, text=True)

    def get(self, *what: str) -> Any:
        return json.loads(self.cluster.kubectl("get", *what, "-o", "json"))

    def nodes(self) -> dict[str, dict[str, Any]]:
        """The status of each TransparentNode by its name."""
        items = self.get("transparentnodes")["items"]
        return {each["metadata"]["name"]: each.get("status", {}) for each in items}

    def verified(self) -> bool:
        """Whether every node enforces the offered snapshot and its canary was answered."""
        nodes = self.nodes()
        return set(nodes) == {each.name for each in self.plan.worker_nodes} and all(
            condition(status, kind) == TRUE
            for status in nodes.values()
            for kind in ("Programmed", "InterceptionVerified")
        )

    def enforced(self) -> bool:
        """Whether `kubectl pellucid status` is content."""
        return self.pellucid("status").returncode == 0

    def settled(self) -> None:
        """Returns when every node enforces every policy; raises with what `status` says otherwise."""
        done = self.pellucid("status", "--wait", str(READY_S), "-o", "text")
        if done.returncode:
            raise AssertionError(f"{done.stdout}\n{done.stderr}")

    def pods(self, component: str) -> list[dict[str, Any]]:
        """Pods of node, canary or operator that are not being deleted."""
        found = self.get("pods", "-n", NAMESPACE, "-l", f"app.kubernetes.io/component={component}")["items"]
        return [each for each in found if "deletionTimestamp" not in each["metadata"]]

    @contextmanager
    def applied(self, text: str) -> Iterator[None]:
        """The manifests are in force on all nodes; afterwards they are gone, and that too."""
        self.cluster.kubectl("apply", "-f", "-", text=text)
        try:
            self.settled()
            yield
        finally:
            self.cluster.kubectl("delete", "-f", "-", "--ignore-not-found", text=text)
            self.settled()

    @contextmanager
    def applied_beside_bad(self, text: str) -> Iterator[None]:
        """The same where another policy is refused, so that `status` is never content: every node enforces the offered snapshot."""
        before = self.offered()
        self.cluster.kubectl("apply", "-f", "-", text=text)
        try:
            assert eventually(lambda: self.offered() != before and self.programmed())
            yield
        finally:
            self.cluster.kubectl("delete", "-f", "-", "--ignore-not-found", text=text)

    def offered(self) -> str:
        """The revision of the snapshot that nodes are to enforce."""
        return str(self.get("transparentsnapshot", "current")["spec"]["index"]["revision"])

    def programmed(self) -> bool:
        """Whether every node enforces it."""
        offered = self.offered()
        return all(status.get("revision") == offered for status in self.nodes().values())


def condition(status: dict[str, Any], kind: str) -> str:
    """True, False, Unknown; "" if it is not there."""
    return next((each["status"] for each in status.get("conditions", ()) if each["type"] == kind), "")


def policy(rules: str, *, name: str = "p", namespace: str = "default", app: str = "a", spec: str = "") -> str:
    """A TransparentPolicy for pods with label app, with `failureMode: Closed` unless spec says more."""
    return f"""---
apiVersion: pellucid.dev/v1alpha1
kind: TransparentPolicy
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  podSelector: {{matchLabels: {{app: {app}}}}}
  failureMode: Closed
  {spec}
  rules:
{rules}
"""


def only(name: str) -> str:
    """Rules that allow one domain and nothing else."""
    return f"""
  - {{name: allowed, match: {{destinations: [{{domain: {name}}}]}}, action: Allow}}
  - {{name: rest, match: {{}}, action: Block}}
"""


def memory_mib(pod: dict[str, Any]) -> float:
    """The working set of a pod, as `kubectl top` would tell it: what its cgroup uses, without file pages that nobody uses now."""
    name = f"pod{pod['metadata']['uid']}"
    v2 = (machine.CGROUPS / "cgroup.controllers").exists()
    root = machine.CGROUPS if v2 else machine.CGROUPS / "memory"
    folder = next(each for each in root.rglob(name) if each.is_dir())
    used = int((folder / ("memory.current" if v2 else "memory.usage_in_bytes")).read_text())
    told = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return (used - int(told["inactive_file" if v2 else "total_inactive_file"])) / (1 << 20)


WORKERS = int(os.environ.get("WORKERS", "2"))
