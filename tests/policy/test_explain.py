"""An explanation's verdict is the data path's, and why an earlier rule did not decide is true of it."""

from __future__ import annotations

import ipaddress
from random import Random

import msgspec
import pytest

from pellucid_policy.compile import PolicySet, compile_policies
from pellucid_policy.decide import decide
from pellucid_policy.explain import (
    EXCLUDED,
    KERNEL,
    NOT_SELECTED,
    OUT_OF_SCOPE,
    PROXY,
    QUIC_REJECTED,
    Node,
    considered,
    outcome,
    regions,
    rules_of,
)
from pellucid_policy.facts import ABSENT, TCP, UDP, UNKNOWN, Facts
from pellucid_policy.objects import Objects
from pellucid_policy.parse import parse_files
from pellucid_policy.verdict import NeedName, Reason

from . import generate

SEEDS = range(40)
EVERYWHERE = Node(("0.0.0.0/0", "::/0"))
POD = b"\x0a\0\0\7"
TEXT = """
apiVersion: pellucid.dev/v1alpha1
kind: TransparentPolicy
metadata: {name: p}
spec:
  podSelector: {}
  rules:
  - {name: door, match: {destinations: [{cidr: 192.0.2.0/25}]}, action: Block}
  - {name: mail, match: {destinations: [{cidr: 192.0.2.0/24}], ports: [{port: 25}]}, action: Allow}
  - {name: trial, match: {destinations: [{domain: a.example}]}, action: Block, mode: Audit}
  - {name: other, match: {destinations: [{domain: b.example}], ports: [{port: 80}]}, action: Block}
  - {name: a, match: {destinations: [{domain: a.example}]}, action: Allow}
"""


def read(text: str) -> tuple[Objects, PolicySet]:
    objects = parse_files({"p.yaml": text.encode()})
    assert isinstance(objects, Objects), objects
    return objects, compile_policies(objects)


def address(text: str) -> bytes:
    return ipaddress.ip_address(text).packed


@pytest.mark.parametrize("seed", SEEDS)
def test_an_outcome_is_that_of_the_data_path(seed: int) -> None:
    """Of TCP what decide says, whoever decides it; of the rest what decide says of a flow without a name, but for Route."""
    random = Random(seed)
    policies = compile_policies(generate.objects(random), default_action=random.choice(("Allow", "Block")))
    for number, group in enumerate(policies.groups):
        for _ in range(50):
            facts = generate.facts(random)
            said = outcome(policies, EVERYWHERE, POD, number, facts)
            if facts.protocol == TCP:
                verdict = decide(group.enforced, facts)
                waits = isinstance(verdict, NeedName) or (
                    said.decided_by == PROXY
                    and group.audited is not None
                    and isinstance(decide(group.audited, facts), NeedName)
                )
                assert (said.verdict is None) == waits
                if said.verdict is not None and not isinstance(verdict, NeedName):
                    assert (said.verdict.action, said.verdict.rule, said.reason) == (
                        verdict.action,
                        verdict.rule,
                        verdict.reason.value,
                    )
            elif said.reason not in (QUIC_REJECTED, Reason.NOT_ROUTABLE.value):
                verdict = decide(
                    group.enforced, msgspec.structs.replace(facts, name=ABSENT, encrypted=False, mismatch=False)
                )
                assert said.verdict is not None
                assert not isinstance(verdict, NeedName)
                assert (said.decided_by, said.verdict.action, said.verdict.rule) == (
                    KERNEL,
                    verdict.action,
                    verdict.rule,
                )


@pytest.mark.parametrize("seed", SEEDS)
def test_no_rule_before_the_one_that_decided_would_have_decided(seed: int) -> None:
    """considered() tells of every rule before, ends there, and none of them is enforced, matching and not skipped by Pass."""
    random = Random(seed)
    objects = generate.objects(random)
    policies = compile_policies(objects, default_action="Allow")
    for group in policies.groups:
        tiers = rules_of(objects, group)
        order = [rule.key for tier in tiers for rule in tier]
        for _ in range(20):
            facts = generate.facts(random)
            verdict = decide(group.enforced, facts)
            rule = None if isinstance(verdict, NeedName) else verdict.rule
            before = considered(tiers, facts, rule)
            if isinstance(verdict, NeedName):
                assert before
                assert "asks for the name" in before[-1].why
            else:
                skipped = order.index(rule) if rule is not None else len(order)
                assert [each.rule for each in before] == order[:skipped]
            for each in before:
                assert not each.why.startswith("matches") or each.audit or each.action == "Pass"


@pytest.mark.parametrize("seed", SEEDS)
def test_regions_cover_every_address_once_and_hold_for_each(seed: int) -> None:
    random = Random(seed)
    policies = compile_policies(generate.objects(random), default_action="Allow")
    for number in (*range(len(policies.groups)), None):
        for version, size in ((4, 4), (6, 16)):
            facts = generate.facts(random)
            found = regions(policies, EVERYWHERE, number, facts, version)
            assert found is not None
            ends = [int.from_bytes(each.last, "big") + 1 for each in found]
            assert [int.from_bytes(each.first, "big") for each in found] == [0, *ends[:-1]]
            assert ends[-1] == 1 << (8 * size)
            for each in found:
                for at in (each.first, each.last):
                    flow = msgspec.structs.replace(facts, address=at)
                    assert outcome(policies, EVERYWHERE, POD, number, flow) == each.outcome


def test_the_way_ends_before_any_policy_out_of_scope_or_excluded_or_unselected() -> None:
    _, policies = read(TEXT)
    node = Node(("10.0.0.0/8",), ("192.0.2.7/32",), frozenset({address("192.0.2.9")}))
    door = Facts(address("192.0.2.1"), 80, name=ABSENT)
    excluded = Facts(address("192.0.2.7"), 80, name=ABSENT)
    assert outcome(policies, node, address("172.16.0.1"), 0, door).reason == OUT_OF_SCOPE
    assert outcome(policies, node, POD, 0, excluded).reason == EXCLUDED
    assert outcome(policies, node, POD, None, door).reason == NOT_SELECTED
    assert outcome(policies, node, POD, 0, door).reason == "RuleMatched"


def test_what_ends_on_the_node_is_decided_without_a_name() -> None:
    _, policies = read(TEXT)
    node = Node(("10.0.0.0/8",), (), frozenset({address("203.0.113.9")}))
    named = Facts(address("203.0.113.9"), 80, name="a.example")
    said = outcome(policies, node, POD, 0, named)
    assert (said.decided_by, said.rules, said.reason) == (KERNEL, "nameless", "DefaultAction")
    assert (
        outcome(policies, node, POD, 0, msgspec.structs.replace(named, address=address("203.0.113.8"))).decided_by
        == PROXY
    )


def test_quic_is_refused_ahead_of_the_rules() -> None:
    _, policies = read(TEXT)
    assert outcome(policies, EVERYWHERE, POD, 0, Facts(address("192.0.2.200"), 443, UDP)).reason == QUIC_REJECTED
    assert outcome(policies, EVERYWHERE, POD, 0, Facts(address("192.0.2.200"), 444, UDP)).reason == "DefaultAction"


def test_why_an_earlier_rule_did_not_decide_names_what_missed() -> None:
    objects, policies = read(TEXT)
    tiers = rules_of(objects, policies.groups[0])
    facts = Facts(address("192.0.2.200"), 443, name="a.example")
    decided = decide(policies.groups[0].enforced, facts)
    assert not isinstance(decided, NeedName)
    assert [(each.rule.rule, each.why, each.near) for each in considered(tiers, facts, decided.rule)] == [
        ("door", "192.0.2.200 is not in 192.0.2.0/25", True),
        ("mail", "it is for TCP 25, not TCP 443", True),
        ("trial", "matches, but is in mode Audit: recorded, not acted on", True),
        ("other", "it is for TCP 80, not TCP 443; a.example is not b.example", False),
    ]
    unknown = considered(tiers, msgspec.structs.replace(facts, name=UNKNOWN), None)
    assert [each.rule.rule for each in unknown] == ["door", "mail", "trial", "other", "a"]
    assert unknown[-1].why == "asks for the name, which is not known"
    assert unknown[2].why == "asks for the name, which is not known, but is in mode Audit: recorded, not acted on"
