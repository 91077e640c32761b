"""From `helm install` to verified interception, and what `kubectl pellucid` says of it."""

from __future__ import annotations

import json

from .conftest import Figure
from .product import Product, memory_mib


def test_every_nodes_interception_is_verified_soon_after_the_install(
    pellucid: Product, install_s: float, figure: Figure
) -> None:
    figure("helm install", f"all {len(pellucid.nodes())} nodes InterceptionVerified {install_s:.1f} s after its start")
    assert pellucid.verified()
    assert install_s <= 60


def test_status_is_content_and_says_what_runs(pellucid: Product) -> None:
    done = pellucid.pellucid("status", "-o", "json")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert [each["node"] for each in told["nodes"]] == [each.name for each in pellucid.plan.worker_nodes]


def test_preflight_of_the_nodes_finds_nothing_that_hinders(pellucid: Product) -> None:
    done = pellucid.pellucid("preflight", "-o", "json")
    assert done.returncode == 0, done.stdout + done.stderr


def test_memory(pellucid: Product, figure: Figure) -> None:
    found = {
        component: max(memory_mib(pod) for pod in pellucid.pods(component))
        for component in ("operator", "node", "canary")
    }
    figure("memory of a pod, MiB of working set", ", ".join(f"{name} {mib:.0f}" for name, mib in found.items()))
    assert found["operator"] <= 120
    assert found["node"] <= 100


def test_the_nodes_run_without_being_privileged(pellucid: Product) -> None:
    for pod in pellucid.pods("node"):
        (container,) = pod["spec"]["containers"]
        context = container["securityContext"]
        assert not context.get("privileged")
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"]["drop"] == ["ALL"]
        assert "SYS_ADMIN" not in context["capabilities"]["add"]
        assert not container.get("ports"), "a port would be a host port, and two pods of an upgrade would clash"
