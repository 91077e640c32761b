"""The cluster that `make e2e` started, as tests see it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from e2e.cluster import control, machine, programs
from e2e.cluster.plan import Plan

Figure = Callable[[str, str], None]
_figures: list[str] = []


class Cluster:
    """A running cluster; plan says its names and addresses."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def kubectl(self, *arguments: str, check: bool = True, text: str = "") -> str:
        return control.kubectl(self.plan, *arguments, check=check, text=text)

    def apply(self, file: Path) -> None:
        self.kubectl("apply", "-f", str(file))

    def inside(self, node: str, *command: str) -> str:
        """What command prints in the node."""
        done = subprocess.run(machine.inside(self.plan, node, command), capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def start_on(self, namespace: str, *command: str) -> subprocess.Popen[bytes]:
        """A process in a network namespace (internet, lan, a node); the caller ends it."""
        return subprocess.Popen(control.outside(self.plan, namespace, list(command)), stdout=subprocess.DEVNULL)


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    workers, mode = int(os.environ.get("WORKERS", "2")), os.environ.get("PROXY_MODE", "nftables")
    plan = Plan("pe2e", Path("build/e2e").absolute(), programs.built(), workers, mode)
    machine.pid_of(plan, plan.control_plane.name)  # raises: `make e2e` starts it
    return Cluster(plan)


@pytest.fixture
def figure() -> Figure:
    """Prints a figure at the end of the run."""
    return lambda what, said: _figures.append(f"{what}: {said}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _figures:
        terminalreporter.section("figures")
        for line in _figures:
            terminalreporter.write_line(line)
