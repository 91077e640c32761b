"""A whole agent, with fake workers and a fake kernel: from a folder to enforcement, and what it says on the way."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
import uvloop

from pellucid_policy.compile import PolicySet
from pellucid_proxy.agent import last_good
from pellucid_proxy.agent.main import Node, serve
from pellucid_proxy.agent.status import NodeStatus, NotRunning, read_status
from pellucid_proxy.settings import NodeSettings
from pellucid_proxy.supervisor.children import flow_pipe, seqpacket_pair
from pellucid_proxy.supervisor.messages import (
    MAX_PACKET,
    AgentConfig,
    Configured,
    Enforced,
    Ready,
    ReopenFlows,
    Stop,
    ToAgent,
    ToSupervisor,
    WorkerStarted,
)
from pellucid_proxy.supervisor.options import BAD_POLICY, FAILED, REFUSED, STOPPED, Refusal, RunOptions
from pellucid_proxy.worker_config import read_memfd

from .fakes import FakeRules, FakeWorker, eventually

POLICY = """
apiVersion: pellucid.dev/v1alpha1
kind: TransparentPolicy
metadata: {name: web, namespace: default}
spec:
  podSelector: {}
  rules:
  - name: bad
    match: {destinations: [{domain: NAME}]}
    action: Block
"""
PROXY = """
apiVersion: pellucid.dev/v1alpha1
kind: TransparentProxy
metadata: {name: default}
spec: {podCIDRs: [192.0.2.0/24], workers: WORKERS}
"""


class Play:
    """The supervisor's side of one agent's life. log: what workers and kernel did, in order."""

    def __init__(self, folder: Path) -> None:
        self.policy = folder / "policy"
        self.state = folder / "state"
        self.policy.mkdir(exist_ok=True)
        self.state.mkdir(exist_ok=True)
        self.log: list[str] = []
        self.rules = FakeRules(self.log)
        self.fakes: list[FakeWorker] = []
        self.flow_ends: list[int] = []
        self.options = RunOptions(policy=str(self.policy), state=str(self.state), node="node-1")
        self.refusal: Refusal | None = None
        self.status: int | None = None
        self.enforced: list[PolicySet] = []
        """What the supervisor was given for workers that start without an agent."""

    def write(self, name: str = "bad.example", workers: int = 2) -> None:
        """Replace the whole policy at once."""
        for file, text in (("policy", POLICY.replace("NAME", name)), ("proxy", PROXY.replace("WORKERS", str(workers)))):
            temporary = self.policy / f".{file}"
            temporary.write_text(text)
            temporary.rename(self.policy / f"{file}.yaml")

    def run(self, body: Callable[[Play], Awaitable[None]]) -> int:
        """The agent's exit status, after body has played its part."""
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(self._run(body))

    async def _run(self, body: Callable[[Play], Awaitable[None]]) -> int:
        theirs, self._channel = seqpacket_pair()
        config = AgentConfig(self.options, theirs.detach(), os.getpid())
        node = Node(self._preflight, lambda: (b"\x7f\0\0\1",), lambda settings, folder: self.rules)
        self._agent = asyncio.create_task(serve(config, node))
        try:
            async with asyncio.timeout(30):
                await body(self)
                return await self._agent
        finally:
            self._channel.close()
            for fake in self.fakes:
                fake.die()
            for fd in self.flow_ends:
                os.close(fd)

    def _preflight(self, settings: NodeSettings) -> None:
        if self.refusal is not None:
            raise self.refusal

    async def receive(self) -> ToSupervisor | None:
        """The agent's next message, not counting Enforced; None once it has ended."""
        while True:
            await readable(self._channel)
            packet, descriptors, _, _ = socket.recv_fds(self._channel, MAX_PACKET, 1)
            message = msgspec.msgpack.decode(packet, type=ToSupervisor) if packet else None
            if not isinstance(message, Enforced):
                return message
            self.enforced.append(msgspec.msgpack.decode(read_memfd(descriptors[0], message.size), type=PolicySet))
            assert self.enforced[-1].revision == message.revision
            os.close(descriptors[0])

    def send(self, message: ToAgent, descriptors: list[int] | None = None) -> None:
        socket.send_fds(self._channel, [msgspec.msgpack.encode(message)], descriptors or [])

    async def start_workers(self) -> Configured:
        configured = await self.receive()
        assert isinstance(configured, Configured)
        for index in range(configured.settings.workers):
            fake = FakeWorker(self.log, f"worker {index}")
            self.fakes.append(fake)
            descriptors = [fake.control.fileno()]
            if self.options.flows is not None:
                read_end, write_end = flow_pipe()
                self.flow_ends.append(write_end)
                descriptors.append(read_end)
            self.send(WorkerStarted(index, self.options.flows is not None), descriptors)
            fake.control.close()
            for fd in descriptors[1:]:
                os.close(fd)
        return configured

    async def until_ready(self) -> str:
        await self.start_workers()
        ready = await self.receive()
        assert isinstance(ready, Ready)
        assert self.enforced[-1].revision == ready.revision
        return ready.revision

    async def told(self) -> NodeStatus:
        return await asyncio.to_thread(read_status, str(self.state))

    async def until(self, holds: Callable[[NodeStatus], bool]) -> NodeStatus:
        """The first status that holds; the play's time limit ends waiting."""
        while True:
            status = await self.told()
            if holds(status):
                return status


@pytest.fixture
def play(tmp_path: Path) -> Play:
    made = Play(tmp_path)
    made.write()
    return made


async def stop(play: Play) -> None:
    play.send(Stop(0.0))


def test_the_node_is_held_then_workers_then_kernel_then_ready_and_all_is_undone_at_the_end(play: Play) -> None:
    async def body(play: Play) -> None:
        configured = await play.start_workers()
        assert (configured.settings.scope, configured.node, configured.node_addresses) == (
            ("192.0.2.0/24",),
            "node-1",
            (b"\x7f\0\0\1",),
        )
        ready = await play.receive()
        assert isinstance(ready, Ready)
        status = await play.told()
        assert (status.phase, status.revision, status.problems, status.source) == (
            "enforcing",
            ready.revision,
            (),
            "folder",
        )
        assert [(worker.alive, worker.revision, worker.connections) for worker in status.workers] == [
            (True, ready.revision, 1)
        ] * 2
        assert (status.connections, status.groups, status.policies) == (2, 1, ("TransparentPolicy default/web",))
        play.log.append("ready")
        await stop(play)

    assert play.run(body) == STOPPED
    revision = last_good.load(str(play.state)).policy.revision
    assert play.log == [
        "kernel has hold",
        f"worker 0 takes {revision}",
        f"worker 1 takes {revision}",
        "kernel has rules",
        "ready",
        "worker 0 drains 0",
        "worker 1 drains 0",
        "kernel has nothing",
    ]
    with pytest.raises(NotRunning, match="no pellucid runs with this state folder"):
        read_status(str(play.state))


def test_draining_takes_nothing_new_then_waits_for_the_workers(play: Play) -> None:
    async def body(play: Play) -> None:
        await play.until_ready()
        play.log.clear()
        play.send(Stop(20.0))

    assert play.run(body) == STOPPED
    assert play.log == ["kernel has drain", "worker 0 drains 20", "worker 1 drains 20", "kernel has nothing"]


def test_a_second_word_cuts_the_drain_short(play: Play) -> None:
    async def body(play: Play) -> None:
        await play.until_ready()
        play.fakes[0].answers = False  # it has connections that do not end
        play.send(Stop(3600.0))
        await play.until(lambda status: not status.workers[1].alive)
        play.send(Stop(0.0))

    assert play.run(body) == STOPPED
    assert play.log[-1] == "kernel has nothing"


def test_after_a_failure_the_rules_stay(play: Play) -> None:
    async def body(play: Play) -> None:
        await play.until_ready()
        play.send(Stop(0.0, keep_rules=True))

    assert play.run(body) == STOPPED
    assert "kernel has nothing" not in play.log


def test_the_rules_stay_when_the_supervisor_is_gone(play: Play) -> None:
    async def body(play: Play) -> None:
        await play.until_ready()
        play._channel.close()

    play.run(body)
    assert "kernel has nothing" not in play.log


def test_an_edit_is_enforced_on_workers_and_kernel_and_timed(play: Play) -> None:
    async def body(play: Play) -> None:
        first = await play.until_ready()
        play.write("worse.example")
        status = await play.until(lambda status: status.revision != first)
        assert status.last_apply_s is not None
        assert 0 < status.last_apply_s < 1
        assert (status.problems, [worker.revision for worker in status.workers]) == ((), [status.revision] * 2)
        await stop(play)
        assert await play.receive() is None
        assert [policy.revision for policy in play.enforced] == [first, status.revision]

    assert play.run(body) == STOPPED


def test_a_bad_edit_is_told_with_file_line_and_path_and_changes_nothing(play: Play) -> None:
    async def body(play: Play) -> None:
        first = await play.until_ready()
        happened = len(play.log)
        (play.policy / "extra.yaml").write_text(POLICY.replace("action: Block", "action: Blok"))
        status = await play.until(lambda status: bool(status.problems))
        assert f"{play.policy}/extra.yaml:10: spec.rules[0].action: 'Blok' is not allowed" in status.problems[0]
        assert (status.revision, len(play.log)) == (first, happened)
        (play.policy / "extra.yaml").unlink()
        await play.until(lambda status: not status.problems)
        assert len(play.log) == happened
        await stop(play)

    assert play.run(body) == STOPPED


def test_a_folder_that_goes_away_leaves_the_last_good_policy(play: Play) -> None:
    async def body(play: Play) -> None:
        first = await play.until_ready()
        play.policy.rename(play.policy.with_name("away"))
        status = await play.until(lambda status: bool(status.problems))
        assert ("No such file or directory" in status.problems[0], status.revision) == (True, first)
        await stop(play)

    assert play.run(body) == STOPPED


def test_a_fault_of_ours_in_judging_a_folder_costs_that_edit_only(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(play: Play) -> None:
        first = await play.until_ready()

        def broken(files: object) -> None:
            raise RecursionError("too deep")

        monkeypatch.setattr("pellucid_proxy.agent.policy.parse_files", broken)
        play.write("worse.example")
        status = await play.until(lambda status: bool(status.problems))
        assert (status.revision, "through a fault of pellucid (RecursionError('too deep'))" in status.problems[0]) == (
            first,
            True,
        )
        await stop(play)

    assert play.run(body) == STOPPED


def test_what_cannot_change_live_needs_a_restart_and_the_rest_of_the_edit_waits_too(play: Play) -> None:
    async def body(play: Play) -> None:
        first = await play.until_ready()
        play.write("worse.example", workers=3)
        status = await play.until(lambda status: bool(status.problems) and "workers" in status.problems[0])
        assert status.problems == ("workers: is 2, 3 is asked for; needs a restart of pellucid run",)
        assert status.revision == first
        await stop(play)

    assert play.run(body) == STOPPED


def test_what_a_worker_refuses_is_tried_again_though_nothing_changes(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pellucid_proxy.agent.main.RETRY_S", 0.1)

    async def body(play: Play) -> None:
        first = await play.until_ready()
        play.fakes[1].refuses = lambda revision: "" if revision == first else "no memory"
        play.write("worse.example")
        status = await play.until(lambda status: bool(status.problems))
        assert (status.problems, status.revision) == (("worker 1: no memory",), first)
        play.fakes[1].refuses = lambda revision: ""
        await play.until(lambda status: status.revision != first and not status.problems)
        await stop(play)

    assert play.run(body) == STOPPED


def test_a_bad_folder_at_the_start_is_refused_and_nothing_is_touched(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    (play.policy / "extra.yaml").write_text("kind: [")

    async def body(play: Play) -> None:
        assert await play.receive() is None

    assert play.run(body) == BAD_POLICY
    assert f"{play.policy}/extra.yaml:2: is not YAML" in caplog.text
    assert "no last good policy can stand in" in caplog.text
    assert play.log == []


def test_a_bad_folder_at_the_start_gives_way_to_the_last_good_policy(play: Play) -> None:
    async def once(play: Play) -> None:
        await play.until_ready()
        await stop(play)

    async def again(play: Play) -> None:
        revision = await play.until_ready()
        status = await play.told()
        assert (status.revision, status.source, bool(status.problems)) == (revision, "last-good", True)
        assert revision == last_good.load(str(play.state)).policy.revision
        (play.policy / "extra.yaml").unlink()
        await play.until(lambda status: status.source == "folder" and not status.problems)
        await stop(play)

    assert play.run(once) == STOPPED
    (play.policy / "extra.yaml").write_text("kind: [")
    assert play.run(again) == STOPPED


def test_what_preflight_refuses_is_the_exit_status_and_nothing_is_touched(play: Play) -> None:
    play.refusal = Refusal("settings.marks: taken; give others", REFUSED)

    async def body(play: Play) -> None:
        assert await play.receive() is None

    assert play.run(body) == REFUSED
    assert play.log == []


def test_a_policy_that_no_worker_takes_at_the_start_ends_the_run_and_leaves_nothing(play: Play) -> None:
    async def body(play: Play) -> None:
        configured = asyncio.create_task(play.start_workers())
        await configured
        for fake in play.fakes:
            fake.refuses = lambda revision: "no memory"
        assert await play.receive() is None

    assert play.run(body) == FAILED
    assert play.log[-1] == "kernel has nothing"


def test_metrics_of_all_processes_come_from_one_endpoint_and_health_from_the_next(play: Play) -> None:
    play.options = msgspec.structs.replace(play.options, metrics="127.0.0.1:0")

    async def body(play: Play) -> None:
        await play.until_ready()
        play.fakes[1].answers = False
        port = await asyncio.to_thread(listening_port)
        metrics = await asyncio.to_thread(get, f"http://127.0.0.1:{port}/metrics")
        assert "pellucid_connections_active 1.0" in metrics
        assert 'pellucid_worker_up{worker="0"} 1.0' in metrics
        assert 'pellucid_worker_up{worker="1"} 0.0' in metrics
        assert 'pellucid_kernel_events_total{event="intercepted"} 3.0' in metrics
        assert 'pellucid_build_info{engine="' in metrics
        (play.policy / "extra.yaml").write_text("kind: [")
        await play.until(lambda status: bool(status.problems))
        assert await asyncio.to_thread(get, f"http://127.0.0.1:{port}/healthz") == "ok\n"
        assert "pellucid_policy_problems 1.0" in await asyncio.to_thread(get, f"http://127.0.0.1:{port}/metrics")
        await stop(play)


def test_a_node_that_does_not_enforce_yet_is_not_healthy(play: Play) -> None:
    play.options = msgspec.structs.replace(play.options, metrics="127.0.0.1:0")

    async def body(play: Play) -> None:
        assert isinstance(await play.receive(), Configured)
        port = await asyncio.to_thread(listening_port)
        with pytest.raises(urllib.error.HTTPError, match="503") as raised:
            await asyncio.to_thread(get, f"http://127.0.0.1:{port}/healthz")
        assert raised.value.read() == b"starting\n"
        raised.value.close()
        await stop(play)

    assert play.run(body) == STOPPED
    assert play.log == []


def test_what_is_not_served_is_not_found(play: Play) -> None:
    play.options = msgspec.structs.replace(play.options, metrics="127.0.0.1:0")

    async def body(play: Play) -> None:
        await play.until_ready()
        port = await asyncio.to_thread(listening_port)
        with pytest.raises(urllib.error.HTTPError, match="404") as raised:
            await asyncio.to_thread(get, f"http://127.0.0.1:{port}/")
        raised.value.close()
        await stop(play)

    assert play.run(body) == STOPPED

    assert play.run(body) == STOPPED


@pytest.mark.parametrize(
    ("address", "status"), [("nonsense", BAD_POLICY), ("127.0.0.1:99999", BAD_POLICY), ("192.0.2.1:9", FAILED)]
)
def test_an_endpoint_that_cannot_be_served_is_refused(
    play: Play, address: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    play.options = msgspec.structs.replace(play.options, metrics=address)

    async def body(play: Play) -> None:
        assert await play.receive() is None

    assert play.run(body) == status
    assert f"--metrics: {address}" in caplog.text


def test_flow_records_go_from_the_pipes_to_the_file_and_on_to_a_new_one(play: Play) -> None:
    path = play.state / "flows.json"
    play.options = msgspec.structs.replace(play.options, flows=str(path))

    async def body(play: Play) -> None:
        await play.until_ready()
        os.write(play.flow_ends[0], b'{"n":1}\n')
        await eventually(lambda: path.read_text() == '{"n":1}\n')
        path.rename(path.with_suffix(".1"))
        play.send(ReopenFlows())
        await eventually(path.exists)
        os.write(play.flow_ends[1], b'{"n":2}\n')
        await stop(play)

    assert play.run(body) == STOPPED
    assert path.read_text() == '{"n":2}\n'


def test_the_status_socket_is_for_its_owner_and_refuses_other_questions(play: Play) -> None:
    def ask(line: bytes) -> dict[str, str]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(10)
            client.connect(str(play.state / "status.sock"))
            client.sendall(line)
            with client.makefile("rb") as answer:
                answered: dict[str, str] = json.loads(answer.read())
                return answered

    async def body(play: Play) -> None:
        await play.until_ready()
        assert stat.S_IMODE((play.state / "status.sock").stat().st_mode) == 0o600
        assert "ask" in (await asyncio.to_thread(ask, b"nonsense\n"))["error"]
        assert "unknown" in (await asyncio.to_thread(ask, b'{"get":"everything"}\n'))["error"]
        assert (await asyncio.to_thread(ask, b'{"get":"status"}\n'))["phase"] == "enforcing"
        await stop(play)

    assert play.run(body) == STOPPED


def test_a_state_folder_with_a_long_name_has_a_status_socket_too(tmp_path: Path) -> None:
    play = Play(tmp_path)
    play.write()
    play.state = tmp_path / ("long" * 40)
    play.state.mkdir()
    play.options = msgspec.structs.replace(play.options, state=str(play.state))

    async def body(play: Play) -> None:
        await play.until_ready()
        assert (await play.told()).phase == "enforcing"
        await stop(play)

    assert play.run(body) == STOPPED


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        text: str = answer.read().decode()
        return text


async def readable(channel: socket.socket) -> None:
    """Something can be read there."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(channel, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(channel)


def listening_port() -> int:
    """The one TCP port on which this process listens."""
    inodes = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            inodes.add(os.readlink(f"/proc/self/fd/{fd}").removeprefix("socket:[").removesuffix("]"))
        except FileNotFoundError:
            continue
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    (port,) = [int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A" and row[9] in inodes]
    return port
