"""The engine relays, ends and gives up as it says. The same tests run on the compiled and on the uncompiled form."""

from __future__ import annotations

import random
import select
import socket
import struct
import time
from typing import Any

import pytest

from pellucid_proxy.engine import relay
from pellucid_proxy.sniff.first_bytes import MAX_FIRST_BYTES

from .harness import DIAL, HOLD, RACE, REFUSE, WAIT, Bench, Script, bench, reset

END, CLIENT_RESET, UPSTREAM_RESET, UPSTREAM_UNREACHABLE = relay.endings[:4]
CONNECT_TIMEOUT, IDLE_TIMEOUT, REFUSED, UPSTREAM_PROXY, SHUTDOWN = relay.endings[4:9]
FIRST_READ = 16384


def opened(b: Bench) -> tuple[socket.socket, socket.socket]:
    """A client and its origin, relayed, one byte through."""
    client = b.connect()
    client.send(b"!")
    origin = b.accept()
    assert b.read(origin, 1) == b"!"
    return client, origin


def test_bytes_go_both_ways_and_ends_are_passed_on_one_at_a_time() -> None:
    with bench() as b:
        client, origin = opened(b)
        client.send(b"up")
        assert b.read(origin, 2) == b"up"
        client.shutdown(socket.SHUT_WR)
        assert b.ends(origin) == "end"
        origin.send(b"down, after the client's end")
        assert b.read(client, 28) == b"down, after the client's end"
        origin.close()
        assert b.ends(client) == "end"
        b.until(lambda: b.ended)
        assert (b.ended[0].why, b.ended[0].up, b.ended[0].down) == (END, 3, 28)
        assert b.engine.connections == 0


@pytest.mark.parametrize("who", ["client", "origin"])
def test_a_reset_is_passed_on_as_a_reset(who: str) -> None:
    with bench() as b:
        client, origin = opened(b)
        one, other = (client, origin) if who == "client" else (origin, client)
        reset(one)
        assert b.ends(other) == "reset"
        b.until(lambda: b.ended)
        assert b.ended[0].why == (CLIENT_RESET if who == "client" else UPSTREAM_RESET)


def test_what_came_before_a_reset_is_delivered() -> None:
    with bench() as b:
        client, origin = opened(b)
        origin.send(b"413 too large")
        b.read(client, 4)
        origin.send(b", go away")
        reset(origin)
        assert b.read(client, 18) == b"too large, go away"
        assert b.ends(client) == "reset"


@pytest.mark.parametrize(("steps", "roomy_pipes"), [(7, 0), (1, 256), (7, 256)])
def test_five_megabytes_each_way_at_once_arrive_whole(steps: int, roomy_pipes: int) -> None:
    """roomy_pipes 0: pipes that are opened here hold 64 KiB."""
    rng = random.Random(steps)
    up, down = rng.randbytes(5_000_000), rng.randbytes(5_000_000)
    with bench(roomy_pipes=roomy_pipes) as b:
        client, origin = opened(b)
        lanes: list[list[Any]] = [[client, up, 0, origin, bytearray()], [origin, down, 0, client, bytearray()]]

        def moved() -> bool:
            for lane in lanes:
                source, data, sent, target, got = lane
                for _ in range(steps):
                    if sent < len(data):
                        try:
                            sent += source.send(data[sent : sent + rng.randrange(1, 200_000)])
                        except BlockingIOError:
                            break
                lane[2] = sent
                try:
                    got.extend(target.recv(rng.randrange(1, 300_000)))
                except BlockingIOError:
                    pass
            return all(len(lane[4]) == len(lane[1]) for lane in lanes)

        b.until(moved)
        assert (bytes(lanes[0][4]), bytes(lanes[1][4])) == (up, down)
        client.shutdown(socket.SHUT_WR)
        origin.shutdown(socket.SHUT_WR)
        assert (b.ends(origin), b.ends(client)) == ("end", "end")
        b.until(lambda: b.ended)
        assert (b.ended[0].why, b.ended[0].up, b.ended[0].down) == (END, 5_000_001, 5_000_000)


def test_a_ping_pong_larger_than_a_turn_never_stalls() -> None:
    """A turn that ended with bytes in the pipe would leave them there: the source is silent, no event comes."""
    with bench() as b:
        client, origin = opened(b)
        ball = bytes(100_000)
        for _ in range(20):
            client.setblocking(True)
            client.sendall(ball)
            client.setblocking(False)
            assert b.read(origin, len(ball)) == ball
            origin.setblocking(True)
            origin.sendall(ball)
            origin.setblocking(False)
            assert b.read(client, len(ball)) == ball


def test_the_session_hears_the_first_bytes_until_it_has_enough() -> None:
    def enough(data: bytes) -> int:
        return DIAL if len(data) >= 6 else WAIT

    with bench(lambda: Script(on_received=enough)) as b:
        client = b.connect()
        client.send(b"abc")
        assert b.nothing_arrives()
        client.send(b"def")
        assert b.read(b.accept(), 6) == b"abcdef"
        assert b.sessions[0].heard[-2:] == [b"abc", b"abcdef"]


def test_what_came_behind_an_urgent_byte_is_heard_at_once() -> None:
    def enough(data: bytes) -> int:
        return DIAL if len(data) >= 5 else WAIT

    with bench(lambda: Script(on_received=enough), first_bytes_timeout_s=60) as b:
        client = b.connect()
        b.settle()
        client.send(b"ab", socket.MSG_OOB)  # a read stops at the urgent byte, and no further edge comes
        client.send(b"cdef")
        assert b.read(b.accept(), 5) == b"acdef"


def test_an_end_that_came_with_first_bytes_is_heard_at_once() -> None:
    with bench(lambda: Script(on_received=WAIT, on_late=DIAL), first_bytes_timeout_s=60) as b:
        client = b.connect()
        b.settle()
        client.send(b"abc")
        client.shutdown(socket.SHUT_WR)
        assert b.ends(b.accept()) == "end"


def test_a_verdict_without_bytes_dials_at_once() -> None:
    with bench(lambda: Script(on_opened=DIAL)) as b:
        client = b.connect()
        origin = b.accept()
        origin.send(b"220 hello")
        assert b.read(client, 9) == b"220 hello"


def test_a_refusal_is_a_reset_and_nothing_reaches_the_origin() -> None:
    with bench(lambda: Script(on_received=REFUSE)) as b:
        client = b.connect()
        client.send(b"secret")
        assert b.ends(client) == "reset"
        assert b.nothing_arrives()
        assert (b.ended[0].why, b.ended[0].up) == (REFUSED, 0)


def test_a_refusal_with_a_reply_is_read_whole_before_the_end() -> None:
    with bench(lambda: Script(on_received=REFUSE, answer=b"HTTP/1.1 403 Forbidden\r\n\r\n")) as b:
        client = b.connect()
        client.send(b"GET / HTTP/1.1\r\n\r\n")
        assert b.read(client, 26) == b"HTTP/1.1 403 Forbidden\r\n\r\n"
        client.send(b"more that nobody reads")
        assert b.ends(client) == "end"
        client.close()
        b.until(lambda: b.ended)
        assert b.nothing_arrives()


def test_a_dropped_connection_hears_nothing_until_it_is_given_up() -> None:
    with bench(lambda: Script(on_received=HOLD), drop_hold_s=0.05) as b:
        client = b.connect()
        client.send(b"hello?")
        b.until(lambda: b.sessions and b.sessions[0].heard)
        with pytest.raises(BlockingIOError):
            client.recv(1)
        assert b.ends(client) == "reset"


def test_a_session_that_raises_refuses() -> None:
    def broken(data: bytes) -> int:
        raise RuntimeError("no verdict")

    with bench(lambda: Script(on_received=broken)) as b:
        client = b.connect()
        client.send(b"x")
        assert b.ends(client) == "reset"
        assert b.nothing_arrives()
        assert b.failures == 1


def test_a_session_that_cannot_be_made_refuses() -> None:
    with bench(lambda: None) as b:
        client = b.connect()
        assert b.ends(client) == "reset"
        assert b.engine.connections == 0


def test_a_silent_client_of_a_server_that_speaks_first_is_served() -> None:
    with bench(lambda: Script(on_silent=RACE), server_first_delay_s=0.01) as b:
        client = b.connect()
        origin = b.accept()
        origin.send(b"220 mail")
        assert b.read(client, 8) == b"220 mail"
        assert b.sessions[0].heard == ["opened", "silent", "server_spoke"]
        client.send(b"EHLO")
        assert b.read(origin, 4) == b"EHLO"


def test_in_a_race_the_client_s_bytes_wait_for_the_verdict() -> None:
    with bench(lambda: Script(on_silent=RACE, on_received=REFUSE), server_first_delay_s=0.01) as b:
        client = b.connect()
        origin = b.accept()
        client.send(b"forbidden name")
        assert b.ends(client) == "reset"
        assert b.ends(origin) == "reset"
        assert b.ended[0].down == 0


def test_a_race_won_by_the_client_goes_on_with_its_bytes() -> None:
    with bench(lambda: Script(on_silent=RACE), server_first_delay_s=0.01) as b:
        client = b.connect()
        origin = b.accept()
        client.send(b"hello")
        assert b.read(origin, 5) == b"hello"


def test_a_race_to_the_wrong_upstream_dials_anew() -> None:
    with bench(lambda: Script(on_silent=RACE, redial=True), server_first_delay_s=0.01) as b:
        client = b.connect()
        first = b.accept()
        client.send(b"hello")
        second = b.accept()
        assert b.read(second, 5) == b"hello"
        assert b.ends(first) == "reset"


def test_first_bytes_that_stop_in_the_middle_are_given_up() -> None:
    with bench(lambda: Script(on_received=WAIT), first_bytes_timeout_s=0.05) as b:
        client = b.connect()
        client.send(b"\x16\x03\x01")
        assert b.ends(client) == "reset"
        assert b.sessions[0].heard[-1] == "gave_up"
        assert b.nothing_arrives()


def test_a_client_that_ends_before_its_first_byte_is_decided_without() -> None:
    with bench(lambda: Script(on_late=DIAL)) as b:
        client = b.connect()
        client.shutdown(socket.SHUT_WR)
        assert b.ends(b.accept()) == "end"


def test_an_unreachable_upstream_resets_the_client() -> None:
    with bench() as b:
        b.origin.close()
        client = b.connect()
        client.send(b"x")
        assert b.ends(client) == "reset"
        assert b.ended[0].why == UPSTREAM_UNREACHABLE


def test_a_connect_that_is_not_answered_is_given_up() -> None:
    with bench(connect_timeout_s=0.05) as b:
        full = socket.socket()
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with full, socket.create_connection(full.getsockname()):  # its queue is full: a further SYN is not answered
            b.target = (b.target[0], full.getsockname()[1])
            client = b.connect()
            client.send(b"x")
            assert b.ends(client) == "reset"
            assert b.ended[0].why == CONNECT_TIMEOUT


def test_an_idle_connection_ends_and_a_busy_one_does_not() -> None:
    with bench(idle_timeout_s=0.2) as b:
        busy, busy_origin = opened(b)
        idle, idle_origin = opened(b)
        while not b.ended:
            busy.send(b"x")
            b.read(busy_origin, 1)
        assert b.ends(idle) == "reset"
        assert b.ends(idle_origin) == "reset"
        assert b.ended[0].why == IDLE_TIMEOUT
        assert b.engine.connections == 1


def test_past_the_limit_connections_wait_and_are_served_when_one_ends() -> None:
    with bench(max_connections=1) as b:
        first, first_origin = opened(b)
        second = b.connect()
        second.send(b"?")
        assert b.nothing_arrives()
        first.close()
        first_origin.close()
        assert b.read(b.accept(), 1) == b"?"


def test_refusing_more_leaves_live_connections_alone() -> None:
    with bench() as b:
        client, origin = opened(b)
        b.engine.refuse_more()
        late = b.connect()
        late.send(b"?")
        assert b.nothing_arrives()
        client.send(b"still here")
        assert b.read(origin, 10) == b"still here"


def test_refusing_more_holds_for_the_batch_at_hand() -> None:
    """Else the last event of a worker's life could be a connection, which would end with the worker."""

    class Refuses(relay.Handler):
        def on_event(self, events: int) -> int:
            b.engine.refuse_more()
            b.engine.forget(self)
            return 0

    with bench() as b:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            order = Refuses()
            order.set_fd(ours.fileno())
            b.engine.watch(order, select.EPOLLIN)
            theirs.send(b"refuse")  # before the connection, so it is reported before
            b.connect()
            assert b.engine.poll(0) == 2
            assert b.engine.connections == 0


def test_closing_all_resets_both_sides_and_says_so() -> None:
    with bench() as b:
        client, origin = opened(b)
        b.engine.close_all()
        assert (b.ends(client), b.ends(origin)) == ("reset", "reset")
        assert (b.ended[0].why, b.engine.connections) == (SHUTDOWN, 0)


class Greeting:
    """An upstream proxy's handshake of one question and one answer."""

    def greeting(self) -> bytes:
        return b"may I?"

    def feed(self, data: bytes) -> tuple[bytes, bytes | None]:
        if data.startswith(b"no"):
            raise ValueError("refused")
        return (b"", data[3:]) if data.startswith(b"yes") else (b"", None)


def test_an_upstream_proxy_is_greeted_before_the_client_s_bytes_go() -> None:
    with bench(lambda: Script(handshake=Greeting())) as b:
        client = b.connect()
        client.send(b"hello")
        proxy = b.accept()
        assert b.read(proxy, 6) == b"may I?"
        proxy.send(b"yes+banner")
        assert b.read(proxy, 5) == b"hello"
        assert b.read(client, 7) == b"+banner"


def test_an_upstream_proxy_that_refuses_ends_the_connection() -> None:
    with bench(lambda: Script(handshake=Greeting())) as b:
        client = b.connect()
        client.send(b"hello")
        proxy = b.accept()
        b.read(proxy, 6)
        proxy.send(b"no")
        assert b.ends(client) == "reset"
        assert b.ended[0].why == UPSTREAM_PROXY


def test_behind_an_upstream_proxy_the_server_may_speak_first() -> None:
    with bench(lambda: Script(handshake=Greeting(), on_silent=RACE), server_first_delay_s=0.01) as b:
        client = b.connect()
        proxy = b.accept()
        b.read(proxy, 6)
        proxy.send(b"yes")
        b.settle()
        proxy.send(b"220")
        assert b.read(client, 3) == b"220"
        client.send(b"ok")
        assert b.read(proxy, 2) == b"ok"


def test_a_tick_comes_once_for_each_time_it_is_asked_for() -> None:
    with bench() as b:
        b.engine.tick_within(0.01)
        b.engine.tick_within(5)
        b.until(lambda: b.ticks)
        b.settle()
        assert b.ticks == 1


def test_a_hundred_connections_leave_nothing_behind() -> None:
    with bench() as b:
        for _ in range(100):
            client, origin = opened(b)
            client.close()
            origin.close()
            b.until(lambda: b.engine.connections == 0)
        assert len(b.ended) == 100


def unknown(**more: Any) -> Script:
    """Of a pod that is not known yet, which will be allowed."""
    script = Script(on_opened=WAIT, on_late=WAIT, unknown=True, **more)
    script.on_received = lambda _data: WAIT if script.unknown else DIAL
    return script


def test_what_an_unknown_pod_sends_waits_and_goes_on_once_the_pod_is_known() -> None:
    with bench(unknown, unknown_pod_hold_s=30) as b:
        early, late = b.connect(), b.connect()
        early.send(b"first")
        assert b.nothing_arrives()
        for each in b.sessions:
            each.is_known = True
        b.engine.review()
        assert b.read(b.accept(), 5) == b"first"
        late.send(b"second")
        assert b.read(b.accept(), 6) == b"second"
        assert all(each.heard.count("found") == 1 for each in b.sessions)


def test_a_client_that_ended_meanwhile_is_told_of_like_any_other() -> None:
    with bench(unknown, unknown_pod_hold_s=30) as b:
        client = b.connect()
        client.send(b"all of it")
        client.shutdown(socket.SHUT_WR)
        assert b.nothing_arrives()
        b.sessions[0].is_known = True
        b.engine.review()
        origin = b.accept()
        assert b.read(origin, 9) == b"all of it"
        assert b.ends(origin) == "end"


def test_a_pod_that_stays_unknown_is_waited_for_so_long_and_no_longer() -> None:
    with bench(unknown, unknown_pod_hold_s=0.2) as b:
        began = time.monotonic()
        client = b.connect()
        client.send(b"?")
        assert b.read(b.accept(), 1) == b"?"
        assert time.monotonic() - began >= 0.2
        assert b.sessions[0].heard[-2:] == ["expired", b"?"]
    with bench(lambda: unknown(on_expired=REFUSE), unknown_pod_hold_s=0.2) as b:
        client = b.connect()
        client.send(b"?")
        assert b.ends(client) == "reset"


def test_a_review_that_finds_no_pod_leaves_the_wait_as_it_is() -> None:
    with bench(unknown, unknown_pod_hold_s=0.3) as b:
        client = b.connect()
        client.send(b"?")
        assert b.nothing_arrives()
        b.engine.review()
        assert b.read(b.accept(), 1) == b"?"
        assert "found" not in b.sessions[0].heard


def test_of_an_unknown_pod_no_more_is_read_than_may_decide() -> None:
    """Else it could fill the worker, and keep it from all others."""
    flood = random.Random(4).randbytes(1 << 20)
    with bench(unknown, unknown_pod_hold_s=30) as b:
        client = b.connect()
        sent = client.send(flood)
        b.settle()
        sent += _send(client, flood[sent:])
        b.settle()
        assert MAX_FIRST_BYTES <= b.engine.held_bytes <= 2 * FIRST_READ
        b.sessions[0].is_known = True
        b.engine.review()
        origin = b.accept()
        got = bytearray()
        while len(got) < len(flood):
            b.engine.poll(5)
            sent += _send(client, flood[sent:])
            got += b.until(lambda: _read(origin))
        assert got == flood
        client.close()
        assert b.ends(origin) == "end"


def test_an_unknown_client_that_goes_away_while_it_waits_is_let_go() -> None:
    with bench(unknown, unknown_pod_hold_s=30) as b:
        client = b.connect()
        client.send(bytes(1 << 17))
        assert b.nothing_arrives()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        b.until(lambda: b.engine.connections == 0)
        assert b.engine.held_bytes == 0


def _send(sock: socket.socket, data: bytes) -> int:
    try:
        return sock.send(data)
    except BlockingIOError:
        return 0


def _read(sock: socket.socket) -> bytes:
    try:
        return sock.recv(1 << 20)
    except BlockingIOError:
        return b""
