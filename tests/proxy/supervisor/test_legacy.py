"""What a supervisor leaves waits for the next one, whoever has ended meanwhile."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import msgspec
import pytest

from pellucid_proxy.control import SetPolicy, ToWorker
from pellucid_proxy.settings import NodeSettings
from pellucid_proxy.supervisor.legacy import Deposit, Found, Policy
from pellucid_proxy.supervisor.messages import Configured, Enforced
from pellucid_proxy.supervisor.notify import Manager
from pellucid_proxy.worker_config import read_memfd, sealed_memfd

CONFIGURED = Configured(NodeSettings(scope=("192.0.2.0/24",)), "node-1", (b"\x7f\0\0\1",))
MANAGER = Manager("/run/notify", 30.0)


@pytest.fixture
def deposit() -> Iterator[Deposit]:
    made = Deposit()
    yield made
    made.close()


def test_a_listener_in_there_listens_though_no_process_has_it_open(deposit: Deposit) -> None:
    assert deposit.find() is None and not deposit.filled
    with socket.create_server(("127.0.0.1", 0)) as listener, open(os.devnull) as lock:
        address = listener.getsockname()
        deposit.leave(CONFIGURED, MANAGER, lock.fileno(), None, [listener.fileno()])
    with socket.create_connection(address) as client:
        found = deposit.find()
        assert found is not None
        assert (found.configured, found.manager, found.policy) == (CONFIGURED, MANAGER, None)
        with socket.socket(fileno=found.listeners[0]) as listener:
            connection, address = listener.accept()
            connection.close()
            assert address == client.getsockname()
        os.close(found.lock)
    deposit.withdraw()
    assert not deposit.filled
    with socket.socket() as late:
        assert late.connect_ex(address) != 0


def test_who_finds_it_leaves_it_there_and_who_leaves_another_replaces_it(deposit: Deposit) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with open(os.devnull) as lock:
        for _ in range(3):
            deposit.leave(CONFIGURED, MANAGER, lock.fileno(), None, [])
    later = msgspec.structs.replace(CONFIGURED, node="node-2")
    for _ in range(3):
        assert _forgotten(deposit.find()) == "node-1"
    with open(os.devnull) as lock:
        deposit.leave(later, MANAGER, lock.fileno(), None, [])
    assert _forgotten(deposit.find()) == _forgotten(deposit.find()) == "node-2"
    deposit.withdraw()
    assert deposit.find() is None
    assert len(os.listdir("/proc/self/fd")) == before, "a descriptor is left open"


def test_a_worker_gets_the_policy_that_was_in_force(deposit: Deposit) -> None:
    content = b"a policy, which nobody reads on the way"
    policy = Policy(Enforced("rev-7", len(content)), sealed_memfd("policy", content))
    with open(os.devnull) as lock:
        deposit.leave(CONFIGURED, MANAGER, lock.fileno(), policy, [])
    policy.close()
    found = deposit.find()
    assert found is not None and found.policy is not None
    mine, workers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with mine, workers:
        found.policy.give(mine)
        packet, descriptors, _, _ = socket.recv_fds(workers, 4096, 2)
    assert msgspec.msgpack.decode(packet, type=ToWorker) == SetPolicy("rev-7", len(content))
    assert [read_memfd(fd, len(content)) for fd in descriptors] == [content]
    for fd in (*descriptors, found.lock):
        os.close(fd)
    found.policy.close()


def _forgotten(found: Found | None) -> str:
    assert found is not None
    os.close(found.lock)
    return found.configured.node
