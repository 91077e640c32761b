"""What a service manager hears, and when it hears nothing."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pellucid_proxy.supervisor.children import seqpacket_pair
from pellucid_proxy.supervisor.messages import Pong
from pellucid_proxy.supervisor.notify import Notifier
from pellucid_proxy.supervisor.watchdog import Watchdog

PID = 4711


class Manager:
    """Reads what is sent to address; said: the messages so far, each a dictionary."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.setblocking(False)

    def said(self) -> list[dict[str, str]]:
        heard: list[dict[str, str]] = []
        while True:
            try:
                data = self.socket.recv(4096)
            except BlockingIOError:
                return heard
            heard.append(dict(line.split("=", 1) for line in data.decode().splitlines()))


@pytest.fixture(params=["path", "abstract"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "notify") if request.param == "path" else f"@pellucid-test-{tmp_path}"


@pytest.fixture
def manager(address: str) -> Iterator[Manager]:
    made = Manager(address)
    yield made
    made.socket.close()


def test_each_state_is_one_datagram(address: str, manager: Manager) -> None:
    environment = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "2000000", "WATCHDOG_PID": str(PID), "HOME": "/"}
    notifier = Notifier(environment, PID)
    assert environment == {"HOME": "/"}, "children shall not speak in its place"
    assert notifier.watchdog_s == 2.0
    notifier.ready("Enforcing\nREADY=0 " + "x" * 500)
    notifier.reloading()
    notifier.alive()
    notifier.stopping("bye")
    notifier.close()
    ready, reloading, alive, stopping = manager.said()
    assert ready == {"READY": "1", "STATUS": ("Enforcing READY=0 " + "x" * 500)[:200]}
    assert reloading["RELOADING"] == "1" and int(reloading["MONOTONIC_USEC"]) > 0
    assert (alive, stopping) == ({"WATCHDOG": "1"}, {"STOPPING": "1", "STATUS": "bye"})


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"NOTIFY_SOCKET": ""},
        {"NOTIFY_SOCKET": "vsock:2:1234"},
        {"NOTIFY_SOCKET": "/nowhere/at/all"},
        {"NOTIFY_SOCKET": "/" + "x" * 300},
        {"WATCHDOG_USEC": "1000000"},
    ],
    ids=str,
)
def test_where_nobody_listens_nothing_happens(environment: dict[str, str]) -> None:
    notifier = Notifier(environment, PID)
    notifier.ready("Enforcing")
    notifier.alive()
    assert notifier.watchdog_s is None
    notifier.close()


@pytest.mark.parametrize("extra", [{"WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "0"}], ids=str)
def test_a_watchdog_that_is_for_another_or_is_none_is_not_fed(address: str, extra: dict[str, str]) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000"} | extra, PID)
    assert notifier.watchdog_s is None
    assert Watchdog(notifier).due == float("inf")
    notifier.close()


def test_a_full_manager_is_not_waited_for(address: str, manager: Manager) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address}, PID)
    for _ in range(5000):
        notifier.alive()
    assert 0 < len(manager.said()) < 5000
    notifier.close()


def test_only_a_whole_answer_to_the_last_question_is_told(address: str, manager: Manager) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "8000000"}, PID)
    watchdog = Watchdog(notifier)
    watchdog.start(100.0)
    assert watchdog.due == 100.0
    first = watchdog.ask(100.0)
    assert watchdog.due == 102.0
    watchdog.start(101.0)
    assert watchdog.due == 102.0, "an agent that starts again does not hurry it"
    watchdog.answered(Pong(first.number, (0, 1)), [0, 1])
    assert manager.said() == [{"WATCHDOG": "1"}]
    second = watchdog.ask(102.0)
    watchdog.answered(Pong(first.number, (0, 1)), [0, 1])
    assert manager.said() == [], "an old answer"
    watchdog.answered(Pong(second.number, (1,)), [0, 1])
    assert manager.said() == [{"STATUS": "No answer from worker 0"}]
    watchdog.answered(Pong(second.number, (1,)), [0, 1])
    assert manager.said() == [], "said once"
    watchdog.answered(Pong(second.number, (0, 1)), [0, 1])
    assert manager.said() == [{"STATUS": "All processes answer again"}, {"WATCHDOG": "1"}]
    watchdog.answered(Pong(watchdog.ask(104.0).number, ()), ())
    assert manager.said() == [{"WATCHDOG": "1"}], "while it stops, workers may be gone"
    notifier.close()


def test_who_hands_over_names_the_next_one_and_is_silent_from_then_on(address: str, manager: Manager) -> None:
    one = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "4000000"}, PID)
    next_one = Notifier({}, PID + 1)
    next_one.alive()
    one_has = one.manager
    assert (one_has.address, one_has.watchdog_s) == (address, 4.0)
    one.hand_over(PID + 1)
    one.alive()
    next_one.adopt(one_has)
    assert next_one.watchdog_s == 4.0
    next_one.alive()
    next_one.close()
    assert manager.said() == [{"MAINPID": str(PID + 1), "STATUS": "Handed over"}, {"WATCHDOG": "1"}]


def test_what_goes_by_a_relay_says_whom_it_is_for(address: str, manager: Manager) -> None:
    relay, relayed = seqpacket_pair()
    with relay, relayed:
        notifier = Notifier({"NOTIFY_SOCKET": address}, PID, relay)
        notifier.stopping("bye")
        notifier.close()
        notifier.alive()
        assert relayed.recv(4096) == f"{address}\nSTOPPING=1\nSTATUS=bye".encode()
        with pytest.raises(BlockingIOError):
            relayed.recv(4096)
    assert manager.said() == []
