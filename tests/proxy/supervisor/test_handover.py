"""Hand-overs as transcripts: two real supervisors with fake agents and workers, and the messages between them by hand."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from pellucid_proxy.settings import NodeSettings
from pellucid_proxy.supervisor.handover import (
    NAME,
    PROTOCOLS,
    Denied,
    Door,
    Offer,
    OfferedWorker,
    Taken,
    TakeOver,
    Yield,
    Yielded,
    common_protocol,
    take_over,
)
from pellucid_proxy.supervisor.options import Refusal

from .test_supervisor import Run, Runs, gone, wait_until_logged

SETTINGS = NodeSettings(scope=("192.0.2.0/24",))


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    made = Runs(tmp_path)
    yield made
    made.close()


def enforcing(runs: Runs, **behaviour: str) -> Run:
    run = runs.start("records", 0.5, **behaviour)
    run.until_ready()
    wait_until_logged(run, "enforcing revision rev-1")
    return run


def test_agent_ends_workers_and_pipes_go_to_the_successor_and_are_drained(runs: Runs) -> None:
    old = enforcing(runs)
    workers = [int(old.until(rf"worker {index} up (\d+)")[1]) for index in range(2)]
    new = enforcing(runs, TAKEOVER="1")
    old.until(r"agent got Stop\(drain_s=0.0, keep_rules=True, keep_workers=True\)")
    for index in (2, 3):
        new.until(rf"agent got WorkerStarted\(index={index}, has_flows=True, ends=0, leaving=True\) and 2 descriptors")
    for index in (0, 1):
        old.until(rf"worker {index} got Drain\(seconds=86400.0\)")
    assert old.status() == 0
    assert all(map(gone, workers))
    wait_until_logged(new, "has handed over")
    assert (runs.state / "lock").read_text().split()[0] == str(new.pid), "the lock went along"
    third = enforcing(runs, TAKEOVER="1")
    assert new.status() == 0
    third.signal(signal.SIGTERM)
    third.until(r"agent got Stop\(drain_s=0.5, keep_rules=False, keep_workers=False\)")


def test_a_pod_that_has_handed_over_waits_for_its_end(runs: Runs) -> None:
    """Else it would be started again before it is deleted, and take over from the new one."""
    old = enforcing(runs, POD="old", TAKEOVER="1")
    new = enforcing(runs, POD="new", TAKEOVER="1")
    wait_until_logged(old, "handed over; live connections go on here until they end")
    wait_until_logged(old, "has ended its last connection")
    assert not gone(old.pid)
    old.signal(signal.SIGTERM)
    assert old.status() == 0
    new.signal(signal.SIGTERM)
    new.until(r"agent got Stop")


def test_a_pod_that_is_started_again_takes_nothing_back_from_its_successor(runs: Runs) -> None:
    old = enforcing(runs, POD="old", TAKEOVER="1")
    new = enforcing(runs, POD="new", TAKEOVER="1")
    wait_until_logged(old, "handed over; live connections go on here until they end")
    old.signal(signal.SIGKILL)
    again = runs.start(POD="old", TAKEOVER="1")
    wait_until_logged(again, "instance old has handed over to one that runs")
    assert not any("agent got Stop" in line for line in new.lines)
    new.signal(signal.SIGKILL)
    again.until_ready()  # nobody runs any more: somebody has to


def test_who_waits_for_its_successor_ends_when_told_to(runs: Runs) -> None:
    old = enforcing(runs, POD="old", TAKEOVER="1")
    enforcing(runs, POD="new", TAKEOVER="1")
    wait_until_logged(old, "handed over; live connections go on here until they end")
    old.signal(signal.SIGKILL)
    again = runs.start(POD="old", TAKEOVER="1")
    wait_until_logged(again, "has handed over to one that runs")
    again.signal(signal.SIGTERM)
    assert again.status() in (0, -signal.SIGTERM)


def test_it_starts_as_ever_where_nobody_runs(runs: Runs) -> None:
    enforcing(runs, TAKEOVER="1").close()
    assert (runs.state / NAME).exists(), "a dead instance's name is no hindrance"
    enforcing(runs, TAKEOVER="1")


def test_without_takeover_a_second_instance_is_refused(runs: Runs) -> None:
    enforcing(runs)
    assert runs.start().status() == 1


def test_a_successor_that_dies_before_it_enforces_is_none(runs: Runs) -> None:
    old = enforcing(runs)
    new = runs.start(TAKEOVER="1", FAKE_AGENT="unready")
    new.until_ready()
    os.kill(new.pid, signal.SIGKILL)
    old.until("agent up", times=2)
    old.until(r"agent got WorkerStarted\(index=\d, has_flows=True, ends=0, leaving=False\)", times=4)
    assert not any("Drain" in line for line in old.lines)
    assert enforcing(runs, TAKEOVER="1").pid != new.pid, "and the next one is heard"


def test_a_successor_whose_agent_refuses_gives_back_and_says_so_by_its_status(runs: Runs) -> None:
    old = enforcing(runs)
    assert runs.start(TAKEOVER="1", FAKE_AGENT="exit 2").status() == 2
    old.until("agent up", times=2)


def test_an_agent_that_does_not_end_is_killed_for_the_successor(runs: Runs) -> None:
    old = enforcing(runs, FAKE_AGENT="hangs", YIELD_S="0.1")
    enforcing(runs, TAKEOVER="1")
    old.until(r"worker \d got Drain", times=2)
    assert old.status() == 0


def test_a_successor_that_does_not_come_to_enforce_in_time_is_sent_away(runs: Runs) -> None:
    old = enforcing(runs, TAKE_S="0.5")
    new = runs.start(TAKEOVER="1", FAKE_AGENT="unready")
    assert new.status() == 1
    assert "has taken its work back" in new.errors
    old.until("agent up", times=2)


def test_a_signal_meanwhile_is_heeded_afterwards(runs: Runs) -> None:
    old = enforcing(runs, TAKE_S="1")
    new = runs.start(TAKEOVER="1", FAKE_AGENT="unready")
    old.until(r"agent got Stop\(drain_s=0.0, keep_rules=True, keep_workers=True\)")
    new.until_ready()
    old.signal(signal.SIGTERM)
    assert new.status() == 1
    old.until("agent up", times=2)
    old.until(r"agent got Stop\(drain_s=0.5, keep_rules=False, keep_workers=False\)")


# The messages


@pytest.mark.parametrize(
    ("theirs", "common"), [((1,), 1), ((0, 1), 1), ((1, 2), 1), ((2, 3), None), ((0,), None), ((), None)]
)
def test_the_newest_protocol_that_both_speak(theirs: tuple[int, ...], common: int | None) -> None:
    assert PROTOCOLS[-1] == 1
    assert common_protocol(theirs) == common


def test_nobody_to_take_over_from(tmp_path: Path) -> None:
    assert take_over(str(tmp_path), "1") is None
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(tmp_path / NAME))
    listener.close()
    assert take_over(str(tmp_path), "1") is None


def _deny(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.send(msgspec.msgpack.encode(Denied("not today")))


def _hang_up(connection: socket.socket) -> None:
    connection.recv(65536)


def _talk_nonsense(connection: socket.socket) -> None:
    connection.send(b"\xc1")
    connection.recv(65536)


def _send_broken_text(connection: socket.socket) -> None:
    connection.send(msgspec.msgpack.encode(Denied("words")).replace(b"words", b"wor\xffs"))
    connection.recv(65536)


def _say_too_early(connection: socket.socket) -> None:
    connection.send(msgspec.msgpack.encode(Yielded()))
    connection.recv(65536)


def _keep_the_lock(connection: socket.socket) -> None:
    connection.send(msgspec.msgpack.encode(Offer(1, "0", SETTINGS, 0)))
    connection.recv(65536)


def _speak_of_the_future(connection: socket.socket) -> None:
    with Path("/dev/null").open() as lock:
        fds = [lock.fileno(), lock.fileno()]
        socket.send_fds(connection, [msgspec.msgpack.encode(Offer(9, "9", SETTINGS, 0))], fds)
        connection.recv(65536)


def _keep_a_channel(connection: socket.socket) -> None:
    with Path("/dev/null").open() as lock:
        fds = [lock.fileno(), lock.fileno()]
        socket.send_fds(connection, [msgspec.msgpack.encode(Offer(1, "0", SETTINGS, 1))], fds)
        connection.send(msgspec.msgpack.encode(OfferedWorker(True)))
        connection.recv(65536)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (_deny, "not today"),
        (_hang_up, "does not answer as it should.*it goes on"),
        (_talk_nonsense, "does not answer as it should"),
        (_send_broken_text, "does not answer as it should"),
        (_say_too_early, "Yielded came where Offer was due"),
        (_keep_the_lock, "offers what this version does not know"),
        (_speak_of_the_future, "version 9 offers what this version does not know"),
        (_keep_a_channel, "without its descriptors"),
    ],
)
def test_a_predecessor_that_does_not_play_is_left_alone(
    tmp_path: Path, act: Callable[[socket.socket], None], said: str
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    door = Door(str(tmp_path))
    door.listener.setblocking(True)

    def play() -> None:
        connection, _ = door.listener.accept()
        with connection:
            act(connection)

    thread = threading.Thread(target=play)
    thread.start()
    with pytest.raises(Refusal, match=said):
        take_over(str(tmp_path), "1")
    thread.join()
    door.close()
    assert len(os.listdir("/proc/self/fd")) == before, "a descriptor is left open"
    assert not (tmp_path / NAME).exists()


def test_fields_and_words_of_a_later_version_are_ignored(runs: Runs) -> None:
    """As far as the common protocol goes: a message of an older or newer version has fewer or more fields."""
    enforcing(runs)

    class Later(msgspec.Struct, tag="TakeOver", frozen=True):
        protocols: tuple[int, ...]
        version: str
        color: str = "green"

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(20)
        connection.connect(str(runs.state / NAME))
        connection.send(msgspec.msgpack.encode(Later((1, 2, 3), "9")))
        packet, descriptors, _, _ = socket.recv_fds(connection, 65536, 8)
        for fd in descriptors:
            os.close(fd)
        offer = msgspec.msgpack.decode(packet, type=Offer)
        assert (offer.protocol, offer.workers, len(descriptors)) == (1, 2, 2)


def test_a_second_successor_has_to_wait(runs: Runs) -> None:
    enforcing(runs)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(20)
        connection.connect(str(runs.state / NAME))
        connection.send(msgspec.msgpack.encode(TakeOver((1,), "2")))
        _, descriptors, _, _ = socket.recv_fds(connection, 65536, 8)
        for fd in descriptors:
            os.close(fd)
        second = runs.start(TAKEOVER="1")
        assert second.status() == 1
        assert "another hand-over is under way" in second.errors


@pytest.mark.parametrize("word", [Yield(), Taken()])
def test_words_out_of_turn_change_nothing(runs: Runs, word: Yield | Taken) -> None:
    """Taken without Yield; Yield, and nothing more."""
    old = enforcing(runs)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(str(runs.state / NAME))
        connection.send(msgspec.msgpack.encode(word))
        connection.settimeout(20)
        connection.recv(65536)
    if isinstance(word, Yield):
        old.until("agent up", times=2)
    old.signal(signal.SIGTERM)
    old.until(r"agent got Stop\(drain_s=0.5, keep_rules=False, keep_workers=False\)")
