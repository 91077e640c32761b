"""What an edit costs the API server where there are many policies and many nodes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from e2e.cluster import control
from e2e.cluster.plan import API_PORT

from .conftest import Figure
from .product import Product, eventually, only, policy

AGENTS, POLICIES, EDITS = 50, 1000, 10
NODES = 5000
"""For which the arithmetic is to hold: at most 100 MB an edit."""
NAMESPACE = "many"


def test_an_edit_among_a_thousand_policies_costs_each_node_little(
    pellucid: Product, figure: Figure, tmp_path: Path
) -> None:
    kubectl = pellucid.cluster.kubectl
    kubectl("create", "namespace", NAMESPACE)
    kubectl("create", "serviceaccount", "simulated", "-n", NAMESPACE)
    kubectl(
        "create",
        "clusterrolebinding",
        "simulated",
        "--clusterrole=cluster-admin",
        f"--serviceaccount={NAMESPACE}:simulated",
    )
    (tmp_path / "token").write_text(kubectl("create", "token", "simulated", "-n", NAMESPACE))
    before = pellucid.offered()
    try:
        text = "".join(
            policy(only(f"site{n}.example"), name=f"p{n}", namespace=NAMESPACE, app=f"a{n}") for n in range(POLICIES)
        )
        kubectl("create", "-f", "-", text=text)
        assert eventually(lambda: len(_accepted(pellucid)) == POLICIES, 180, 1.0)
        where = [
            f"https://{pellucid.plan.control_plane.ipv4}:{API_PORT}",
            str(tmp_path / "token"),
            str(pellucid.plan.pki / "ca.crt"),
        ]
        command = control.outside(pellucid.plan, "cp", [sys.executable, "-m", "e2e.agents", *where, str(AGENTS)])
        environment = control.environment(pellucid.plan) | {"PYTHONPATH": ":".join(each or "." for each in sys.path)}
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as agents:
            start = _until_all_have(agents, pellucid.offered())
            costs, seconds = [], []
            for number in range(EDITS):
                offered, began = pellucid.offered(), time.monotonic()
                kubectl(
                    "apply",
                    "-f",
                    "-",
                    text=policy(only(f"edited{number}.example"), name="p7", namespace=NAMESPACE, app="a7"),
                )
                assert eventually(lambda offered=offered: pellucid.offered() != offered, 30, 0.05)  # type: ignore[misc]
                costs.append(_until_all_have(agents, pellucid.offered()))
                seconds.append(time.monotonic() - began)
            assert agents.stdin is not None
            agents.stdin.close()
        each = max(cost["bytes"] for cost in costs) / AGENTS
        writes = max(cost["writes"] for cost in costs)
        figure(
            f"{AGENTS} simulated agents, {POLICIES:,} policies",
            f"{start['bytes'] / AGENTS / 1024:.0f} KiB an agent at the start; an edit: {each / 1024:.1f} KiB an agent, "
            f"{each * NODES / 1e6:.0f} MB at {NODES:,} nodes, {writes} writes of nodes; in force {max(seconds):.1f} s after kubectl began",
        )
        assert each * NODES <= 100e6
        assert writes <= AGENTS
    finally:
        kubectl("delete", "namespace", NAMESPACE, "--wait=false")
        kubectl("delete", "clusterrolebinding", "simulated")
        kubectl("delete", "transparentnode", *(f"simulated-{n}" for n in range(AGENTS)), "--ignore-not-found")
    assert eventually(lambda: pellucid.offered() == before and pellucid.enforced(), 180, 1.0)


def _accepted(pellucid: Product) -> list[str]:
    path = "{range .items[?(@.status.observedGeneration==1)]}{.metadata.name}{'\\n'}{end}"
    return pellucid.cluster.kubectl("get", "transparentpolicy", "-n", NAMESPACE, "-o", f"jsonpath={path}").split()


def _until_all_have(agents: subprocess.Popen[str], revision: str) -> dict[str, float]:
    """What they received and wrote since the last time."""
    assert agents.stdin is not None
    assert agents.stdout is not None
    agents.stdin.write(f"{revision}\n")
    agents.stdin.flush()
    answer: dict[str, float] = json.loads(agents.stdout.readline())
    return answer
