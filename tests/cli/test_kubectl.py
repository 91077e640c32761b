"""`kubectl pellucid` against a kubectl that answers from a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pellucid_cli.kubectl.main import main
from pellucid_cli.kubectl.status import told

TRUE = [
    {"type": kind, "status": "True", "reason": "Fine"} for kind in ("Programmed", "InterceptionVerified", "RulesIntact")
]
ACCEPTED = [{"type": kind, "status": "True", "reason": kind} for kind in ("Accepted", "Programmed")]

KUBECTL = f"""#!{sys.executable}
import json, sys, pathlib
here = pathlib.Path(__file__).parent
words = [each for each in sys.argv[1:] if not each.startswith("-")]
with (here / "asked").open("a") as out: print(json.dumps(sys.argv[1:]), file=out)
if words[0] == "exec":
    pod = next(each for each in words if each.startswith("pellucid-node-"))
    sys.stdout.write((here / f"{{pod}}.out").read_text())
    sys.exit(int((here / f"{{pod}}.status").read_text()) if (here / f"{{pod}}.status").exists() else 0)
answer = here / f"{{words[1].partition('.')[0]}}.json"
if not answer.exists():
    sys.exit(f"error: the server doesn't have a resource type \\"{{words[1]}}\\"")
print(answer.read_text())
"""


def node(name: str, *, conditions: list[dict[str, str]] = TRUE, revision: str = "r1") -> dict[str, Any]:
    return {"metadata": {"name": name}, "status": {"version": "0.1", "revision": revision, "conditions": conditions}}


def policy(name: str, *, conditions: list[dict[str, str]] = ACCEPTED, observed: int = 3) -> dict[str, Any]:
    status = {"observedGeneration": observed, "conditions": conditions, "nodes": {"summary": "2/2"}}
    return {
        "kind": "TransparentPolicy",
        "metadata": {"name": name, "namespace": "shop", "generation": 3},
        "status": status,
    }


def pod(name: str, on: str, phase: str = "Running", age: int = 1) -> dict[str, Any]:
    created = f"2026-01-0{age}T00:00:00Z"
    return {
        "metadata": {"name": name, "creationTimestamp": created},
        "spec": {"nodeName": on},
        "status": {"phase": phase},
    }


class Fake:
    """A cluster of two nodes that is as it should be, unless told otherwise."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        kubectl = folder / "kubectl"
        kubectl.write_text(KUBECTL)
        kubectl.chmod(0o755)
        self.has("transparentsnapshots", {"metadata": {"name": "current"}, "spec": {"index": {"revision": "r1"}}})
        self.has("transparentnodes", node("n1"), node("n2"))
        self.has("transparentpolicies", policy("web"))
        self.has("clustertransparentpolicies")
        self.has("pods", pod("pellucid-node-a", "n1"), pod("pellucid-node-b", "n2"))

    def has(self, kind: str, *objects: dict[str, Any]) -> None:
        (self.folder / f"{kind}.json").write_text(json.dumps({"items": objects}))

    def asked(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "asked").read_text().splitlines()]

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, arguments, env={"KUBECTL": str(self.folder / "kubectl")})


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


def test_all_is_well(fake: Fake) -> None:
    shown = fake.run("--context", "prod", "--as", "me", "status", "-o", "text")
    assert shown.exit_code == 0, shown.output
    assert "1 policies are enforced on 2 nodes" in shown.output
    assert all(asked[:2] == ["--context=prod", "--as=me"] for asked in fake.asked())


def test_in_a_pipe_it_is_json(fake: Fake) -> None:
    answer = json.loads(fake.run("status").output)
    assert answer["enforced"] is True
    assert answer["nodes"][0]["node"] == "n1"
    assert answer["policies"][0]["nodes"] == "2/2"


@pytest.mark.parametrize(
    ("nodes", "policies", "why"),
    [
        ([node("n1")], [], "node n2: its pod has not reported yet"),
        ([node("n1"), node("n2", revision="r0")], [], "node n2: has not enforced revision r1 yet"),
        ([node("n1"), node("n2", conditions=TRUE[:2])], [], "node n2: RulesIntact: not known yet"),
        (
            [node("n1"), node("n2", conditions=[{"type": "InterceptionVerified", "status": "False", "message": "no canary"}, *TRUE[::2]])],
            [], "node n2: InterceptionVerified: no canary",
        ),
        ([node("n1"), node("n2")], [policy("web", observed=2)], "shop/web: Accepted: the operator has not seen this version"),
        ([node("n1"), node("n2")], [policy("web", conditions=[])], "shop/web: Accepted: not known yet"),
        ([], [], "has not reported yet"),
    ],
)  # fmt: skip
def test_what_is_not_as_it_should_be_is_named(nodes: list[Any], policies: list[Any], why: str) -> None:
    found = told(["n1", "n2"], nodes, policies, "r1")
    assert not found.good
    assert any(why in line for line in found.why), found.why


def test_waiting_ends_when_all_is_well_or_the_time_is_over(fake: Fake) -> None:
    fake.has("transparentnodes", node("n1"))
    shown = fake.run("status", "--wait", "0.1", "-o", "text")
    assert shown.exit_code == 1
    assert "node n2: its pod has not reported yet" in shown.output


@pytest.mark.parametrize("missing", ["transparentnodes", "transparentsnapshots"])
def test_without_pellucid_the_cure_is_told(fake: Fake, missing: str) -> None:
    (fake.folder / f"{missing}.json").unlink()
    shown = fake.run("status")
    assert shown.exit_code == 2
    assert "helm install pellucid" in shown.stderr


def test_without_a_pod_or_kubectl_the_cure_is_told(fake: Fake) -> None:
    fake.has("pods", pod("pellucid-node-a", "n1", phase="Pending"))
    shown = fake.run("status")
    assert (shown.exit_code, "--pellucid-namespace" in shown.stderr) == (2, True)
    shown = CliRunner().invoke(main, ["status"], env={"KUBECTL": "no-such-kubectl"})
    assert (shown.exit_code, "no-such-kubectl is not there" in shown.stderr) == (2, True)


def program(fake: Fake, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from pellucid_cli.kubectl.main import main; main()", *arguments]
    environment = {"KUBECTL": str(fake.folder / "kubectl"), "PYTHONPATH": ":".join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=30)


def test_the_node_of_a_pod_explains(fake: Fake) -> None:
    (fake.folder / "pod.json").write_text(json.dumps({"metadata": {"name": "cart"}, "spec": {"nodeName": "n2"}}))
    (fake.folder / "pellucid-node-b.out").write_text("Block by shop/web\n")
    (fake.folder / "pellucid-node-b.status").write_text("1")
    done = program(fake, "explain", "shop/cart", "192.0.2.1:443", "--sni", "x.example")
    assert (done.returncode, done.stdout) == (1, "Block by shop/web\n"), done.stderr
    inside = ["--", "pellucid", "explain", "shop/cart", "192.0.2.1:443", "--sni", "x.example"]
    assert fake.asked()[-1][-len(inside) :] == inside


def test_of_two_pods_of_a_node_the_younger_one_is_asked(fake: Fake) -> None:
    (fake.folder / "pod.json").write_text(json.dumps({"metadata": {"name": "cart"}, "spec": {"nodeName": "n1"}}))
    fake.has("pods", pod("pellucid-node-b", "n1", age=2), pod("pellucid-node-a", "n1", age=1))
    (fake.folder / "pellucid-node-b.out").write_text("from b")
    assert program(fake, "explain", "shop/cart", "192.0.2.1:443").stdout == "from b"


def test_a_pod_on_a_node_without_pellucid_is_told(fake: Fake) -> None:
    (fake.folder / "pod.json").write_text(json.dumps({"metadata": {"name": "cart"}, "spec": {"nodeName": "n9"}}))
    shown = fake.run("explain", "shop/cart", "192.0.2.1:443")
    assert (shown.exit_code, "runs on node n9" in shown.stderr) == (2, True)
    assert "NAMESPACE/NAME" in fake.run("explain", "cart", "192.0.2.1:443").stderr


def test_flows_of_all_nodes_are_merged(fake: Fake) -> None:
    for name in ("a", "b"):
        (fake.folder / f"pellucid-node-{name}.out").write_text(json.dumps({"node": name}) + "\n")
    done = program(fake, "observe", "-f", "--verdict", "Block")
    assert done.returncode == 0, done.stderr
    assert sorted(json.loads(line)["node"] for line in done.stdout.splitlines()) == ["a", "b"]
    assert all(asked[-6:] == ["observe", "-f", "--verdict", "Block", "-o", "json"] for asked in fake.asked()[1:])


def test_that_an_own_pod_has_the_port_is_no_fault(fake: Fake) -> None:
    for name, status in (("a", 1), ("b", 0)):
        (fake.folder / f"pellucid-node-{name}.out").write_text(json.dumps({"fit": status == 0}))
        (fake.folder / f"pellucid-node-{name}.status").write_text(str(status))
    shown = fake.run("preflight")
    assert (shown.exit_code, sorted(json.loads(shown.output))) == (0, ["n1", "n2"])
    (fake.folder / "pellucid-node-b.status").write_text("3")
    assert fake.run("preflight", "-o", "text").exit_code == 3
