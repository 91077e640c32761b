"""A policy changes while connections live: who goes on, who ends, and by which facts."""

from __future__ import annotations

import random
from typing import Any

import pytest
import yaml

from pellucid_policy.compile import PolicySet, compile_policies
from pellucid_policy.objects import Objects
from pellucid_policy.parse import parse_files
from pellucid_policy.verdict import Action
from pellucid_proxy.session.judge import Enforced, Judge
from pellucid_proxy.session.session import DIAL, GOES_ON, POD_CHANGED, POLICY_CHANGED, REFUSE, WAIT, Session
from pellucid_proxy.settings import NodeSettings

from .test_session import POD, REST_BLOCKED, cidr, domain, get, hello, packed, session

ROUTED = {"to": {"address": "192.0.2.99", "port": 8443}}


def policies(
    *policies: list[dict[str, Any]],
    keep: tuple[int, ...] = (),
    pod: str | None = "web",
    uid: str = "",
    address: str = POD,
    namespace: str = "default",
) -> PolicySet:
    """Each list is the rules of one policy of that namespace, in order; keep: which of them say Keep. pod None: no pod has the address."""
    documents: list[dict[str, Any]] = [
        {
            "apiVersion": "pellucid.dev/v1alpha1",
            "kind": "TransparentPolicy",
            "metadata": {"name": f"p{at}", "namespace": "default"},
            "spec": {"podSelector": {}, "rules": rules, "onPolicyChange": "Keep" if at in keep else "Reevaluate"},
        }
        for at, rules in enumerate(policies)
    ]
    if pod is not None:
        metadata = {"name": pod, "namespace": namespace} | ({"uid": uid} if uid else {})
        status = {"podIPs": [{"ip": address}]}
        documents.append({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": status})
    objects = parse_files({"p.yaml": yaml.safe_dump_all(documents).encode()})
    assert isinstance(objects, Objects), objects
    return compile_policies(objects)


def judge_of(first: PolicySet) -> Judge:
    made = Judge(NodeSettings(scope=("10.244.0.0/16",)), [packed("192.0.2.1")])
    made.enforced = Enforced(first)
    return made


def change(judge: Judge, to: PolicySet) -> None:
    judge.enforced = Enforced(to)


ALLOWED, BLOCKED = cidr("192.0.2.0/24", "Allow"), cidr("192.0.2.0/24")
SITE, NO_SITE = domain("site.example", "Allow"), domain("site.example")


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([SITE, REST_BLOCKED], [SITE, cidr("203.0.113.0/24"), REST_BLOCKED], GOES_ON),
        ([SITE, REST_BLOCKED], [NO_SITE, REST_BLOCKED], POLICY_CHANGED),
        ([SITE, REST_BLOCKED], [domain("other.example", "Allow"), REST_BLOCKED], POLICY_CHANGED),
        ([SITE, REST_BLOCKED], [domain("*.example", "Allow"), REST_BLOCKED], GOES_ON),
        ([SITE, REST_BLOCKED], [cidr("192.0.2.10/32"), SITE, REST_BLOCKED], POLICY_CHANGED),
        (
            [SITE, REST_BLOCKED],
            [domain("site.example", "Block", mode="Audit") | {"name": "dry"}, SITE, REST_BLOCKED],
            GOES_ON,
        ),
        ([SITE, REST_BLOCKED], [domain("site.example", "Route", route=ROUTED), REST_BLOCKED], POLICY_CHANGED),
        ([domain("site.example", "Route", route=ROUTED)], [domain("*.example", "Route", route=ROUTED)], GOES_ON),
        ([domain("site.example", "Route", route=ROUTED)], [SITE], POLICY_CHANGED),
    ],
)
def test_a_connection_is_decided_again_with_the_name_it_asked_for(before: Any, after: Any, expected: int) -> None:
    judge = judge_of(policies(before))
    live = session(judge)
    assert (live.opened(), live.received(hello("site.example"))) == (WAIT, DIAL)
    change(judge, policies(after))
    assert live.review() == expected
    assert live.identity is not None
    assert live.identity.revision == judge.enforced.revision
    assert (live.verdict.action is Action.BLOCK) <= (expected == POLICY_CHANGED)
    assert live.review() == GOES_ON  # once for each change


def test_a_record_names_the_rule_that_ended_it_or_that_decided_it_last() -> None:
    judge = judge_of(policies([SITE, REST_BLOCKED]))
    live = session(judge)
    assert live.received(hello("site.example")) == DIAL
    change(judge, policies([domain("*.example", "Allow"), REST_BLOCKED]))
    assert live.review() == GOES_ON
    assert live.verdict.rule is not None and live.verdict.rule.rule == "example"
    change(judge, policies([REST_BLOCKED]))
    assert live.review() == POLICY_CHANGED
    assert live.verdict.rule is not None
    assert live.verdict.rule.rule == "rest"
    assert live.tally is judge.tallies.of(live.verdict)


def test_a_name_that_was_never_read_counts_as_absent() -> None:
    judge = judge_of(policies([ALLOWED, SITE, REST_BLOCKED]))
    live = session(judge)
    assert live.opened() == DIAL
    change(judge, policies([NO_SITE, ALLOWED, REST_BLOCKED]))
    assert live.review() == GOES_ON
    change(judge, policies([SITE, REST_BLOCKED]))
    assert live.review() == POLICY_CHANGED


def test_plain_http_that_nobody_looks_at_ends_when_its_requests_would_need_to_be() -> None:
    judge = judge_of(policies([ALLOWED]))
    live = session(judge, 80)
    assert live.received(get("fine.example")) == DIAL
    assert live.guard is None
    change(judge, policies([NO_SITE, ALLOWED]))
    assert live.review() == POLICY_CHANGED


def test_a_connection_of_another_pod_ends_whatever_the_policies_say() -> None:
    everything = [{"match": {}, "action": "Allow"}]
    for before, after, expected in (
        ({"uid": "1"}, {"uid": "1", "pod": "renamed"}, GOES_ON),
        ({"uid": "1"}, {"uid": "2"}, POD_CHANGED),
        ({"uid": ""}, {"uid": "2"}, GOES_ON),
        ({"pod": "web"}, {"pod": "api"}, POD_CHANGED),
        ({"pod": "web"}, {"pod": "web", "namespace": "shop"}, POD_CHANGED),
        ({"pod": "web"}, {"pod": None}, POD_CHANGED),
        ({"pod": None}, {"pod": "web"}, GOES_ON),
    ):
        for keep in ((), (0,)):
            judge = judge_of(policies(everything, keep=keep, **before))
            live, waiting = session(judge), session(judge)
            assert live.opened() == DIAL
            assert waiting.opened() == DIAL
            change(judge, policies(everything, keep=keep, **after))
            assert live.review() == expected, (before, after)


def test_one_that_waits_for_its_name_is_decided_by_the_policy_that_came_unless_its_pod_went() -> None:
    judge = judge_of(policies([SITE, REST_BLOCKED]))
    waiting = session(judge)
    assert waiting.opened() == WAIT
    change(judge, policies([NO_SITE, REST_BLOCKED]))
    assert waiting.review() == GOES_ON
    assert waiting.received(hello("site.example")) == REFUSE
    late = session(judge)
    assert late.opened() == WAIT
    change(judge, policies([SITE, REST_BLOCKED], pod="other"))
    assert late.received(hello("site.example")) == REFUSE  # before its turn of review
    assert late.review() == POD_CHANGED


def test_keep_is_of_the_policy_whose_rule_decided_and_of_the_default_where_all_say_so() -> None:
    other = [domain("other.example", "Allow")]
    for keep, name, expected in (
        ((0,), "site.example", GOES_ON),
        ((1,), "site.example", POLICY_CHANGED),
        ((1,), "other.example", GOES_ON),
        ((0,), "other.example", POLICY_CHANGED),
        ((0,), "third.example", POLICY_CHANGED),  # the default action
        ((0, 1), "third.example", GOES_ON),
    ):
        judge = judge_of(policies([SITE], other, keep=keep))
        live = session(judge)
        assert live.received(hello(name)) == DIAL
        change(judge, policies([REST_BLOCKED]))
        assert live.review() == expected, (keep, name)


def test_later_requests_are_decided_by_the_policy_in_force_or_by_the_one_that_is_kept() -> None:
    for keep, expected in (((), False), ((0,), True)):
        judge = judge_of(policies([domain("*.example", "Allow"), REST_BLOCKED], keep=keep))
        live = session(judge, 80)
        assert live.received(get("one.example")) == DIAL
        assert live.guard is not None
        change(judge, policies([domain("one.example", "Allow"), REST_BLOCKED]))
        assert live.review() == GOES_ON
        passed, refused = live.feed(get("two.example"))
        assert (bool(passed), refused is None) == (expected, expected), keep


def test_deciding_again_agrees_with_deciding_anew() -> None:
    seed = 11
    draw = random.Random(seed)
    names = ["a.example", "b.example", "c.a.example", "d.test"]

    def rules() -> list[dict[str, Any]]:
        made = []
        for at in range(draw.randint(1, 4)):
            action = draw.choice(("Allow", "Block"))
            rule = (
                domain(draw.choice([*names, "*.example"]), action)
                if draw.random() < 0.7
                else cidr(f"192.0.2.{draw.choice((0, 8, 10))}/32", action)
            )
            made.append(rule | {"name": f"r{at}"})
        return made

    for _ in range(150):
        judge = judge_of(policies(rules()))
        live = [session(judge, server=draw.choice(("192.0.2.10", "192.0.2.8"))) for _ in range(4)]
        asked = [draw.choice(names) for _ in live]
        going = [(each, name) for each, name in zip(live, asked, strict=True) if each.received(hello_of(name)) == DIAL]
        change(judge, policies(rules()))
        for each, name in going:
            anew = Session(judge, each.source, each.destination, each.port)
            expected = GOES_ON if anew.received(hello_of(name)) == DIAL else POLICY_CHANGED
            assert each.review() == expected, (seed, name)
            assert each.verdict == anew.verdict


_HELLOS: dict[str, bytes] = {}


def hello_of(name: str) -> bytes:
    if name not in _HELLOS:
        _HELLOS[name] = hello(name)
    return _HELLOS[name]
