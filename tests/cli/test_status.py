"""`pellucid status`: its screen, its JSON and its exit status, against an agent's socket."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from pellucid_cli.main import main
from pellucid_proxy.agent.status import NodeStatus, WorkerStatus, serve_status

GOOD = NodeStatus(
    version="0.1.0",
    node="n1",
    pid=42,
    phase="enforcing",
    revision="5f2c9e1",
    source="folder",
    folder="/etc/pellucid",
    problems=(),
    workers=(WorkerStatus(0, True, "5f2c9e1", 3), WorkerStatus(1, True, "5f2c9e1", 4)),
    connections=7,
    groups=2,
    pods=3,
    policies=("TransparentPolicy shop/cart",),
    scope=("10.244.1.0/24",),
    listen=("127.0.0.1:15001",),
    engine_form="compiled",
    uptime_s=3720.0,
    last_apply_s=0.042,
    flows="/var/log/flows.json",
    flows_dropped=2,
    metrics="127.0.0.1:9090",
)
STARTING = msgspec.structs.replace(GOOD, phase="starting")
BAD_FOLDER = msgspec.structs.replace(GOOD, source="last-good", problems=("a.yaml:3: spec.rules: is missing; write it",))
LAGGING = msgspec.structs.replace(GOOD, workers=(GOOD.workers[0], WorkerStatus(1, True, "before", 4)))
AWAY = msgspec.structs.replace(GOOD, workers=(GOOD.workers[0], WorkerStatus(1, False, None, None)))


@contextmanager
def agent(state: Path, answers: Sequence[NodeStatus]) -> Iterator[None]:
    """An agent's status socket that gives one answer after the other, and then the last one for ever."""
    left = list(answers)
    started = threading.Event()
    stop: asyncio.Event
    loop: asyncio.AbstractEventLoop

    async def status() -> NodeStatus:
        return left.pop(0) if len(left) > 1 else left[0]

    async def serve() -> None:
        nonlocal stop, loop
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        async with await serve_status(str(state), status):
            started.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    started.wait(10)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


def status(state: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["status", "--state", str(state), *arguments])


@pytest.mark.parametrize(
    ("answer", "exit_status", "first"),
    [
        (GOOD, 0, "Enforcing /etc/pellucid"),
        (STARTING, 1, "Not enforcing: starting"),
        (BAD_FOLDER, 1, "Enforcing the last good policy: what /etc/pellucid holds is refused"),
        (LAGGING, 1, "Enforcing, but not every worker has this policy"),
        (AWAY, 1, "Enforcing, but not every worker has this policy"),
    ],
    ids=["enforcing", "starting", "bad folder", "a worker lags", "a worker is away"],
)
def test_the_first_line_and_the_exit_status_say_whether_the_folder_is_enforced(
    tmp_path: Path, answer: NodeStatus, exit_status: int, first: str
) -> None:
    with agent(tmp_path, [answer]):
        shown = status(tmp_path)
    assert (shown.exit_code, shown.stdout.splitlines()[0]) == (exit_status, first)


def test_one_screen_holds_what_an_operator_asks_first(tmp_path: Path) -> None:
    with agent(tmp_path, [BAD_FOLDER]):
        lines = status(tmp_path).stdout.splitlines()
    assert len(lines) <= 24
    assert all(len(line) <= 100 for line in lines)
    for said in (
        "node        n1, process 42, up 1 h 2 min",
        "version     0.1.0, engine compiled",
        "revision    5f2c9e1 from last-good, enforced 42 ms after it was written",
        "workers     0: 3 connections, 1: 4 connections",
        "flows       /var/log/flows.json, 2 dropped",
        "  TransparentPolicy shop/cart",
        "  a.yaml:3: spec.rules: is missing; write it",
    ):
        assert said in lines


def test_a_limit_that_is_near_is_told_though_all_is_enforced(tmp_path: Path) -> None:
    near = "worker 0 holds 95 of 100 connections; further ones wait. Cure: more workers"
    with agent(tmp_path, [msgspec.structs.replace(GOOD, strains=(near,))]):
        shown = status(tmp_path)
    assert shown.exit_code == 0
    assert shown.stdout.splitlines()[-2:] == ["limits", f"  {near}"]


def test_json_is_the_agents_answer(tmp_path: Path) -> None:
    with agent(tmp_path, [GOOD]):
        shown = status(tmp_path, "-o", "json")
    assert shown.exit_code == 0
    assert msgspec.json.decode(shown.stdout, type=NodeStatus) == GOOD


def test_wait_asks_until_it_enforces(tmp_path: Path) -> None:
    with agent(tmp_path, [STARTING, LAGGING, GOOD]):
        assert status(tmp_path, "--wait", "30").exit_code == 0


def test_wait_ends_with_what_it_found_last(tmp_path: Path) -> None:
    with agent(tmp_path, [STARTING]):
        assert status(tmp_path, "--wait", "0.2").exit_code == 1


@pytest.mark.parametrize("wait", ["0", "0.2"])
def test_no_instance_is_status_2_with_a_cure(tmp_path: Path, wait: str) -> None:
    shown = status(tmp_path, "--wait", wait)
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert shown.stderr.startswith(f"Error: {tmp_path}: ")
    assert "Cure: start `pellucid run`" in shown.stderr


def test_no_instance_is_json_where_json_was_asked_for(tmp_path: Path) -> None:
    shown = status(tmp_path / "none", "-o", "json")
    assert shown.exit_code == 2
    assert "no pellucid runs" in json.loads(shown.stdout)["error"]
