"""The nodes as this machine sees them: one process each, whose end ends everything in the node."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from . import network
from . import node as first_process
from .plan import Node, Plan, cgroup, spec

CGROUPS = Path("/sys/fs/cgroup")
PATIENCE_S = 30.0

T = TypeVar("T")
_outer: list[subprocess.Popen[bytes]] = []  # they end with their nodes, which may outlive this process


class NotRunning(Exception):
    """There is no such node, or it has been stopped."""


def start(plan: Plan, node: Node) -> None:
    """The node runs; its daemons may not be ready yet."""
    disk = plan.own(node)
    disk.mkdir(parents=True, exist_ok=True)
    plan.logs.mkdir(exist_ok=True)
    if node.index:
        for hierarchy in _hierarchies():
            _cgroup_made(hierarchy, Path(f"{hierarchy}{cgroup(plan, node)}"))
    description = disk / "node.json"
    description.write_text(json.dumps(spec(plan, node)))
    inside = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--uts", "--ipc", "--kill-child=KILL"]
    command = [
        "nsenter",  # ip netns exec would mount another /sys
        f"--net=/run/netns/{plan.namespace(node.name)}",
        *inside,
        sys.executable,
        first_process.__file__,
        str(description),
    ]
    with (plan.logs / f"{node.name}.log").open("ab") as log:
        outer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    _outer.append(outer)
    pid = wait_for(lambda: _child(outer.pid), f"{node.name} does not start: see {plan.logs / node.name}.log")
    _record(plan, node).write_text(json.dumps([pid, _born(pid)]))


def stop(plan: Plan, node: Node) -> None:
    """Nothing of the node runs, as after a power cut; its disk stays. May be called of one that does not run."""
    with contextlib.suppress(NotRunning):
        pid = pid_of(plan, node.name)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not Path(f"/proc/{pid}").exists(), f"{node.name} does not end")
    _record(plan, node).unlink(missing_ok=True)
    for hierarchy in _hierarchies():  # of pods: each that is left costs the next kubelet seconds
        _remove_cgroups(Path(f"{hierarchy}{cgroup(plan, node)}"))


def reboot(plan: Plan, node: Node) -> None:
    """As a power cut and a start: what the kernel held of rules, routes and connections is gone."""
    stop(plan, node)
    network.forget(plan, node)
    start(plan, node)


def pid_of(plan: Plan, name: str) -> int:
    """The node's first process, seen from here. Raises NotRunning."""
    node = next((each for each in plan.nodes if each.name == name), None)
    if node is None:
        raise NotRunning(f"there is no node {name}; there are {', '.join(each.name for each in plan.nodes)}")
    try:
        pid, born = json.loads(_record(plan, node).read_text())
    except (OSError, ValueError):
        raise NotRunning(f"{name} does not run") from None
    if _born(pid) != born:
        raise NotRunning(f"{name} has ended; see {plan.logs}")
    return int(pid)


def inside(plan: Plan, name: str, command: Sequence[str]) -> list[str]:
    """The command line that runs command in the node. Raises NotRunning."""
    return ["nsenter", f"--target={pid_of(plan, name)}", "--net", "--mount", "--pid", "--uts", "--ipc", "--", *command]


def erase(plan: Plan) -> None:
    """The disks of all nodes are gone; images, certificates and logs stay."""
    for node in plan.nodes:
        shutil.rmtree(plan.own(node), ignore_errors=True)


def _record(plan: Plan, node: Node) -> Path:
    return plan.folder / f"{node.name}.pid"


def _child(pid: int) -> int:
    """The first child of a process, 0: it has none yet."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    grand = [int(each) for each in children.read_text().split()] if children.exists() else []
    return grand[0] if grand else 0


def _born(pid: int) -> str:
    """When a process was started, so that another with its number is not taken for it; "": it does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _hierarchies() -> Iterator[Path]:
    """The roots of cgroup hierarchies: one on a machine with v2, else one for each controller."""
    if (CGROUPS / "cgroup.controllers").exists():
        yield CGROUPS
    else:
        yield from (each for each in CGROUPS.iterdir() if (each / "cgroup.procs").exists() and not each.is_symlink())


def _cgroup_made(hierarchy: Path, own: Path) -> None:
    own.mkdir(exist_ok=True)
    if hierarchy == CGROUPS:
        for controller in ("cpu", "cpuset", "memory", "pids", "io", "hugetlb"):
            with contextlib.suppress(OSError):  # not on this kernel
                (hierarchy / "cgroup.subtree_control").write_text(f"+{controller}")
    for name in ("cpuset.cpus", "cpuset.mems"):
        if hierarchy != CGROUPS and (own / name).exists():
            (own / name).write_text((hierarchy / name).read_text())


def _remove_cgroups(own: Path) -> None:
    def gone() -> bool:
        for folder in sorted((each for each in own.rglob("*") if each.is_dir()), key=lambda each: -len(each.parts)):
            with contextlib.suppress(OSError):
                folder.rmdir()
        with contextlib.suppress(OSError):
            own.rmdir()
        return not own.exists()

    with contextlib.suppress(TimeoutError):  # the machine's own business then: a later start meets it again
        wait_for(gone, f"{own} is busy")


def wait_for(attempt: Callable[[], T], otherwise: str, patience_s: float = PATIENCE_S) -> T:
    """What attempt returns once it is true. Raises TimeoutError with what is otherwise the case."""
    deadline = time.monotonic() + patience_s
    while not (found := attempt()):
        if time.monotonic() > deadline:
            raise TimeoutError(otherwise)
        time.sleep(0.02)
    return found
