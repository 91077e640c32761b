"""The place where all of this happens touches nothing outside, leaves nothing, and says why where it cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from pellucid_cli.lab import sandbox
from pellucid_cli.lab.topology import Topology

OUTSIDE = {name: value for name, value in os.environ.items() if name != sandbox.MARKER}
RUN = [sys.executable, "-m", "pellucid_cli.lab.sandbox"]


def run(*command: str, env: dict[str, str] = OUTSIDE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)


def test_a_command_runs_in_namespaces_of_its_own() -> None:
    done = run(*RUN, "sh", "-c", "ip -brief link; ls /run; ip netns add x && ls /run/netns; readlink /proc/self/ns/net")
    assert done.returncode == 0, done.stderr
    link, netns, own = done.stdout.splitlines()
    assert link.startswith("lo ")
    assert "UP" in link
    assert netns == "x"
    assert own != os.readlink("/proc/self/ns/net")
    assert not os.path.exists("/run/netns/x")


def test_entering_twice_is_entering_once_but_a_marker_alone_is_not_believed() -> None:
    before = os.readlink("/proc/self/ns/net")
    sandbox.enter()
    assert os.readlink("/proc/self/ns/net") == before
    forged = run(*RUN, "readlink", "/proc/self/ns/net", env=OUTSIDE | {sandbox.MARKER: "forged"})
    assert forged.stdout.strip() not in ("", before)
    inherited = run(*RUN, "readlink", "/proc/self/ns/net", env=dict(os.environ))
    assert inherited.stdout.strip() == before


def test_a_process_with_threads_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(sandbox.MARKER)
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        with pytest.raises(sandbox.SandboxError, match=r"several threads; call enter\(\) before it starts any"):
            sandbox.enter()
    finally:
        stop.set()
        thread.join()


def test_a_kernel_that_forbids_it_is_named_with_the_cure() -> None:
    forbidding = 'echo 0 > /proc/sys/user/max_user_namespaces; exec setpriv --inh-caps -all --bounding-set -all "$@"'
    done = run("unshare", "-Ur", "sh", "-c", forbidding, "sh", *RUN, "true")
    assert done.returncode == 126
    assert done.stderr == (
        "sandbox: the kernel refuses new namespaces (No space left on device); run as root, or raise `sysctl user.max_user_namespaces`\n"
    )


@pytest.mark.parametrize(
    ("arguments", "status"), [([], 2), (["--help"], 0), (["no-such-command"], 127), (["false"], 1), (["true"], 0)]
)
def test_exit_statuses(arguments: list[str], status: int) -> None:
    assert run(*RUN, *arguments).returncode == status


@pytest.mark.parametrize("bridge", [False, True])
def test_a_topology_is_built_in_under_a_second_and_leaves_nothing(bridge: bool) -> None:
    before = time.monotonic()
    with Topology(bridge=bridge, congestion_control="reno") as topology:
        a, b, _ = (topology.add_pod(name) for name in "abc")
        for name in ("web", "mail"):
            topology.add_server(name)
        assert time.monotonic() - before < 1.0
        sleeper = a.popen(["sleep", "1000"])
        assert a.run(["cat", "/proc/sys/net/ipv4/tcp_congestion_control"]).stdout == "reno\n"
        for client, server in ((a, b), (a, topology.servers["web"]), (topology.servers["mail"], a), (topology.node, b)):
            for address in server.addresses:
                with server.listen("::" if ":" in address else "0.0.0.0", 80) as listener, client.connect(address, 80):
                    accepted, peer = listener.accept()
                    accepted.close()
                    assert peer[0] in client.addresses
        topology.remove_pod("b")
    assert sleeper.returncode is not None
    assert os.listdir("/run/netns") == []
