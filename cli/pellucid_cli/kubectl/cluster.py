"""The cluster as kubectl sees it: with the user's own kubeconfig, rights and proxies."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

NO_CLUSTER = 2
PATIENCE_S = 30
NODE_PODS = "app.kubernetes.io/name=pellucid,app.kubernetes.io/component=node"


class NotThere(click.ClickException):
    """The cluster, or Pellucid in it, cannot be asked; says why and what to do."""

    exit_code = NO_CLUSTER


@dataclass(frozen=True)
class Cluster:
    """flags: of kubectl, before its command: which cluster, as whom. namespace: Pellucid's."""

    flags: tuple[str, ...]
    namespace: str

    def command(self, *arguments: str) -> list[str]:
        kubectl = os.environ.get("KUBECTL", "kubectl")
        if shutil.which(kubectl) is None:
            raise NotThere(f"{kubectl} is not there. Cure: install kubectl, or name it in the variable KUBECTL.")
        return [kubectl, *self.flags, *arguments]

    def objects(self, *what: str) -> list[dict[str, Any]]:
        """The items that `kubectl get` finds. Raises NotThere with kubectl's own words."""
        done = subprocess.run(
            self.command("get", f"--request-timeout={PATIENCE_S}s", *what, "-o", "json"),
            capture_output=True,
            check=False,
        )
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()
            cure = "helm install pellucid charts/pellucid" if "the server doesn't have a resource type" in said else (
                "see whether `kubectl get nodes` answers, and what `kubectl auth can-i get transparentnodes` says"
            )  # fmt: skip
            raise NotThere(f"{said}. Cure: {cure}.")
        found = json.loads(done.stdout)
        items: list[dict[str, Any]] = found.get("items", [found])
        return items

    def node_pods(self) -> dict[str, str]:
        """The running pods of the DaemonSet: name by node; of two, at an upgrade, the younger one. Raises NotThere."""
        pods = self.objects("pods", "-n", self.namespace, "-l", NODE_PODS)
        running = [each for each in pods if each["status"].get("phase") == "Running"]
        running.sort(key=lambda each: str(each["metadata"]["creationTimestamp"]))
        if not running:
            raise NotThere(
                f"no pod of Pellucid runs in namespace {self.namespace}. Cure: name its namespace with --pellucid-namespace, or "
                "`helm install pellucid charts/pellucid`."
            )
        return {each["spec"]["nodeName"]: each["metadata"]["name"] for each in running}

    def inside(self, pod: str, command: Sequence[str], *, stdin: bool = False) -> list[str]:
        """The command line that runs command in a pod of the DaemonSet."""
        interactive = ["-i"] if stdin else []
        return self.command("exec", *interactive, "-n", self.namespace, pod, "-c", "pellucid", "--", *command)
