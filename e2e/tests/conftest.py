"""The cluster that `make e2e` started, as tests see it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from e2e.cluster import control, machine, programs
from e2e.cluster import product as product_image
from e2e.cluster.plan import Plan

if TYPE_CHECKING:
    from .product import Product

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


@pytest.fixture(scope="session")
def image(cluster: Cluster) -> str:
    """The name of the product's image of this tree, which all nodes have."""
    control.load(cluster.plan, [product_image.made(cluster.plan.folder / "images")])
    return product_image.image()


@pytest.fixture(scope="session")
def installed(cluster: Cluster, image: str) -> tuple[Product, float]:
    """Pellucid, installed by its chart; how many seconds it took from the start of helm until every node's interception was verified."""
    from .product import NAMESPACE, Product, eventually

    product = Product(cluster, image)
    product.helm("uninstall", "pellucid", "-n", NAMESPACE, "--ignore-not-found")  # of a run before this one
    began = time.monotonic()
    product.install()
    assert eventually(product.verified, 120), product.pellucid("status", "-o", "text").stdout
    return product, time.monotonic() - began


@pytest.fixture
def pellucid(installed: tuple[Product, float]) -> Product:
    return installed[0]


@pytest.fixture
def install_s(installed: tuple[Product, float]) -> float:
    return installed[1]


@pytest.fixture
def figure() -> Figure:
    """Prints a figure at the end of the run."""
    return lambda what, said: _figures.append(f"{what}: {said}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _figures:
        terminalreporter.section("figures")
        for line in _figures:
            terminalreporter.write_line(line)
