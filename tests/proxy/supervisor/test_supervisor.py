"""A run as a transcript: what the supervisor does when children and people do what they do. Agent and workers are fakes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pellucid_proxy.supervisor.backoff import AT_ONCE

ROOT = Path(__file__).resolve().parents[3]
PATIENCE_S = 20.0

DRIVER = """
import os, socket, sys
from pellucid_proxy.supervisor import main, successor
from pellucid_proxy.supervisor.main import Parts, run
from pellucid_proxy.supervisor.options import RunOptions
def open_listeners(settings):
    listener = socket.create_server(("127.0.0.1", 0))
    return (listener,)
main.AGENT_GRACE_S = float(os.environ.get("AGENT_GRACE_S", main.AGENT_GRACE_S))
parts = Parts("tests.proxy.supervisor.fake_agent", "tests.proxy.supervisor.fake_worker", open_listeners)
if "FAULT_AT_HUP" in os.environ:
    main.Supervisor._tell_agent = lambda self, message, descriptors=None, tell=main.Supervisor._tell_agent: (
        1 / 0 if "Reopen" in str(message) else tell(self, message, descriptors))
successor.YIELD_S = float(os.environ.get("YIELD_S", successor.YIELD_S))
successor.TAKE_S = float(os.environ.get("TAKE_S", successor.TAKE_S))
options = RunOptions(
    policy="none", state=sys.argv[1], flows=sys.argv[2] or None, drain_s=float(sys.argv[3]), takeover="TAKEOVER" in os.environ,
    instance=os.environ.get("POD", ""), cluster="POD" in os.environ,
)
sys.exit(run(options, parts))
"""


class Run:
    """One supervisor, in a process of its own. lines: what its children told so far; errors: its log, once it has ended."""

    def __init__(self, state: Path, behaviour: dict[str, str], flows: str = "", drain_s: float = 0.5) -> None:
        self._log = tempfile.TemporaryFile("a+b", dir=state.parent)  # noqa: SIM115  closed by close()
        self._process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(state), flows, str(drain_s)],
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)])} | behaviour,
            cwd=ROOT,
        )
        self.pid = self._process.pid
        self.lines: list[str] = []

    def until(self, pattern: str, times: int = 1) -> re.Match[str]:
        """The match of the line that makes pattern seen so often."""
        assert self._process.stdout is not None
        seen = [found for found in map(re.compile(pattern).search, self.lines) if found]
        while len(seen) < times:
            line = self._process.stdout.readline().decode().strip()
            assert line, f"ended without {pattern}: {self.lines} {self.errors}"
            self.lines.append(line)
            found = re.search(pattern, line)
            if found:
                seen.append(found)
        return seen[times - 1]

    def until_ready(self) -> None:
        self.until("agent got WorkerStarted", times=2)
        self.until("worker . up", times=2)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def status(self) -> int:
        assert self._process.stdout is not None
        self.lines += self._process.stdout.read().decode().splitlines()  # until the last child is gone, too
        return self._process.wait(PATIENCE_S)

    @property
    def errors(self) -> str:
        return os.pread(
            self._log.fileno(), 1 << 20, 0
        ).decode()  # not from the offset, which those who write have as well

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()


class Runs:
    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self._all: list[Run] = []

    def start(self, flows: str = "", drain_s: float = 0.5, **behaviour: str) -> Run:
        run = Run(self.state, behaviour, flows, drain_s)
        self._all.append(run)
        return run

    def close(self) -> None:
        for run in self._all:
            run.close()


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    made = Runs(tmp_path)
    yield made
    made.close()


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has reaped yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_first_signal_drains_and_second_ends_at_once(runs: Runs) -> None:
    run = runs.start(drain_s=300)
    run.until_ready()
    wait_until_logged(run, "enforcing revision rev-1")
    run.signal(signal.SIGTERM)
    run.until(r"agent got Stop\(drain_s=300.0, keep_rules=False")
    run.signal(signal.SIGINT)
    run.until(r"agent got Stop\(drain_s=0.0, keep_rules=False")
    assert run.status() == 0


def test_a_signal_before_it_enforces_ends_at_once(runs: Runs) -> None:
    run = runs.start(FAKE_AGENT="unready", drain_s=300)
    run.until_ready()
    run.signal(signal.SIGINT)
    run.until(r"agent got Stop\(drain_s=0.0, keep_rules=False")
    assert run.status() == 0


def test_what_does_not_end_in_time_is_killed(runs: Runs) -> None:
    run = runs.start(FAKE_AGENT="hangs", AGENT_GRACE_S="0.1")
    run.until_ready()
    wait_until_logged(run, "enforcing revision rev-1")
    run.signal(signal.SIGTERM)
    assert run.status() == 1
    assert re.search(r"agent, process \d+, does not end; killing it", run.errors)


@pytest.mark.parametrize(("agent", "supervisor"), [(1, 1), (2, 2), (3, 3), (0, 1), (77, 1)])
def test_what_the_agent_refuses_at_the_start_is_the_exit_status(runs: Runs, agent: int, supervisor: int) -> None:
    assert runs.start(FAKE_AGENT=f"exit {agent}").status() == supervisor


def test_a_dead_worker_is_started_again_and_the_agent_gets_its_new_ends(runs: Runs) -> None:
    run = runs.start(flows="records")
    run.until_ready()
    wait_until_logged(run, "enforcing revision rev-1")
    for ends in (1, 2):
        os.kill(int(run.until(r"worker 1 up (\d+)", times=ends)[1]), signal.SIGKILL)
        run.until(rf"agent got WorkerStarted\(index=1, has_flows=True, ends={ends}, leaving=False\) and 2 descriptors")
    run.until("worker 1 up", times=3)
    run.signal(signal.SIGTERM)
    run.until("agent got Stop")
    assert "worker 1, process" in run.errors
    assert "was killed by SIGKILL; it is started again" in run.errors


def test_a_dead_agent_is_started_again_and_told_of_the_workers_that_run(runs: Runs) -> None:
    run = runs.start(FAKE_AGENT="dies")
    workers = [int(run.until(rf"worker {index} up (\d+)")[1]) for index in range(2)]
    wait_until_logged(run, "enforcing revision rev-1")
    run.signal(signal.SIGHUP)
    run.until("agent up", times=2)
    run.until(r"agent got WorkerStarted\(index=\d, has_flows=True, ends=0, leaving=False\) and 2 descriptors", times=4)
    assert not any(gone(pid) for pid in workers)
    assert "was killed by SIGKILL; it is started again" in run.errors
    run.signal(signal.SIGTERM)
    run.until(r"agent got Stop\(drain_s=0.5, keep_rules=False")


def test_a_worker_that_dies_before_the_policy_is_enforced_ends_the_run_and_the_rules_stay(runs: Runs) -> None:
    run = runs.start(FAKE_AGENT="unready", FAKE_WORKER="dies")
    run.until(r"agent got Stop\(drain_s=0.0, keep_rules=True")
    assert run.status() == 1
    assert re.search(r"worker 1, process \d+, was killed by SIGSEGV", run.errors)
    assert "it was not enforcing yet" in run.errors


def test_nothing_outlives_a_killed_guardian(runs: Runs) -> None:
    run = runs.start()
    run.until_ready()
    run.signal(signal.SIGKILL)
    run.status()  # its end of the children's standard output closes only when all of them are gone


def test_workers_get_listeners_and_a_pipe_though_no_file_is_asked_for_and_the_agent_their_other_ends(
    runs: Runs,
) -> None:
    run = runs.start()
    run.until_ready()
    assert run.until("worker 0 up")[0]
    assert [line.partition(" node ")[2] for line in sorted(run.lines) if line.startswith("worker")] == [
        "node-1 listening [1] flows True",
        "node-1 listening [1] flows True",
    ]
    run.until(r"agent got WorkerStarted\(index=1, has_flows=True, ends=0, leaving=False\) and 2 descriptors")


def test_sighup_reopens_the_flow_file(runs: Runs) -> None:
    run = runs.start()
    run.until_ready()
    run.signal(signal.SIGHUP)
    run.until(r"agent got ReopenFlows\(\)")


def test_a_terminals_interrupt_does_not_reach_the_children(runs: Runs) -> None:
    assert runs.start().until("agent up .* group (.*)")[1] == "True"


def test_a_second_instance_is_refused_and_names_the_first(runs: Runs) -> None:
    first = runs.start()
    first.until_ready()
    second = runs.start()
    assert second.status() == 1
    assert f"pellucid already runs with {runs.state}, as process {first.pid}" in second.errors
    assert not any("agent up" in line for line in second.lines)


def test_the_lock_of_a_killed_instance_holds_nobody_off(runs: Runs) -> None:
    first = runs.start()
    first.until_ready()
    first.signal(signal.SIGKILL)
    first.status()
    runs.start().until_ready()


def test_a_killed_supervisor_is_replaced_with_the_same_listeners_and_lock(runs: Runs) -> None:
    run = enforcing(runs, flows="records")
    first, agent = supervisor_of(run), int(run.until(r"agent up (\d+)")[1])
    workers = [int(run.until(rf"worker {index} up (\d+)")[1]) for index in range(2)]
    os.kill(first, signal.SIGKILL)
    run.until("agent up", times=2)
    run.until(r"agent got WorkerStarted\(index=\d, has_flows=True, ends=0, leaving=False\)", times=4)
    assert run.until(r"worker 1 up \d+ (.*)", times=2)[1] == "node node-1 listening [1] flows True"
    assert all(map(gone, [first, agent, *workers]))
    assert "supervisor was killed by SIGKILL; it is started again, with its processes" in run.errors
    assert runs.start().status() == 1, "the lock went along"
    assert (runs.state / "lock").read_text().split()[0] == str(run.pid)
    run.signal(signal.SIGTERM)
    run.until(r"agent got Stop\(drain_s=0.5, keep_rules=False")


def test_a_supervisor_killed_before_it_enforces_ends_the_run(runs: Runs) -> None:
    run = runs.start(FAKE_AGENT="unready")
    run.until_ready()
    os.kill(supervisor_of(run), signal.SIGKILL)
    assert run.status() == 1
    assert "supervisor was killed by SIGKILL, and was not enforcing yet or no more" in run.errors
    assert sum("agent up" in line for line in run.lines) == 1


def test_a_supervisor_killed_while_it_stops_is_replaced_by_one_that_stops(runs: Runs) -> None:
    """The rules have to go, and the first one's agent did not come to it."""
    run = enforcing(runs, drain_s=300)
    run.signal(signal.SIGTERM)
    run.until(r"agent got Stop\(drain_s=300.0, keep_rules=False")
    os.kill(supervisor_of(run), signal.SIGKILL)
    run.until(r"agent got Stop\(drain_s=300.0, keep_rules=False", times=2)
    run.signal(signal.SIGINT)
    run.until(r"agent got Stop\(drain_s=0.0, keep_rules=False")
    assert run.status() == 0


def test_a_supervisor_that_cannot_live_is_started_ever_later(runs: Runs) -> None:
    """Who asks for the end in between does not wait for the next start."""
    run = enforcing(runs, drain_s=0.0)
    for ends in range(1, AT_ONCE + 3):
        os.kill(supervisor_of(run), signal.SIGKILL)
        if ends < AT_ONCE + 2:
            run.until("agent up", times=ends + 1)
            wait_until_logged(run, "enforcing revision rev-1", times=ends + 1)
    wait_until_logged(run, "it is started again in 0.4 s")
    run.signal(signal.SIGTERM)
    run.until("agent got Stop")
    assert run.status() == 0


def test_a_fault_of_the_supervisor_is_a_crash(runs: Runs) -> None:
    run = enforcing(runs, FAULT_AT_HUP="1")
    run.signal(signal.SIGHUP)
    run.until("agent up", times=2)
    wait_until_logged(run, "a fault of the supervisor")
    assert "supervisor exited with status 70; it is started again" in run.errors


def test_another_instance_that_has_taken_over_is_not_disturbed(runs: Runs) -> None:
    run = enforcing(runs)
    (runs.state / "lock").write_text("4711\n")  # as the successor does when the rules are its own
    os.kill(supervisor_of(run), signal.SIGKILL)
    assert run.status() == 0
    assert "another instance has taken over meanwhile" in run.errors
    assert sum("agent up" in line for line in run.lines) == 1


def enforcing(runs: Runs, flows: str = "", drain_s: float = 0.5, **behaviour: str) -> Run:
    run = runs.start(flows, drain_s, **behaviour)
    run.until_ready()
    wait_until_logged(run, "enforcing revision rev-1")
    return run


def supervisor_of(run: Run) -> int:
    """The process whose children are agent and workers."""
    while True:
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        if children and not gone(int(children[0])):
            return int(children[0])
        os.sched_yield()


def wait_until_logged(run: Run, text: str, times: int = 1) -> None:
    """The log is a file: look until it says text so often. Ends with the test's own time limit."""
    while run.errors.count(text) < times:
        os.sched_yield()
