"""What each process of a running instance may do, as the kernel says it of them."""

from __future__ import annotations

import os
import shlex
import subprocess
from functools import partial
from pathlib import Path

from pellucid_proxy.agent.status import read_status

from ..world import eventually
from .conftest import Figure
from .stage import CountingServer, Load, Stage, kill, policy, process_ids

KILL, SETGID, SETUID, SETPCAP, NET_ADMIN, NET_RAW = (1 << bit for bit in (5, 6, 7, 8, 12, 13))  # linux/capability.h
EXPECTED = {
    "guardian": KILL | SETGID | SETUID | SETPCAP | NET_ADMIN | NET_RAW,
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
    """Under load, and again after an agent and a worker, and then the supervisor, were killed and started again."""
    mine = said_of(os.getpid())
    checked = 0
    with Stage(tmp_path, pods=("a",)) as stage, CountingServer(stage["web"], 80) as server:
        stage.write("policy.yaml", policy(RULES))
        with stage.run("--workers", "2") as instance, Load(stage["a"], stage["web"].addresses, 80, "web"):
            for victims in (("agent", "worker0"), ("supervisor",), ()):
                goal = server.accepted + 20
                assert eventually(partial(reached, server, goal), 20.0), instance.log_end()
                for name, pid in process_ids(instance).items():
                    check(name.rstrip("0123456789"), said_of(pid), mine)
                    checked += 1
                before = process_ids(instance)
                for victim in victims:
                    kill(before[victim])
                assert eventually(lambda: len(process_ids(instance)) == 5, 20.0)
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


def test_workers_are_whose_they_are_told_to_be(tmp_path: Path) -> None:
    """In a namespace without that user the start is refused: it was asked for."""
    with Stage(tmp_path, pods=("a",)) as stage:
        stage.write("policy.yaml", policy(RULES))
        if not users_can_be_had():
            done = stage.node.run(stage.command("--worker-user", "4242:4343", state=tmp_path / "state"), check=False)
            assert (done.returncode, "has no uid 4242; name one that it has" in done.stderr) == (3, True)
            return
        with stage.run("--worker-user", "4242:4343", "--workers", "1") as instance:
            said = said_of(process_ids(instance)["worker0"])
            assert (said["Uid"].split(), said["Gid"].split()) == (["4242"] * 4, ["4343"] * 4)
            assert read_status(str(instance.state)).worker_user == (4242, 4343)


def test_root_that_cannot_give_workers_a_user_is_refused(tmp_path: Path) -> None:
    """Without SETUID; where there is no user to give, it is not needed."""
    with Stage(tmp_path, pods=("a",)) as stage:
        stage.write("policy.yaml", policy(RULES))
        command = ["setpriv", "--bounding-set=-setuid", *stage.command(state=tmp_path / "state")]
        if users_can_be_had():
            done = stage.node.run(command, check=False)
            assert (done.returncode, "root needs SETUID; add them" in done.stderr) == (3, True), done.stderr
            command += ["--worker-user", "same"]
        said, unconfined = stopped_once_it_enforces(stage, command, tmp_path / "state")
        assert "workers are not confined by all they could be: user: " in said
        assert len(unconfined) == 1 and unconfined[0].startswith("user: ")


def test_a_namespace_of_one_user_is_no_secret(tmp_path: Path) -> None:
    """As an ordinary user runs it: log and status say that workers have no user of their own, and why."""
    with Stage(tmp_path, pods=("a",)) as stage:
        stage.write("policy.yaml", policy(RULES))
        run = shlex.join(stage.command("--metrics", "127.0.0.1:9090", state=tmp_path / "state"))
        command = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", f"ip link set lo up && exec {run}"]
        said, unconfined = stopped_once_it_enforces(stage, command, tmp_path / "state")
        assert unconfined == ("user: this user namespace has no uid 61001",)
        assert f"workers are not confined by all they could be: {unconfined[0]}" in said


def stopped_once_it_enforces(stage: Stage, command: list[str], state: Path) -> tuple[str, tuple[str, ...]]:
    """What a run said, and what it told its status to lack."""
    child = stage.node.popen(command, stderr=subprocess.PIPE, env=dict(os.environ))
    try:
        found = eventually(partial(enforcing, state), 20.0)
        unconfined = read_status(str(state)).unconfined if found else ()
    finally:
        child.terminate()
        _, said = child.communicate(timeout=20)
    assert found, said.decode()
    return said.decode(), unconfined


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
