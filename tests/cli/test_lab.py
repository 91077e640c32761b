"""`pellucid lab` and `make demo`, as people start them: in a process of their own, which makes its own sandbox."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pellucid_cli.lab.scene import POLICY

LIMIT_S = 90


@contextmanager
def started(*arguments: str, mark: str = "") -> Iterator[subprocess.Popen[str]]:
    """`python -m ARGUMENTS`, with mark in the environment of it and of all that it starts; killed at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TEST_MARK": mark},
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def finished(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def bearing(mark: str) -> list[int]:
    """Descriptors that become readable when the processes with mark in their environment end."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"TEST_MARK={mark}".encode() in (entry / "environ").read_bytes():
                found.append(os.pidfd_open(int(entry.name)))
        except OSError:  # it has ended, or is another user's
            continue
    return found


def wait_all_ended(pidfds: list[int]) -> bool:
    waiting = set(pidfds)
    while waiting:
        ended, _, _ = select.select(list(waiting), [], [], LIMIT_S)
        if not ended:
            return False
        waiting -= set(ended)
    for descriptor in pidfds:
        os.close(descriptor)
    return True


def test_the_demo_holds_what_it_promises() -> None:
    done = finished("pellucid_cli.demo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WRONG" not in done.stdout
    assert "All as expected" in done.stdout
    assert "\x1b" not in done.stdout, "colours belong on terminals only"


def test_the_demo_needs_no_root() -> None:
    """As user 1000 of a user namespace: without a capability in any other."""
    command = ["unshare", "--user", "--map-user=1000", "--map-group=1000", sys.executable, "-m", "pellucid_cli.demo"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_S, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_demo_fails_where_the_policy_is_not_what_it_expects(tmp_path: Path) -> None:
    for path in POLICY.iterdir():
        (tmp_path / path.name).write_text(path.read_text().replace("address: 192.0.2.11", "address: 192.0.2.10"))
    done = finished("pellucid_cli.demo", "--policy", str(tmp_path))
    assert done.returncode == 1
    assert "NOT as expected" in done.stdout
    assert (
        "WRONG  cart, HTTPS beta.example.com: expected answered and canary: beta.example.com from 10.244.1.10"
        in done.stdout
    )


def test_without_the_proxy_everything_arrives_so_that_the_demo_shows_the_proxys_doing() -> None:
    done = finished("pellucid_cli.demo", "--without-proxy")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tracker.example from 10.244.1.10" in done.stdout


def test_the_lab_shows_live_flows_as_json_in_a_pipe() -> None:
    done = finished("pellucid_cli", "lab", "--seconds", "6", "--pods", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    flows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {flow["verdict"] for flow in flows} >= {"Allow", "Block"}
    assert {flow["source"]["pod"] for flow in flows} >= {"cart", "trial"}
    assert "pod-3 10.244.1.13 fd00:244:1::13" in done.stderr


def test_the_lab_runs_the_folder_it_is_given_and_builds_its_pods(tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: only, namespace: shop}\nstatus: {podIP: 10.244.1.77}\n---\n"
        "apiVersion: pellucid.dev/v1alpha1\nkind: TransparentPolicy\nmetadata: {name: one, namespace: shop}\n"
        "spec:\n  podSelector: {}\n  rules:\n"
        "  - {name: never, match: {destinations: [{domain: www.example.com}]}, action: Block}\n"
    )
    done = finished("pellucid_cli", "lab", "--policy", str(tmp_path), "--pods", "1", "--seconds", "2", "-o", "text")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "only 10.244.1.77" in done.stderr
    assert "Block   shop/only → www.example.com (192.0.2.10:443)  one/never" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_lab_ends_on_a_signal_and_leaves_no_process_behind(number: signal.Signals) -> None:
    mark = uuid.uuid4().hex
    with started("pellucid_cli", "lab", mark=mark) as lab:
        assert lab.stdout is not None
        assert lab.stdout.readline()  # a first flow
        processes = bearing(mark)
        assert len(processes) >= 3  # the lab, and the proxy's own
        lab.send_signal(number)
        assert lab.wait(LIMIT_S) == 0
        assert wait_all_ended(processes)


@pytest.mark.parametrize(
    "before", [[], ["unshare", "--user", "--map-user=1000", "--map-group=1000"]], ids=["root", "no root"]
)
def test_the_commands_that_the_lab_prints_work_in_another_terminal(before: list[str]) -> None:
    command = [*before, sys.executable, "-m", "pellucid_cli", "lab"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True) as lab:
        try:
            assert lab.stdout is not None
            assert lab.stderr is not None
            assert lab.stdout.readline()
            said = {}
            while "end" not in said:
                name, _, value = lab.stderr.readline().strip().partition(" ")
                said[name] = value.strip()
            enter = (
                said["enter"]
                .removeprefix("from another terminal: ")
                .replace("$SHELL", "ip -brief -4 address show eth0")
            )
            entered = subprocess.run(enter.split(), capture_output=True, text=True, timeout=LIMIT_S, check=False)
            state = said["state"].partition(",")[0]
            status = finished("pellucid_cli", "status", "--state", state, "--wait", "10")
        finally:
            lab.send_signal(signal.SIGINT)
            lab.communicate(timeout=LIMIT_S)
    assert "10.244.1.10/32" in entered.stdout, entered.stderr
    assert status.returncode == 0, status.stdout + status.stderr
    assert lab.returncode == 0


def test_the_proxy_ends_with_a_lab_that_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # a killed process takes nothing away
    mark = uuid.uuid4().hex
    with started("pellucid_cli", "lab", mark=mark) as lab:
        assert lab.stdout is not None
        assert lab.stdout.readline()
        processes = bearing(mark)
        lab.kill()
        assert wait_all_ended(processes)


def test_a_shell_in_a_pod_ends_the_lab_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shell = tmp_path / "shell"
    shell.write_text('#!/bin/sh\nip -brief -4 address show eth0\ntest -f "$PELLUCID_FLOWS" && echo flows\n')
    shell.chmod(0o755)
    monkeypatch.setenv("SHELL", str(shell))
    done = finished("pellucid_cli", "lab", "--shell", "trial", "--no-traffic")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10.244.1.11/32" in done.stdout
    assert done.stdout.endswith("flows\n")


def test_a_shell_in_no_pod_is_refused_with_those_there_are() -> None:
    done = finished("pellucid_cli", "lab", "--shell", "nobody")
    assert done.returncode == 1
    assert "Error: --shell: there is no pod nobody. Cure: take one of cart, trial, free." in done.stderr


def test_a_bad_policy_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    text = (POLICY / "cart.yaml").read_text()
    (tmp_path / "cart.yaml").write_text(text.replace("action: Route", "action: Reroute"))
    done = finished("pellucid_cli", "lab", "--policy", str(tmp_path))
    assert done.returncode == 1
    assert f"{tmp_path}/cart.yaml:" in done.stderr
    assert "Cure: mend what is said above" in done.stderr
