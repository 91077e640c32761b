"""What systemd hears of a run, and that the unit says what the run needs."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pellucid_cli.lab.clients import TlsSession
from pellucid_cli.lab.servers import speak_https
from pellucid_proxy.agent.status import read_status
from pellucid_proxy.rights.table import SUPERVISOR

from .conftest import Figure
from .stage import Stage, kill, policy, process_ids

UNIT = Path(__file__).parents[3] / "packaging/systemd/pellucid.service"
WATCHDOG_S = 2.0
SILENCE_S = 1.5 * WATCHDOG_S  # by then systemd has ended it
PATIENCE_S = 20.0
SITE = "site.example"
RULES = "  - {match: {}, action: Allow}\n"
RELAYED = policy(f"  - {{match: {{destinations: [{{domain: {SITE}}}]}}, action: Allow}}\n")


class Manager:
    """systemd's end of the notify socket."""

    def __init__(self, path: Path) -> None:
        self.sender = 0  # of the last message
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(str(path))

    def next(self, timeout_s: float = PATIENCE_S) -> dict[str, str]:
        """The next message, or nothing in it if none comes in time."""
        self._socket.settimeout(timeout_s)
        try:
            data, ancillary, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(12))
        except TimeoutError:
            return {}
        ((_, _, credentials),) = ancillary
        self.sender, _, _ = struct.unpack("3i", credentials)
        return dict(line.split("=", 1) for line in data.decode().splitlines())

    def until(self, key: str, value: str) -> list[dict[str, str]]:
        """All messages up to the first with that field."""
        heard = []
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            heard.append(self.next(max(0.01, deadline - time.monotonic())))
            if heard[-1].get(key) == value:
                return heard
        raise AssertionError(f"no {key}={value} in {heard}")

    def fed_within(self, seconds: float) -> bool:
        """Whether WATCHDOG=1 comes."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if "WATCHDOG" in self.next(left):
                return True
        return False

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    """One that a run started by this test speaks to."""
    made = Manager(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", str(int(WATCHDOG_S * 1e6)))
    yield made
    made.close()


def test_systemd_hears_ready_when_it_enforces_and_nothing_while_a_process_hangs(
    tmp_path: Path, manager: Manager, figure: Figure
) -> None:
    with Stage(tmp_path, pods=("a",)) as stage:
        stage.write("policy.yaml", policy(RULES))
        with stage.run("--workers", "2") as instance:
            ready = manager.next()
            revision = read_status(str(instance.state)).revision
            assert ready == {"READY": "1", "STATUS": f"Enforcing revision {revision}"}
            ids = process_ids(instance)
            assert manager.sender == ids["guardian"], "NotifyAccess=main"
            for name in ("agent", "worker0", "worker1"):
                assert b"NOTIFY_SOCKET" not in Path(f"/proc/{ids[name]}/environ").read_bytes()
            for victim in ("worker0", "agent", "guardian"):
                assert manager.fed_within(PATIENCE_S), f"before {victim} hangs"
                os.kill(ids[victim], signal.SIGSTOP)
                try:
                    manager.fed_within(WATCHDOG_S / 2)  # an answer that was on its way
                    assert not manager.fed_within(SILENCE_S), f"while {victim} hangs"
                finally:
                    os.kill(ids[victim], signal.SIGCONT)
                assert manager.fed_within(PATIENCE_S), f"after {victim} hung"
            os.kill(ids["guardian"], signal.SIGHUP)
            assert int(manager.until("RELOADING", "1")[-1]["MONOTONIC_USEC"]) > 0
            assert manager.until("READY", "1")[-1]["STATUS"] == "Flow file reopened"
            os.kill(ids["guardian"], signal.SIGTERM)
            manager.until("STOPPING", "1")
    figure(
        "systemd",
        f"READY once it enforces, WATCHDOG while all answer, nothing for {SILENCE_S:g} s while agent, worker or guardian is stopped, "
        "RELOADING, STOPPING",
    )


def test_a_successor_from_a_shell_is_the_services_main_process_from_then_on(
    tmp_path: Path, manager: Manager, monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    """The one before it goes on with its live connections, and is silent; systemd hears only of the main process."""
    with Stage(tmp_path, pods=("a",)) as stage:
        stage.serve("web", {443: speak_https})
        stage.write("policy.yaml", RELAYED)
        with stage.run() as instance, TlsSession(stage["a"], stage["web"].ipv4, 443, SITE) as stream:
            manager.until("READY", "1")
            for variable in ("NOTIFY_SOCKET", "WATCHDOG_USEC"):
                monkeypatch.delenv(variable)
            with instance.successor() as heir:
                main = process_ids(heir)["guardian"]
                manager.until("MAINPID", str(main))
                assert manager.sender == process_ids(instance)["guardian"]
                manager.until("READY", "1")
                for _ in range(8):
                    assert manager.fed_within(WATCHDOG_S)
                    assert manager.sender == main
                assert instance.running and stream.request().end == "answered"
                kill(process_ids(heir)["supervisor"])
                manager.until("READY", "1")
                assert manager.fed_within(WATCHDOG_S)
                assert manager.sender == main, "the next supervisor knows whom to tell"
                os.kill(main, signal.SIGTERM)
                manager.until("STOPPING", "1")
    figure("systemd, hand-over", "MAINPID from the one before, then READY and WATCHDOG of the successor alone")


def test_a_successor_that_is_another_service_leaves_this_one_its_manager(
    tmp_path: Path, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Stage(tmp_path, pods=("a",)) as stage:
        stage.serve("web", {443: speak_https})
        stage.write("policy.yaml", RELAYED)
        monkeypatch.setenv("INVOCATION_ID", "a" * 32)
        with stage.run() as instance, TlsSession(stage["a"], stage["web"].ipv4, 443, SITE) as stream:
            manager.until("READY", "1")
            other = Manager(tmp_path / "other")
            monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "other"))
            monkeypatch.setenv("INVOCATION_ID", "b" * 32)
            with instance.successor() as heir:
                other.until("READY", "1")
                assert other.sender == process_ids(heir)["guardian"]
                manager.until("STATUS", "Handed over; live connections go on")
                assert all(manager.fed_within(WATCHDOG_S) for _ in range(4)), "while its connections go on"
                assert stream.request().end == "answered"
            other.close()


def test_a_start_that_is_refused_is_never_ready(tmp_path: Path, manager: Manager) -> None:
    with Stage(tmp_path, pods=("a",)) as stage:
        stage.write("policy.yaml", "kind: Nothing\n")
        done = stage.node.run(stage.command(state=tmp_path / "state"), check=False)
        assert done.returncode == 2
        assert "READY" not in manager.next(0.01)


def test_the_unit_gives_what_the_supervisor_keeps_and_waits_for_the_drain(tmp_path: Path) -> None:
    settings: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith(("#", "[")):
            settings.setdefault(name, []).append(value)
    assert set(settings["CapabilityBoundingSet"][0].split()) == {f"CAP_{each.name}" for each in SUPERVISOR.capabilities}
    assert settings["Type"] == ["notify"] and settings["NotifyAccess"] == ["main"]
    assert settings["KillMode"] == ["mixed"], "a worker ends at once by SIGTERM: only the supervisor drains"
    assert int(settings["TimeoutStopSec"][0]) >= 30 + 10 + 2  # --drain, and the graces of supervisor/main.py
    assert int(settings["WatchdogSec"][0]) > 10  # the longest wait of supervisor/backoff.py
    assert settings["ExecStart"][0].startswith("/opt/pellucid/bin/pellucid run ")
    analyze = shutil.which("systemd-analyze")
    if analyze is not None:
        checked = tmp_path / UNIT.name
        checked.write_text(UNIT.read_text().replace("/opt/pellucid/bin/pellucid", sys.executable))
        done = subprocess.run([analyze, "verify", "--man=no", str(checked)], capture_output=True, text=True, timeout=60)
        about_ours = [line for line in done.stderr.splitlines() if UNIT.name in line]
        assert (done.returncode, about_ours) == (0, []), done.stderr
