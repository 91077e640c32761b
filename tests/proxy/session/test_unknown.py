"""A connection of an address without a pod waits for its pod, and is then decided as the pod's."""

from __future__ import annotations

import msgspec
import pytest

from pellucid_policy.compile import PolicySet, compile_policies
from pellucid_policy.facts import TCP, UDP
from pellucid_policy.objects import Objects
from pellucid_policy.parse import parse_files
from pellucid_proxy.explain import Question, explain
from pellucid_proxy.session.canary import Canary
from pellucid_proxy.session.desk import Desk
from pellucid_proxy.session.judge import Enforced, Judge
from pellucid_proxy.session.session import DIAL, REFUSE, WAIT, Session
from pellucid_proxy.settings import NodeSettings

POD, SERVER = b"\x0a\xf4\x01\x0a", b"\xc0\x00\x02\x0a"
REQUEST = b"GET / HTTP/1.1\r\nHost: %s\r\n\r\n"
POLICY = """
apiVersion: pellucid.dev/v1alpha1
kind: TransparentPolicy
metadata: {name: p, namespace: shop}
spec:
  podSelector: {}
  rules:
  - {match: {destinations: [{domain: good.example}]}, action: Allow}
  - {match: {}, action: Block}
"""
OBJECT = """---
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: shop}
status: {podIP: 10.244.1.10}
"""


def policy(text: str) -> PolicySet:
    objects = parse_files({"x.yaml": text.encode()})
    assert isinstance(objects, Objects)
    return compile_policies(objects)


def judge(action: str = "Allow", hold_s: float = 2.0) -> Judge:
    limits = {"max_connections_per_pod": 9, "max_pending_per_pod": 9}
    hold = {"unknown_pod_hold_s": hold_s, "unknown_pod_action": action}
    found = Judge(msgspec.convert({"scope": ["10.244.0.0/16"], **limits, **hold}, NodeSettings), ())
    found.enforced = Enforced(policy(POLICY))
    return found


def session(of: Judge) -> Session:
    return Session(of, POD, SERVER, 80)


@pytest.mark.parametrize(("name", "step"), [(b"good.example", DIAL), (b"bad.example", REFUSE)])
def test_nothing_is_decided_until_the_pod_is_known(name: bytes, step: int) -> None:
    of = judge()
    held = session(of)
    assert (held.opened(), held.silent(), held.received(REQUEST % name), held.gave_up()) == (WAIT,) * 4
    assert (held.unknown, held.tally, held.review()) == (True, None, 0)
    assert not held.known()
    of.enforced = Enforced(policy(POLICY + OBJECT))
    assert held.known()
    held.found()
    assert held.received(REQUEST % name) == step
    assert (held.unknown, of.unknown_known) == (False, 1)


@pytest.mark.parametrize(("action", "outcome", "reason"), [("Allow", WAIT, None), ("Block", REFUSE, "UnknownPod")])
def test_after_the_time_it_is_a_stranger_or_refused(action: str, outcome: int, reason: str | None) -> None:
    of = judge(action)
    held = session(of)
    assert held.received(REQUEST % b"bad.example") == WAIT
    assert held.expired() == outcome
    assert of.unknown_expired == 1
    if reason is None:
        assert held.received(REQUEST % b"bad.example") == DIAL, "no policy selects a stranger"
    else:
        assert held.verdict.reason == reason
        assert held.tally is not None
        assert held.reply() is None


def test_a_known_pod_and_a_node_that_holds_nobody_wait_for_nothing() -> None:
    of = judge()
    of.enforced = Enforced(policy(POLICY + OBJECT))
    assert session(of).received(REQUEST % b"bad.example") == REFUSE
    assert session(judge(hold_s=0)).received(REQUEST % b"bad.example") == DIAL


def test_a_canary_is_answered_whatever_policies_say_and_leaves_no_record() -> None:
    of = judge("Block")
    of.enforced = Enforced(policy(POLICY + OBJECT))
    told: list[bool] = []
    desk = Desk(of, "node-1", 1 << 20, told.append, lambda: None)
    for address, family in ((bytes([192, 0, 2, 119]), "IPv4"), (bytes.fromhex("20010db8" + "00" * 11 + "77"), "IPv6")):
        canary = desk.session(POD, address, 80)
        assert isinstance(canary, Canary)
        assert (canary.opened(), canary.received(b"x")) == (REFUSE, REFUSE)
        reply = canary.reply()
        assert reply is not None
        assert reply.endswith(f"{of.enforced.revision} node-1\n".encode())
        desk.closed(canary, 1, 6, 1, 0, 0, 2, 0, 0)
        counted = {each.labels: each.value for each in desk.series(0, 0) if each.name == "canary_answers"}
        assert counted[(family,)] == 1
    assert not isinstance(desk.session(POD, bytes([192, 0, 2, 119]), 81), Canary), "another port is anybody's"
    assert (desk.take(), told) == (b"", [])


def test_a_pod_that_has_too_many_connections_gets_no_canary_either() -> None:
    of = judge()
    of.settings = NodeSettings(scope=(), max_connections_per_pod=1, max_pending_per_pod=9)
    desk = Desk(of, "node-1", 0, lambda _full: None, lambda: None)
    first = desk.session(POD, bytes([192, 0, 2, 119]), 80)
    second = desk.session(POD, bytes([192, 0, 2, 119]), 80)
    assert (first.too_many, second.too_many) == (False, True)
    assert first.reply() is not None
    assert second.reply() is None
    for each in (first, second):
        desk.closed(each, 1, 6, 1, 0, 0, 2, 0, 0)
    assert sum(each.value for each in desk.series(0, 0) if each.name == "canary_answers") == 1


@pytest.mark.parametrize(
    ("action", "protocol", "namespace", "answer"),
    [
        ("Allow", TCP, "default", ("Block", "RuleMatched")),
        ("Allow", TCP, "shop", ("Allow", "NotSelected")),
        ("Block", TCP, "default", ("Block", "UnknownPod")),
        ("Block", TCP, "shop", ("Block", "UnknownPod")),
        ("Block", UDP, "shop", ("Block", "UnknownPod")),
    ],
)
def test_explain_says_what_becomes_of_an_address_that_nobody_knows(
    action: str, protocol: int, namespace: str, answer: tuple[str, str]
) -> None:
    settings = judge(action).settings
    enforced = policy(POLICY.replace("shop", namespace))
    question = Question(source="10.244.1.10", destination="192.0.2.10", port=80, protocol=protocol)
    if protocol == TCP:
        question = msgspec.structs.replace(question, first=REQUEST % b"bad.example")
    found = explain(question, enforced, None, settings, ())
    assert (found.verdict, found.reason) == answer
    assert any("2 s" in each.said for each in found.steps)
    known = explain(question, policy(POLICY + OBJECT), None, settings, ())
    assert known.reason != "UnknownPod"
    nowhere = explain(msgspec.structs.replace(question, destination=None), enforced, None, settings, ())
    assert (nowhere.reason == "UnknownPod") == (action == "Block")
