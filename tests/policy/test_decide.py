"""decide as tables: each row a flow, each allow beside its nearest deny; then the same by the reference model and in general."""

from __future__ import annotations

import ipaddress
from random import Random
from typing import TypeVar

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid_policy.compile import PolicySet, compile_policies, decode, encode
from pellucid_policy.decide import decide
from pellucid_policy.facts import ABSENT, ICMP, ICMPV6, TCP, UDP, UNKNOWN, Facts, Unnamed
from pellucid_policy.model import TransparentPolicy
from pellucid_policy.objects import Objects, collect
from pellucid_policy.parse import parse_files
from pellucid_policy.verdict import NEED_NAME, Action, Verdict

from . import algebra, generate
from .reference import Outcome, Reference, outcome_of

T = TypeVar("T")

POLICY = """
apiVersion: pellucid.dev/v1alpha1
kind: ClusterTransparentPolicy
metadata: {name: admin}
spec:
  tier: Admin
  podSelector: {}
  rules:
  - {name: metadata, match: {destinations: [{cidr: 169.254.169.254/32}]}, action: Block}
  - {name: site-passes, match: {destinations: [{domain: pass.example}]}, action: Pass}
  - {name: net-passes, match: {destinations: [{cidr: 198.51.100.0/24}]}, action: Pass}
  - {name: not-198, match: {destinations: [{cidr: 198.51.0.0/16}, {domain: "*.pass.example"}]}, action: Block, block: {response: Drop}}
---
apiVersion: pellucid.dev/v1alpha1
kind: TransparentPolicy
metadata: {name: own}
spec:
  podSelector: {}
  rules:
  - {name: dns, match: {ports: [{port: 53, protocol: UDP}]}, action: Allow}
  - {name: ping, match: {ports: [{protocol: ICMP}]}, action: Allow}
  - {name: exact, match: {destinations: [{domain: example.com}], ports: [{port: 443}]}, action: Allow}
  - {name: below, match: {destinations: [{domain: "*.example.com"}], ports: [{port: 443}]}, action: Block}
  - {name: range, match: {destinations: [{cidr: 192.0.2.0/25}], ports: [{port: 8000, endPort: 8009}]}, action: Allow}
  - {name: tried, match: {destinations: [{cidr: 203.0.113.0/24}]}, action: Block, mode: Audit}
  - {name: mixed, match: {destinations: [{domain: late.example}, {cidr: "2001:db8::/32"}]}, action: Allow}
---
apiVersion: pellucid.dev/v1alpha1
kind: ClusterTransparentPolicy
metadata: {name: base}
spec:
  tier: Baseline
  podSelector: {}
  rules: [{name: rest, match: {}, action: Block, block: {response: Respond, status: 451, body: "no"}}]
"""
STRICT = POLICY.replace(
    "  podSelector: {}\n", "  podSelector: {}\n  names: {missingSNI: Block, encryptedClientHello: Block}\n"
)
LAX = POLICY.replace("  podSelector: {}\n", "  podSelector: {}\n  names: {hostMismatch: Continue}\n")


def compiled(text: str) -> PolicySet:
    objects = parse_files({"a.yaml": text.encode()})
    assert isinstance(objects, Objects), [str(each) for each in objects]
    return compile_policies(objects)


def said(text: str, address: str, port: int, name: str | Unnamed, protocol: int = TCP, **flags: bool) -> str:
    """The rule or reason that decides a stranger's flow, with a minus for a refusal."""
    policies = compiled(text)
    assert policies.strangers is not None
    facts = Facts(ipaddress.ip_address(address).packed, port, protocol, name, **flags)
    verdict = decide(policies.groups[policies.strangers].enforced, facts)
    if not isinstance(verdict, Verdict):
        return "need"
    told = verdict.rule.rule if verdict.rule else ""
    if verdict.reason != "RuleMatched":
        told = f"{told} {verdict.reason}".strip()
    return f"-{told}" if verdict.action is Action.BLOCK else told


@pytest.mark.parametrize(("address", "port", "name", "protocol", "expected"), [
    ("192.0.2.1", 443, "example.com", TCP, "exact"),
    ("192.0.2.1", 443, "a.example.com", TCP, "-below"),
    ("192.0.2.1", 443, "xexample.com", TCP, "-rest"),
    ("192.0.2.1", 444, "example.com", TCP, "-rest"),
    ("192.0.2.1", 443, "example.com", UDP, "-rest"),
    ("192.0.2.1", 53, ABSENT, UDP, "dns"),
    ("192.0.2.1", 53, ABSENT, TCP, "-rest"),
    ("192.0.2.1", 54, ABSENT, UDP, "-rest"),
    ("192.0.2.1", 0, ABSENT, ICMP, "ping"),
    ("2001:db9::1", 0, ABSENT, ICMPV6, "ping"),
    ("192.0.2.1", 0, ABSENT, 47, "-rest"),
    ("192.0.2.127", 8000, ABSENT, TCP, "range"),
    ("192.0.2.127", 8009, ABSENT, TCP, "range"),
    ("192.0.2.127", 8010, ABSENT, TCP, "-rest"),
    ("192.0.2.127", 7999, ABSENT, TCP, "-rest"),
    ("192.0.2.128", 8000, ABSENT, TCP, "-rest"),
    ("169.254.169.254", 80, "example.com", TCP, "-metadata"),
    ("169.254.169.254", 80, UNKNOWN, TCP, "-metadata"),
    ("169.254.169.253", 80, UNKNOWN, TCP, "need"),
    ("198.51.100.1", 443, "example.com", TCP, "exact"),
    ("198.51.101.1", 443, "example.com", TCP, "-not-198"),
    ("198.51.101.1", 443, "pass.example", TCP, "-rest"),
    ("192.0.2.1", 443, "a.pass.example", TCP, "-not-198"),
    ("203.0.113.1", 80, ABSENT, TCP, "-rest"),
    ("2001:db8::1", 80, ABSENT, TCP, "mixed"),
    ("2001:db9::1", 80, ABSENT, TCP, "-rest"),
    ("192.0.2.1", 80, "late.example", TCP, "mixed"),
    ("192.0.2.1", 443, UNKNOWN, TCP, "need"),
    ("192.0.2.1", 443, UNKNOWN, UDP, "-rest"),
])  # fmt: skip
def test_the_first_rule_that_matches_wins(
    address: str, port: int, name: str | Unnamed, protocol: int, expected: str
) -> None:
    assert said(POLICY, address, port, name, protocol) == expected


@pytest.mark.parametrize(("text", "name", "flags", "expected"), [
    (POLICY, ABSENT, {}, "-rest"),
    (STRICT, ABSENT, {}, "-site-passes NameMissing"),
    (POLICY, "example.com", {"encrypted": True}, "exact"),
    (STRICT, "example.com", {"encrypted": True}, "-site-passes EncryptedClientHello"),
    (POLICY, "example.com", {"mismatch": True}, "-site-passes HostMismatch"),
    (POLICY, UNKNOWN, {"mismatch": True}, "-site-passes HostMismatch"),
    (LAX, "example.com", {"mismatch": True}, "-rest"),
    (STRICT, "example.com", {"mismatch": True, "encrypted": True}, "-site-passes HostMismatch"),
])  # fmt: skip
def test_a_name_that_cannot_be_trusted_follows_names(
    text: str, name: str | Unnamed, flags: dict[str, bool], expected: str
) -> None:
    assert said(text, "192.0.2.1", 443, name, TCP, **flags) == expected


@pytest.mark.parametrize("text", [POLICY, STRICT, LAX])
@pytest.mark.parametrize("flags", [{}, {"encrypted": True}, {"mismatch": True}])
def test_what_addresses_decide_first_asks_for_no_name(text: str, flags: dict[str, bool]) -> None:
    assert said(text, "169.254.169.254", 443, ABSENT, TCP, **flags) == "-metadata"


def test_an_audit_rule_acts_in_the_audited_program_only() -> None:
    group = compiled(POLICY).groups[0]
    facts = Facts(ipaddress.ip_address("203.0.113.1").packed, 80, TCP, ABSENT)
    assert group.audited is not None
    verdicts = [decide(program, facts) for program in (group.enforced, group.audited)]
    assert [each.rule.rule for each in verdicts if isinstance(each, Verdict) and each.rule] == ["rest", "tried"]


def test_no_rule_means_the_default_action() -> None:
    objects = collect([_policy({"destinations": [{"cidr": "192.0.2.0/24"}]}, "Allow")], {})
    facts = Facts(ipaddress.ip_address("198.51.100.1").packed, 443, TCP, ABSENT)
    for default in ("Allow", "Block"):
        group = compile_policies(objects, default_action=default).groups[0]
        assert outcome_of(decide(group.enforced, facts))[:2] == (default, "DefaultAction")


def _policy(match: object, action: str) -> TransparentPolicy:
    spec = {"podSelector": {}, "rules": [{"match": match, "action": action}]}
    return msgspec.convert({"metadata": {"name": "p"}, "spec": spec}, TransparentPolicy)


# --- in general

randoms = st.randoms(use_true_random=False)


def outcomes(objects: Objects, flows: list[Facts], default: str = "Allow") -> list[list[Outcome]]:
    """For each pod the outcome of each flow; a pod that no policy selects allows."""
    policies = compile_policies(objects, default_action=default)
    return [
        [("Allow",) if pod.group is None else outcome_of(decide(policies.groups[pod.group].enforced, flow)) for flow in flows]
        for pod in policies.pods
    ]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(randoms)
def test_decide_equals_the_reference_model_at_every_stage(random: Random) -> None:
    objects = generate.objects(random)
    policies, reference = compile_policies(objects), Reference(objects)
    for pod, compiled_pod in zip(objects.pods, policies.pods, strict=True):
        if compiled_pod.group is None:
            assert reference.policies_of(pod) == []
            continue
        program, mine = policies.groups[compiled_pod.group].enforced, reference.policies_of(pod)
        flow = generate.facts(random)
        for name in (UNKNOWN, ABSENT, random.choice(generate.NAMES)):
            staged = msgspec.structs.replace(flow, name=name)
            assert outcome_of(decide(program, staged)) == reference.decide(mine, staged)


@settings(max_examples=150, deadline=None)
@given(randoms)
def test_a_verdict_without_the_name_is_the_verdict_with_any_name(random: Random) -> None:
    for group in compile_policies(generate.objects(random)).groups:
        flow = msgspec.structs.replace(generate.facts(random), name=UNKNOWN, encrypted=False, mismatch=False)
        early = decide(group.enforced, flow)
        later = [
            decide(group.enforced, msgspec.structs.replace(flow, name=name, encrypted=encrypted, mismatch=mismatch))
            for name in (ABSENT, *generate.NAMES) for encrypted in (False, True) for mismatch in (False, True)
        ]  # fmt: skip
        assert NEED_NAME not in later, "a name, or knowing that there is none, is enough"
        if early is not NEED_NAME:
            assert all(each == early for each in later)


@settings(max_examples=150, deadline=None)
@given(randoms)
def test_a_name_is_asked_for_only_where_one_could_matter(random: Random) -> None:
    """With one rule that asks and one that does not: the name is asked for exactly where it changes the verdict."""
    ports = [{"port": random.choice(generate.FLOW_PORTS)}]
    asks = {"match": {"destinations": [{"domain": "example.com"}], "ports": ports}, "action": "Block"}
    other = {"match": {"destinations": [{"cidr": random.choice(generate.CIDRS)}]}, "action": "Allow"}
    order = [asks, other] if random.random() < 0.5 else [other, asks]
    policy = msgspec.convert(
        {"metadata": {"name": "p"}, "spec": {"podSelector": {}, "rules": order}}, TransparentPolicy
    )
    group = compile_policies(collect([policy], {})).groups[0]
    flow = msgspec.structs.replace(generate.facts(random), name=UNKNOWN, encrypted=False, mismatch=False)
    changes = decide(group.enforced, msgspec.structs.replace(flow, name="example.com")) != decide(
        group.enforced, msgspec.structs.replace(flow, name=ABSENT)
    )
    assert (decide(group.enforced, flow) is NEED_NAME) == changes


@settings(max_examples=100, deadline=None)
@given(randoms)
def test_the_order_of_objects_does_not_matter(random: Random) -> None:
    objects = generate.objects(random)

    def mixed(each: tuple[T, ...]) -> tuple[T, ...]:
        return tuple(random.sample(each, len(each)))

    again = Objects(
        mixed(objects.policies), mixed(objects.cluster_policies), mixed(objects.pods), mixed(objects.namespaces)
    )
    assert compile_policies(again) == compile_policies(objects)


@settings(max_examples=150, deadline=None)
@given(randoms)
def test_adding_a_deny_never_widens(random: Random) -> None:
    """A rule that blocks is put anywhere, or a policy of one is added: every flow keeps its outcome, is refused, or waits for its name."""
    manifests = [generate.manifest(random, number) for number in range(random.randint(1, 3))]
    deny = {**generate.rule(random, ("Block",)), "mode": "Enforce"}
    before = collect([*generate.PODS, *map(generate.typed, manifests)], {})
    if random.random() < 0.5:
        rules = random.choice(manifests)["spec"]["rules"]
        for number, rule in enumerate(rules):  # a rule without a name is called by its place, which moves
            rule["name"] = f"r{number}"
        before = collect([*generate.PODS, *map(generate.typed, manifests)], {})
        rules.insert(random.randint(0, len(rules)), deny)
    else:
        added = generate.manifest(random, 9)
        added["spec"]["rules"] = [deny]
        manifests.append(added)
    after = collect([*generate.PODS, *map(generate.typed, manifests)], {})
    flows = [generate.facts(random) for _ in range(30)]
    default = random.choice(("Allow", "Block"))
    for old, new in zip(outcomes(before, flows, default), outcomes(after, flows, default), strict=True):
        for flow, was, now in zip(flows, old, new, strict=True):
            assert now == was or now[0] in ("Block", "N") or (was == ("Allow",) and now[0] == "Allow"), flow


@settings(max_examples=100, deadline=None)
@given(randoms)
def test_a_policy_set_survives_msgpack_and_keeps_its_revision(random: Random) -> None:
    policies = compile_policies(generate.objects(random))
    assert decode(encode(policies)) == policies
    changed = compile_policies(generate.objects(random))
    assert (changed.revision == policies.revision) == (changed == policies)


def test_the_algebra_agrees_in_a_short_run() -> None:
    tally = algebra.run(20_000, seed=1)
    assert tally.mismatches == []
    assert tally.need > 500
    assert tally.kernel > 5_000
