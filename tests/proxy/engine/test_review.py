"""A change of policy under live connections: each is asked about once a round, a few at a time, and ends as its session says."""

from __future__ import annotations

import socket

from pellucid_proxy.engine import relay

from .harness import HOLD, REFUSE, WAIT, Bench, Script, bench

POLICY_CHANGED, POD_CHANGED = relay.endings[10:12]
MANY = 600  # connections: more than a batch of events reviews


def opened(b: Bench) -> tuple[socket.socket, socket.socket]:
    client = b.connect()
    client.send(b"!")
    origin = b.accept()
    assert b.read(origin, 1) == b"!"
    return client, origin


def reviewed(b: Bench) -> None:
    b.engine.review()
    b.until(lambda: not b.engine.reviewing)


def test_one_that_may_not_go_on_is_reset_on_both_sides_and_the_others_hear_nothing() -> None:
    with bench() as b:
        pairs = [opened(b) for _ in range(3)]
        b.sessions[1].on_review = POLICY_CHANGED
        reviewed(b)
        assert [b.ends(sock) for sock in pairs[1]] == ["reset", "reset"]
        assert [(each.why, each.up) for each in b.ended] == [(POLICY_CHANGED, 1)]
        for client, origin in (pairs[0], pairs[2]):
            client.send(b"still there?")
            assert b.read(origin, 12) == b"still there?"
        assert b.engine.connections == 2


def test_a_review_that_fails_ends_the_connection() -> None:
    with bench() as b:
        client, _ = opened(b)
        b.sessions[0].on_review = RuntimeError("broken")
        reviewed(b)
        assert b.ends(client) == "reset"
        assert (b.failures, b.ended[0].why) == (1, POLICY_CHANGED)


def test_one_that_waits_is_asked_about_and_a_refused_one_is_not() -> None:
    scripts = [
        Script(on_received=WAIT, on_review=POD_CHANGED),
        Script(on_received=HOLD),
        Script(on_received=REFUSE, answer=b"no"),
    ]
    with bench(iter(scripts).__next__) as b:
        clients = []
        for _ in scripts:
            clients.append(b.connect())
            clients[-1].send(b"!")
            b.settle()
        reviewed(b)
        assert b.ends(clients[0]) == "reset"
        assert ["review" in each.heard for each in scripts] == [True, False, False]


def test_every_connection_has_its_turn_however_fast_policies_follow_each_other() -> None:
    with bench(max_connections=MANY + 8) as b:
        for _ in range(MANY // 2):
            b.connect().send(b"!")
            b.accept()
        b.settle()
        for session in b.sessions:
            session.heard.clear()
        for _ in range(4 * MANY // 256):  # never a whole round before the next begins
            b.engine.review()
            b.engine.poll(0)
        assert all("review" in session.heard for session in b.sessions)
        b.until(lambda: not b.engine.reviewing)
