"""Nothing is left of a run that was killed once `pellucid cleanup` has run; and a start without its source enforces from disk at once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pellucid_cli.lab.clients import get
from pellucid_cli.lab.servers import speak_http
from pellucid_proxy.agent.status import read_status
from pellucid_proxy.kernel.conntrack import counted

from .conftest import Figure
from .stage import INSTALLATION, Stage, kill, policy, process_ids

SITE, FORBIDDEN = "site.example", "forbidden.example"
RULES = policy(f"""
  - {{name: site, match: {{destinations: [{{domain: {SITE}}}]}}, action: Allow}}
  - {{match: {{}}, action: Block}}
""")
LIMIT_S = 2.0


def _cleanup(stage: Stage, state: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pellucid_cli", "cleanup", "--state", str(state)]
    return stage.node.run(command, check=False)


def test_nothing_is_left_after_kill_9_of_everything_and_cleanup(tmp_path: Path, figure: Figure) -> None:
    with Stage(tmp_path) as stage:
        stage.serve("web", {80: speak_http})
        stage.write("policy.yaml", RULES)
        stage.write("installation.yaml", INSTALLATION.replace("spec: {", "spec: {marks: {mask: 12288}, "))
        stage.node.nft("table inet theirs { chain c { ct state new accept; }; }")  # so that tracking is there before
        before, sysctls = stage.left_behind(), stage.node.call(counted)
        a, web = stage["a"], stage["web"]
        with stage.run() as instance:
            refused = _cleanup(stage, instance.state)
            assert refused.returncode == 1
            assert "pellucid already runs with" in json.loads(refused.stdout)["error"]
            elsewhere = _cleanup(stage, tmp_path / "elsewhere")
            assert elsewhere.returncode == 1
            assert "another pellucid owns the table" in json.loads(elsewhere.stdout)["error"]
            assert get(a, web.ipv4, 80, SITE).end == "answered", "cleanup has touched a running instance"
            kill(*process_ids(instance).values())
            left = stage.left_behind()
            assert left != before
            assert get(a, web.ipv4, 80, FORBIDDEN).end in ("reset", "refused")
            said = _cleanup(stage, instance.state)
            assert said.returncode == 0, said.stderr
            removed = json.loads(said.stdout)["removed"]
            assert stage.left_behind() == before
            assert stage.node.call(counted) == sysctls
            assert sorted(path.name for path in instance.state.iterdir()) == ["last-good.msgpack", "lock"]
            assert json.loads(_cleanup(stage, instance.state).stdout)["removed"] == []
            assert get(a, web.ipv4, 80, FORBIDDEN).end == "answered"
        with stage.run():
            assert get(a, web.ipv4, 80, FORBIDDEN).end == "reset"
        assert stage.left_behind() == before
        assert stage.node.call(counted) == sysctls
        figure("cleanup", f"{len(removed)} things of a killed run removed, 0 left; refused while one runs")


@pytest.mark.parametrize("source", ["bad", "empty", "unreadable"])
def test_a_start_without_its_source_enforces_from_disk_at_once(tmp_path: Path, figure: Figure, source: str) -> None:
    """As after a restart of the node while whatever writes the folder is away."""
    with Stage(tmp_path) as stage:
        stage.serve("web", {80: speak_http})
        stage.write("policy.yaml", RULES)
        a, web = stage["a"], stage["web"]
        instance = stage.run("--workers", "2", drain_s=0.0)
        with instance:
            revision = read_status(str(instance.state)).revision
        if source == "bad":
            stage.write("policy.yaml", RULES.replace("Block", "Blok"))
        elif source == "empty":
            for file in stage.policy.iterdir():
                file.unlink()
        else:
            (stage.policy / "policy.yaml").unlink()
            (stage.policy / "policy.yaml").symlink_to("nowhere")
        began = time.monotonic()
        with instance:
            took = time.monotonic() - began
            status = read_status(str(instance.state))
            assert (status.revision, status.source) == (revision, "last-good")
            assert status.problems
            assert get(a, web.ipv4, 80, SITE).end == "answered"
            assert get(a, web.ipv6, 80, FORBIDDEN).end == "reset"
        figure(f"start, source {source}", f"enforcing from disk {took:.2f} s after the start of the command")
        assert took < LIMIT_S


def test_a_start_whose_folder_is_gone_enforces_from_disk_too(tmp_path: Path, figure: Figure) -> None:
    with Stage(tmp_path) as stage:
        stage.serve("web", {80: speak_http})
        stage.write("policy.yaml", RULES)
        instance = stage.run(drain_s=0.0)
        with instance:
            revision = read_status(str(instance.state)).revision
        shutil.rmtree(stage.policy)
        began = time.monotonic()
        with instance:
            took = time.monotonic() - began
            assert read_status(str(instance.state)).revision == revision
            assert get(stage["a"], stage["web"].ipv4, 80, FORBIDDEN).end == "reset"
            stage.policy.mkdir()
        figure("start, folder gone", f"enforcing from disk {took:.2f} s after the start of the command")
        assert took < LIMIT_S
