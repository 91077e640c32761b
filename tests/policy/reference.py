"""The meaning of a policy, read off docs/policy.md rule by rule: no index, no compiling, no code of the product but its types.

Slow and plain on purpose. What it answers is an Outcome, the comparable part of a verdict.
"""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from functools import cache
from typing import Any

from msgspec import UNSET

from pellucid_policy.facts import ABSENT, UNKNOWN, Facts
from pellucid_policy.meta import LabelSelector, Pod
from pellucid_policy.model import ClusterTransparentPolicy, Policy, Rule, TransparentPolicy
from pellucid_policy.objects import Objects
from pellucid_policy.verdict import NeedName, Verdict

NEED = "NEED"
PROTOCOLS = {"TCP": (6,), "UDP": (17,), "SCTP": (132,), "ICMP": (1, 58)}
TIERS = ("Admin", "Application", "Baseline")

Outcome = str | tuple[Any, ...]
"""NEED, or (action, reason, policy kind, namespace, policy, rule, response, status, body, route, source address)."""


def outcome_of(verdict: Verdict | NeedName) -> Outcome:
    """Return the product's answer in the reference's form."""
    if isinstance(verdict, NeedName):
        return NEED
    key = verdict.rule
    route = verdict.route
    via = None if route is None or route.via is None else (route.via.protocol, route.via.address, route.via.port)
    return (
        str(verdict.action), str(verdict.reason), *(("", "", "", "") if key is None else (key.kind, key.namespace, key.policy, key.rule)),
        str(verdict.response), verdict.status, verdict.body,
        None if route is None else (route.address, route.port, via), verdict.source_address,
    )  # fmt: skip


@dataclass
class Reference:
    """All objects of a node. default: Allow or Block."""

    objects: Objects
    default: str = "Allow"

    def policies_of(self, pod: Pod) -> list[Policy]:
        """Return the policies that select the pod, in order. A host-network pod has none."""
        if pod.spec.host_network:
            return []
        every: tuple[Policy, ...] = (*self.objects.policies, *self.objects.cluster_policies)
        mine = [p for p in every if self._selects(p, pod)]
        mine.sort(key=_called)
        mine.sort(key=_age)
        mine.sort(key=lambda p: p.spec.priority)
        mine.sort(key=lambda p: TIERS.index(_tier(p)))
        return mine

    def _selects(self, policy: Policy, pod: Pod) -> bool:
        labels = pod.metadata.labels or {}
        if isinstance(policy, TransparentPolicy):
            return (policy.metadata.namespace or "default") == pod.metadata.namespace and _selected(
                policy.spec.pod_selector, labels
            )
        spec = policy.spec
        if not (spec.pod_selector is UNSET or _selected(spec.pod_selector, labels)):
            return False
        if spec.namespace_selector is not UNSET:
            of_namespace: dict[str, str] = {}
            for each in self.objects.namespaces:
                if each.metadata.name == pod.metadata.namespace:
                    of_namespace.update(each.metadata.labels or {})
            of_namespace["kubernetes.io/metadata.name"] = pod.metadata.namespace
            if not _selected(spec.namespace_selector, of_namespace):
                return False
        if spec.service_accounts is not UNSET:
            account = (pod.metadata.namespace, pod.spec.service_account_name)
            return account in [(each.namespace, each.name) for each in spec.service_accounts]
        return True

    def decide(self, policies: list[Policy], facts: Facts, audited: bool = False) -> Outcome:
        """Return the outcome for a flow of a pod with these policies. audited: Audit rules act too."""
        for tier in TIERS:
            for policy in policies:
                if _tier(policy) != tier:
                    continue
                answer = _in_policy(policy, facts, audited)
                if answer == "PASS":
                    break
                if answer is not None:
                    return answer
        return (self.default, "DefaultAction", "", "", "", "", "Reset", 403, "", None, None)


def _tier(policy: Policy) -> str:
    return policy.spec.tier.value if isinstance(policy, ClusterTransparentPolicy) else "Application"


def _called(policy: Policy) -> str:
    namespace = (policy.metadata.namespace or "default") if policy.kind == "TransparentPolicy" else ""
    return f"{namespace}/{policy.metadata.name}"


def _age(policy: Policy) -> tuple[int, datetime.datetime]:
    written = policy.metadata.creation_timestamp
    if not written:
        return 1, datetime.datetime.min.replace(tzinfo=datetime.UTC)
    return 0, datetime.datetime.fromisoformat(written)


def _selected(selector: LabelSelector, labels: dict[str, str]) -> bool:
    for key, value in (selector.match_labels or {}).items():
        if key not in labels or labels[key] != value:
            return False
    for each in selector.match_expressions or ():
        there = each.key in labels
        among = there and labels[each.key] in (each.values or ())
        if not {"In": among, "NotIn": not among, "Exists": there, "DoesNotExist": not there}[each.operator.value]:
            return False
    return True


def _in_policy(policy: Policy, facts: Facts, audited: bool) -> Outcome | None:
    """Return the outcome, PASS, or None where no rule of the policy matches."""
    for index, rule in enumerate(policy.spec.rules):
        mode = rule.mode or policy.spec.mode
        if mode == "Audit" and not audited:
            continue
        who = (policy.kind, policy.namespace, policy.metadata.name, rule.name or f"rules[{index}]")
        if not _ports_match(rule, facts):
            continue
        if _matches_by_address(rule, facts):
            return _acted(rule, who)
        answer = _asked(policy, rule, facts, who)
        if answer is not None:
            return answer
    return None


def _ports_match(rule: Rule, facts: Facts) -> bool:
    if not rule.match.ports:
        return True
    for entry in rule.match.ports:
        if facts.protocol not in PROTOCOLS[entry.protocol or "TCP"]:
            continue
        if not entry.port or entry.port <= facts.port <= (entry.end_port or entry.port):
            return True
    return False


@cache
def _network(text: str) -> tuple[int, int, int]:
    """Bits of the family, the address as a number, prefix length."""
    address, _, length = text.partition("/")
    packed = ipaddress.ip_address(address).packed
    return 8 * len(packed), int.from_bytes(packed, "big"), int(length)


def _matches_by_address(rule: Rule, facts: Facts) -> bool:
    if not rule.match.destinations:
        return True
    bits_of_flow, number = 8 * len(facts.address), int.from_bytes(facts.address, "big")
    for each in rule.match.destinations:
        if each.cidr:
            bits, network, length = _network(each.cidr)
            if bits == bits_of_flow and (number ^ network) >> (bits - length) == 0:
                return True
    return False


def _asked(policy: Policy, rule: Rule, facts: Facts, who: tuple[str, ...]) -> Outcome | None:
    """A rule that could match only by a name: what comes of asking for it."""
    domains = [each.domain for each in rule.match.destinations or () if each.domain]
    if not domains or facts.protocol != 6:
        return None
    names = policy.spec.names
    if facts.name is UNKNOWN and not facts.mismatch:
        return NEED
    if facts.mismatch and names.host_mismatch == "Block":
        return ("Block", "HostMismatch", *who, "Respond", 421, "", None, None)
    if facts.encrypted and names.encrypted_client_hello == "Block":
        return ("Block", "EncryptedClientHello", *who, "Reset", 403, "", None, None)
    if facts.name is ABSENT or facts.mismatch:
        return ("Block", "NameMissing", *who, "Reset", 403, "", None, None) if names.missing_sni == "Block" else None
    return _acted(rule, who) if any(_same_domain(domain, str(facts.name)) for domain in domains) else None


def _same_domain(pattern: str, name: str) -> bool:
    wanted, given = pattern.lower().rstrip(".").split("."), name.split(".")
    if wanted[0] != "*":
        return wanted == given
    below = wanted[1:]
    return len(given) > len(below) and given[-len(below) :] == below


def _acted(rule: Rule, who: tuple[str, ...]) -> Outcome:
    action = rule.action.value
    if action == "Pass":
        return "PASS"
    response, status, body, route = "Reset", 403, "", None
    if rule.block:
        response, status, body = rule.block.response.value, rule.block.status or 403, rule.block.body or ""
    if rule.route:
        to, via = rule.route.to, rule.route.via
        route = (
            ipaddress.ip_address(to.address).packed if to and to.address else None,
            to.port if to and to.port else None,
            (via.protocol.value, ipaddress.ip_address(via.address).packed, via.port) if via else None,
        )
    source = rule.egress.source_address.value if rule.egress and rule.egress.source_address else None
    return (action, "RuleMatched", *who, response, status, body, route, source)
