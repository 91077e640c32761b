"""Why a flow is decided as it is: the way from its first packet to its verdict, as a value. Pure.

There is no second evaluator here: a verdict comes from `decide`, or from the first match of the rules that were compiled for the kernel
(kernel_rules.py). Why a rule did not match is asked of `decide`, too: with that rule alone, and with its ports or its destinations
widened to everything.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import msgspec

from . import index
from .decide import decide
from .facts import ICMP, ICMPV6, SCTP, TCP, UDP, Facts, Unnamed
from .model import Policy
from .objects import Objects
from .plan import AddressRule, PortRange
from .prepare import Network, Prepared, prepare
from .program import Group, PolicySet, Program
from .selection import tier_of
from .verdict import NEED_NAME, Action, NeedName, Reason, Response, RuleKey, Verdict

QUIC_PORT = 443
MAX_CONSIDERED = 2000
"""Rules that are asked why they did not match, the last ones before the one that decided; each costs a tenth of a millisecond."""
MAX_REGIONS = 8192
"""Parts of the address space that are looked at where the destination's address is not known."""

OUT_OF_SCOPE, EXCLUDED, NOT_SELECTED, QUIC_REJECTED = (
    "OutOfScope",
    "Excluded",
    Reason.NOT_SELECTED.value,
    "QuicRejected",
)
"""Reasons of the kernel's that no rule of a policy has: the source is no pod's; the destination is never taken; no policy selects the pod;
UDP 443 by names.quic: Reject."""

KERNEL, PROXY = "kernel", "proxy"
LEADING, NAMELESS = "leading", "nameless"

_NOT_MATCHED = Verdict(Action.ALLOW, Reason.DEFAULT_ACTION)
_PASSES = Verdict(Action.ALLOW, Reason.RULE_MATCHED)  # stands for Pass, which has no verdict
_PROTOCOLS = {TCP: "TCP", UDP: "UDP", ICMP: "ICMP", ICMPV6: "ICMP", SCTP: "SCTP"}


class Node(msgspec.Struct, frozen=True):
    """What the kernel looks at before any policy. scope, exclude: CIDRs. addresses: the node's own, packed."""

    scope: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    addresses: frozenset[bytes] = frozenset()

    def takes(self, source: bytes) -> bool:
        return _within(source, self.scope)

    def excludes(self, destination: bytes) -> bool:
        return _within(destination, self.exclude)

    def owns(self, destination: bytes) -> bool:
        """Whether packets to it end on this node (`fib daddr type local`)."""
        return destination in self.addresses or (len(destination) == 4 and destination[0] == 127)


class Outcome(msgspec.Struct, frozen=True):
    """What becomes of a flow. verdict: None as long as the name decides and is not known.

    reason: of verdict.Reason, or one of the four above. decided_by: kernel or proxy. rules, position: which of the group's two lists of
    kernel rules decided (leading or nameless), and the place of the rule in it; "" and -1 where neither did.
    audited: what it would be with rules in mode Audit enforced; None where there are none, or the name is not known, or the kernel decided.
    """

    decided_by: str
    verdict: Verdict | None
    reason: str
    rules: str = ""
    position: int = -1
    audited: Verdict | None = None


class Considered(msgspec.Struct, frozen=True):
    """A rule that stands before the one that decided. why: why it did not decide. near: but for one thing it would have."""

    rule: RuleKey
    action: str
    why: str
    near: bool
    audit: bool = False


@dataclass(frozen=True, slots=True)
class Region:
    """Addresses (first and last inclusive, packed) for which a flow has this outcome."""

    first: bytes
    last: bytes
    outcome: Outcome


def outcome(policies: PolicySet, node: Node, source: bytes, group: int | None, facts: Facts) -> Outcome:
    """What becomes of a new flow from source, which is a pod of group (None: no policy selects it), as kernel/ruleset.py lays the way.

    Whether the proxy may dial the target is not looked at here (proxy: session/dial_deny.py)."""
    if not node.takes(source):
        return _passed(OUT_OF_SCOPE)
    if node.excludes(facts.address):
        return _passed(EXCLUDED)
    return _of_group(policies, group, facts, local=node.owns(facts.address))


def _of_group(policies: PolicySet, group: int | None, facts: Facts, *, local: bool) -> Outcome:
    if group is None:
        return _passed(NOT_SELECTED)
    chosen = policies.groups[group]
    if facts.protocol != TCP or local:
        return _by_kernel_alone(chosen, facts)
    position = first_match(chosen.kernel.leading, facts)
    if position is not None:
        return _by_address(chosen.kernel.leading[position], LEADING, position)
    return _by_proxy(chosen, facts)


def _passed(reason: str) -> Outcome:
    return Outcome(KERNEL, Verdict(Action.ALLOW, Reason.NOT_SELECTED), reason)


def _by_kernel_alone(group: Group, facts: Facts) -> Outcome:
    if facts.protocol == UDP and facts.port == QUIC_PORT and group.kernel.reject_quic:
        return Outcome(KERNEL, Verdict(Action.BLOCK, Reason.NOT_ROUTABLE), QUIC_REJECTED)
    position = first_match(group.kernel.nameless, facts)
    assert position is not None  # the last entry matches everything
    return _by_address(group.kernel.nameless[position], NAMELESS, position)


def _by_address(rule: AddressRule, rules: str, position: int) -> Outcome:
    action = Action.ALLOW if rule.allow else Action.BLOCK
    return Outcome(KERNEL, Verdict(action, Reason(rule.reason), rule.rule, rule.response), rule.reason, rules, position)


def _by_proxy(group: Group, facts: Facts) -> Outcome:
    """As session/session.py: with Audit rules a connection waits for what they ask for, too."""
    verdict = decide(group.enforced, facts)
    audited = None if group.audited is None else decide(group.audited, facts)
    if isinstance(verdict, NeedName) or isinstance(audited, NeedName):
        return Outcome(PROXY, None, "NameUnknown")
    return Outcome(PROXY, verdict, verdict.reason.value, audited=audited)


def first_match(rules: Sequence[AddressRule], facts: Facts) -> int | None:
    """The place of the first of the kernel's rules that matches; None if none does."""
    protocol = ICMP if facts.protocol == ICMPV6 else facts.protocol
    for position, rule in enumerate(rules):
        if (rule.networks is None or _within(facts.address, rule.networks)) and (
            rule.ports is None or any(_holds(each, protocol, facts.port) for each in rule.ports)
        ):
            return position
    return None


def _holds(ports: PortRange, protocol: int, port: int) -> bool:
    return ports.protocol == protocol and ports.first <= port <= ports.last


def _within(address: bytes, networks: Iterable[str]) -> bool:
    number, version = int.from_bytes(address, "big"), 4 if len(address) == 4 else 6
    for text in networks:
        if (":" in text) == (version == 6):
            network = ipaddress.ip_network(text)
            if int(network.network_address) <= number <= int(network.broadcast_address):
                return True
    return False


# Why the rules before did not decide


def rules_of(objects: Objects, group: Group) -> list[list[Prepared]]:
    """The group's rules as they were compiled, by tier, in order. Raises LookupError if objects are not what group was compiled from."""
    policies: tuple[Policy, ...] = (*objects.policies, *objects.cluster_policies)
    found = {(each.kind, each.namespace, each.metadata.name): each for each in policies}
    tiers: list[list[Prepared]] = [[], [], []]
    for key in group.policies:
        policy = found[key.kind, key.namespace, key.name]
        tiers[tier_of(policy)] += prepare(policy)
    return tiers


def considered(tiers: Sequence[Sequence[Prepared]], facts: Facts, decided: RuleKey | None) -> list[Considered]:
    """The rules before the one that decided (None: before the default action), in order, and why each of them did not.

    At most the last MAX_CONSIDERED of them. An enforced rule that asks for a name that is not known is the last.
    """
    before = list(_before(tiers, facts, decided))[-MAX_CONSIDERED:]
    return [_considered(rule, facts, passed) for rule, passed in before]


def _before(
    tiers: Sequence[Sequence[Prepared]], facts: Facts, decided: RuleKey | None
) -> Iterator[tuple[Prepared, RuleKey | None]]:
    """Each rule before the one that decided, with the Pass rule that skips it."""
    for rules in tiers:
        passed: RuleKey | None = None
        for rule in rules:
            if rule.key == decided:
                return
            said = alone(rule, facts) if passed is None and rule.enforced else None
            if said is not None and said is not NEED_NAME and rule.verdict is not None:
                return
            yield rule, passed
            if said is NEED_NAME:
                return
            if said is not None:
                passed = rule.key


def alone(rule: Prepared, facts: Facts) -> Verdict | NeedName | None:
    """What `decide` says where rule is the only one and enforced: its verdict or refusal, the wish for a name, None: no match."""
    verdict = rule.verdict or _PASSES
    said = decide(index.build([[replace(rule, enforced=True, verdict=verdict)]], _NOT_MATCHED), facts)
    return None if said is _NOT_MATCHED else said


def _considered(rule: Prepared, facts: Facts, passed: RuleKey | None) -> Considered:
    action = "Pass" if rule.verdict is None else rule.verdict.action.value
    if passed is not None:
        return Considered(rule.key, action, f"rule {passed.rule} before it passes to the next tier", False)
    said = alone(rule, facts)
    if said is not None:
        matches = "asks for the name, which is not known" if said is NEED_NAME else "matches"
        if not rule.enforced:
            return Considered(rule.key, action, f"{matches}, but is in mode Audit: recorded, not acted on", True, True)
        return Considered(
            rule.key, action, matches if said is NEED_NAME else "matches and passes to the next tier", True
        )
    by_ports = alone(replace(rule, everywhere=True, networks=(), names=()), facts) is None
    by_destination = alone(_at_any_port(rule), facts) is None
    reasons = [_ports_said(rule, facts)] if by_ports else []
    reasons += [_destination_said(rule, facts)] if by_destination else []
    return Considered(rule.key, action, "; ".join(reasons), len(reasons) == 1, not rule.enforced)


def _at_any_port(rule: Prepared) -> Prepared:
    return replace(rule, ports=None, tcp=(PortRange(TCP, 0, 65535),))


def _ports_said(rule: Prepared, facts: Facts) -> str:
    ports = [_range_said(each) for each in rule.ports or ()]
    return f"it is for {_some(ports)}, not {protocol_said(facts.protocol, facts.port)}"


def _range_said(each: PortRange) -> str:
    name = _PROTOCOLS.get(each.protocol, str(each.protocol))
    if (each.first, each.last) == (0, 65535):
        return name
    return f"{name} {each.first}" if each.first == each.last else f"{name} {each.first}-{each.last}"


def protocol_said(protocol: int, port: int) -> str:
    """TCP 443, or ICMP."""
    name = _PROTOCOLS.get(protocol, f"protocol {protocol}")
    return name if protocol in (ICMP, ICMPV6) else f"{name} {port}"


def _destination_said(rule: Prepared, facts: Facts) -> str:
    said = []
    if rule.networks:
        networks = _some([str(network) for network in rule.networks])
        said.append(f"{ipaddress.ip_address(facts.address)} is not in {networks}")
    if rule.names:
        said.append(_name_said(rule, facts))
    return ", and ".join(said)


def _name_said(rule: Prepared, facts: Facts) -> str:
    domains = _some([f"*.{name}" if wildcard else name for name, wildcard in rule.names])
    if facts.protocol != TCP:
        return f"it names {domains}, and only TCP flows have a name that is read"
    if facts.mismatch:
        return f"it names {domains}, and the names of the flow disagree"
    if isinstance(facts.name, Unnamed):
        return f"it names {domains}, and the flow has no name"
    return f"{facts.name} is not {domains}"


def _some(texts: list[str]) -> str:
    shown = ", ".join(texts[:3])
    return f"{shown} and {len(texts) - 3} more" if len(texts) > 3 else shown


# Where the destination's address is not known


def regions(policies: PolicySet, node: Node, group: int | None, facts: Facts, version: int) -> list[Region] | None:
    """What becomes of the flow for every address of an IP version (facts.address is not looked at), as disjoint regions in order.

    The node's own addresses are taken for foreign ones. None: there are more than MAX_REGIONS.
    """
    size = 4 if version == 4 else 16
    networks = list(_networks_of(policies, group, version))
    networks += [each for each in map(ipaddress.ip_network, node.exclude) if each.version == version]
    end = 1 << (8 * size)
    cuts = sorted(
        {0, end}
        | {int(each.network_address) for each in networks}
        | {int(each.broadcast_address) + 1 for each in networks}
    )
    if len(cuts) > MAX_REGIONS:
        return None
    found: list[Region] = []
    for first, after in pairwise(cuts):
        at = msgspec.structs.replace(facts, address=first.to_bytes(size, "big"))
        excluded = node.excludes(at.address)
        said = _passed(EXCLUDED) if excluded else _of_group(policies, group, at, local=False)
        last = (after - 1).to_bytes(size, "big")
        if found and found[-1].outcome == said:
            found[-1] = Region(found[-1].first, last, said)
        else:
            found.append(Region(at.address, last, said))
    return found


def _networks_of(policies: PolicySet, group: int | None, version: int) -> Iterator[Network]:
    if group is None:
        return
    chosen = policies.groups[group]
    for program in (chosen.enforced, chosen.audited):
        if program is not None:
            yield from _networks_in(program, version)
    for rule in (*chosen.kernel.leading, *chosen.kernel.nameless):
        for text in rule.networks or ():
            if (":" in text) == (version == 6):
                yield ipaddress.ip_network(text)


def _networks_in(program: Program, version: int) -> Iterator[Network]:
    for tier in program.tiers:
        for prefixes in tier.v4 if version == 4 else tier.v6:
            length = prefixes.whole * 8 + prefixes.keep.bit_count()
            for head in prefixes.table:
                yield ipaddress.ip_network((head.ljust(4 if version == 4 else 16, b"\0"), length))


def blocked_how(verdict: Verdict, decided_by: str, protocol: int) -> str:
    """How the client of a blocked flow learns of it."""
    if verdict.response is Response.DROP:
        return "nothing answers"
    if decided_by == KERNEL:
        return "a TCP reset" if protocol == TCP else "an ICMP error"
    if verdict.response is Response.RESPOND:
        return f"HTTP {verdict.status}, an alert in TLS, a reset in other protocols"
    return "a TCP reset"
