"""What each process of a running instance may do, as the kernel says it of them."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from pellucid_proxy.agent.status import read_status

from ..world import eventually
from .conftest import Figure
from .stage import CountingServer, Load, Stage, kill, policy, process_ids

KILL, SETGID, SETUID, SETPCAP, NET_ADMIN, NET_RAW = (1 << bit for bit in (5, 6, 7, 8, 12, 13))  # linux/capability.h
EXPECTED = {
    "supervisor": KILL | SETGID | SETUID | SETPCAP | NET_ADMIN | NET_RAW,
    "agent": NET_ADMIN | NET_RAW,
    "worker": NET_RAW,
}
WORKER_ID = "61001"
RULES = "  - {match: {}, action: Allow}\n"


def said_of(pid: int) -> dict[str, str]:
    """/proc/PID/status: proc_pid_status(5)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def users_can_be_had() -> bool:
    """Whether this kernel namespace has the workers' user: not in the sandbox of an ordinary user."""
    return any(int(line.split()[2]) > int(WORKER_ID) for line in Path("/proc/self/uid_map").read_text().splitlines())


def test_every_process_has_the_rights_of_its_kind_and_no_more(tmp_path: Path, figure: Figure) -> None:
    """Under load, and again after agent and a worker were killed and started again."""
    mine = said_of(os.getpid())
    checked = 0
    with Stage(tmp_path, pods=("a",)) as stage, CountingServer(stage["web"], 80) as server:
        stage.write("policy.yaml", policy(RULES))
        with stage.run("--workers", "2") as instance, Load(stage["a"], stage["web"].addresses, 80, "web"):
            for victims in (("agent", "worker0"), ()):
                goal = server.accepted + 20
                assert eventually(partial(reached, server, goal), 20.0), instance.log_end()
                for name, pid in process_ids(instance).items():
                    check(name.rstrip("0123456789"), said_of(pid), mine)
                    checked += 1
                before = process_ids(instance)
                for victim in victims:
                    kill(before[victim])
                assert eventually(lambda: len(process_ids(instance)) == 4, 20.0)
                assert eventually(lambda: enforcing(instance.state), 20.0), instance.log_end()
            status = read_status(str(instance.state))
            limits = {"capabilities", "seccomp"} | ({"user"} if users_can_be_had() else set())
            assert [set(worker.confined) for worker in status.workers] == [limits] * 2
            assert bool(status.unconfined) is not users_can_be_had()
    figure(
        "rights",
        f"{checked} of {checked} processes have the capabilities, user and filter of their kind "
        f"({'workers of a user of their own' if users_can_be_had() else 'one user in this namespace'})",
    )


def reached(server: CountingServer, goal: int) -> bool:
    return server.accepted >= goal


def check(kind: str, said: dict[str, str], mine: dict[str, str]) -> None:
    keeps = f"{EXPECTED[kind]:016x}"
    assert {name: said[name] for name in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb", "NoNewPrivs")} == {
        **dict.fromkeys(("CapEff", "CapPrm", "CapBnd"), keeps),
        **dict.fromkeys(("CapInh", "CapAmb"), f"{0:016x}"),
        "NoNewPrivs": "1",
    }, kind
    filters = int(mine["Seccomp_filters"])
    if kind == "worker":
        assert (said["Seccomp"], int(said["Seccomp_filters"])) == ("2", filters + 1)
    else:
        assert (said["Seccomp"], int(said["Seccomp_filters"])) == (mine["Seccomp"], filters)
    if kind == "worker" and users_can_be_had():
        assert (said["Uid"].split(), said["Gid"].split(), said["Groups"]) == ([WORKER_ID] * 4, [WORKER_ID] * 4, "")
    else:
        assert (said["Uid"], said["Gid"]) == (mine["Uid"], mine["Gid"])


def enforcing(state: Path) -> bool:
    try:
        status = read_status(str(state))
    except Exception:  # noqa: BLE001 - not yet
        return False
    return status.phase == "enforcing" and all(worker.alive and worker.confined for worker in status.workers)
