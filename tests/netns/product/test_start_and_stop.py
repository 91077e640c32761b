"""Start and stop leave live connections alone, and nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

from pellucid_cli.lab.clients import TlsSession, get, get_tls
from pellucid_cli.lab.instance import Instance
from pellucid_cli.lab.servers import Arrival, speak_https
from pellucid_cli.lab.topology import Namespace
from pellucid_proxy.agent.status import NotRunning, read_status

from ..world import eventually
from .conftest import Figure
from .stage import CountingServer, Load, Stage, gone, policy, process_ids, tap

SITE, OTHER = "site.example", "other.example"
RULES = policy(f"""
  - {{name: site, match: {{destinations: [{{domain: {SITE}}}]}}, action: Allow}}
  - {{match: {{}}, action: Block}}
""")

PATIENCE_S = 30.0
"""The tests before leave the kernel with namespaces of thousands of sockets to take apart, which holds up others meanwhile."""


def speak_echo(client: socket.socket, arrival: Arrival) -> None:
    """Says again what it hears."""
    while data := client.recv(4096):
        client.sendall(data)


def _echoes(connection: socket.socket) -> bool:
    connection.sendall(b"still there?")
    return connection.recv(100) == b"still there?"


def _terminate(instance: Instance) -> int:
    guardian = process_ids(instance)["guardian"]
    os.kill(guardian, signal.SIGTERM)
    return guardian


def _draining(instance: Instance) -> bool:
    try:
        return read_status(str(instance.state)).phase == "draining"
    except NotRunning:
        return False


def test_live_connections_survive_start_and_stop_and_nothing_is_left(tmp_path: Path, figure: Figure) -> None:
    with Stage(tmp_path) as stage:
        a, web = stage["a"], stage["web"]
        stage.serve("web", {7: speak_echo, 443: speak_https})
        stage.write("policy.yaml", RULES)
        before = stage.left_behind()
        with a.connect(web.ipv4, 7) as early, a.connect(web.ipv6, 7) as early6:
            assert _echoes(early) and _echoes(early6)
            with stage.run(drain_s=120.0) as instance:
                assert _echoes(early) and _echoes(early6), "a connection that was there before was cut"
                assert get_tls(a, web.ipv4, 443, OTHER).end == "reset"
                with TlsSession(a, web.ipv4, 443, SITE) as relayed, TlsSession(a, web.ipv6, 443, SITE) as relayed6:
                    guardian = _terminate(instance)
                    assert eventually(lambda: _draining(instance), PATIENCE_S)
                    assert eventually(lambda: get_tls(a, web.ipv4, 443, OTHER).end == "answered"), (
                        "new connections do not pass"
                    )
                    ends = [get_tls(a, address, 443, OTHER).end for address in web.addresses for _ in range(10)]
                    assert ends == ["answered"] * 20
                    assert relayed.request().end == relayed6.request().end == "answered"
                    assert _echoes(early) and _echoes(early6)
                    assert not gone(guardian)
                assert eventually(lambda: gone(guardian), PATIENCE_S), "it waits though nothing is left to wait for"
                assert instance.stop() == 0
            assert _echoes(early) and _echoes(early6)
        assert stage.left_behind() == before
        assert sorted(path.name for path in instance.state.iterdir()) == ["last-good.msgpack", "lock"]
        figure(
            "start and stop",
            "4 of 4 live connections survive, 20 of 20 new ones pass after the stop, nothing left behind",
        )


def test_what_outlives_the_drain_time_is_ended_and_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with Stage(tmp_path) as stage:
        a, web = stage["a"], stage["web"]
        stage.serve("web", {443: speak_https})
        stage.write("policy.yaml", RULES)
        before = stage.left_behind()
        for drain_s, signals in ((8.0, 1), (600.0, 2)):
            with stage.run(drain_s=drain_s) as instance, TlsSession(a, web.ipv4, 443, SITE) as relayed:
                begun = time.monotonic()
                guardian = _terminate(instance)
                assert eventually(lambda instance=instance: _draining(instance), PATIENCE_S)  # type: ignore[misc]
                assert relayed.request().end == "answered"
                for _ in range(signals - 1):
                    os.kill(guardian, signal.SIGTERM)
                assert eventually(lambda guardian=guardian: gone(guardian), PATIENCE_S)  # type: ignore[misc]
                assert (time.monotonic() - begun >= drain_s) == (signals == 1)
                assert relayed.request().end in ("reset", "closed")
                assert instance.stop() == 0
            assert stage.left_behind() == before


def test_nothing_passes_undecided_while_it_starts(tmp_path: Path, figure: Figure) -> None:
    """Once the first rule is in the kernel, no new connection reaches a server that the policy forbids."""
    with Stage(tmp_path) as stage, CountingServer(stage["web"], 80) as server:
        stage.write("policy.yaml", RULES)
        a, web = stage["a"], stage["web"]
        packets = tap(web, f"ip saddr {a.ipv4}"), tap(web, f"ip6 saddr {a.ipv6}")
        with Load(a, web.addresses, 80, OTHER, parallel=4) as load:
            assert eventually(lambda: server.accepted > 100)
            with stage.run():
                accepted, before = server.accepted, sum(each() for each in packets)
                assert get(a, web.ipv4, 80, SITE).end == "answered"
                assert eventually(lambda: stage.counter("intercepted") > 200)
                late = server.accepted - accepted
                # What remains of the connections from before are their ends.
                assert sum(each() for each in packets) - before < 100
        figure("while it starts", f"{late - 1} forbidden connections reach the server once it is ready")
        assert late == 1
        assert set(load.ended) == {"ok", "ECONNRESET"}


def test_a_client_port_is_used_again_at_once_while_it_runs_and_after(tmp_path: Path, figure: Figure) -> None:
    """The server ends first, so that the proxy's end of the client's connection stays in TIME_WAIT."""
    with Stage(tmp_path) as stage, CountingServer(stage["web"], 80) as server:
        stage.write("policy.yaml", RULES)
        a, web = stage["a"], stage["web"]
        with stage.run():
            ends = [_once_from(a, address, 41000) for _ in range(3) for address in web.addresses]
        ends += [_once_from(a, address, 41000) for _ in range(2) for address in web.addresses]
        figure(
            "client port used again at once",
            f"{ends.count('answered')} of {len(ends)} answered, the last 4 after the stop",
        )
        assert ends == ["answered"] * 10
        assert server.accepted == 10


def _once_from(pod: Namespace, address: str, port: int) -> str:
    with pod.open_socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        connection.bind(("", port))
        connection.settimeout(0.9)  # a SYN is sent again after 1 s
        try:
            connection.connect((address, 80))
            connection.sendall(f"GET / HTTP/1.1\r\nHost: {SITE}\r\nConnection: close\r\n\r\n".encode())
            received = b""
            while more := connection.recv(4096):
                received += more
        except OSError as err:
            return str(err)
        return "answered" if received == CountingServer.ANSWER else repr(received)
