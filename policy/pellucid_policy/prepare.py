"""One rule of a policy, made ready for the indexes and for the kernel: parsed addresses, port spans, verdicts."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from msgspec import UNSET

from . import domains
from .facts import ICMP, SCTP, TCP, UDP
from .model import (
    EncryptedHello,
    Match,
    Mismatch,
    MissingName,
    Mode,
    Names,
    OnPolicyChange,
    Policy,
    PortEntry,
    Protocol,
    RouteSpec,
    Rule,
    RuleAction,
)
from .plan import PortRange
from .verdict import Action, Reason, Response, Route, RuleKey, Verdict, Via

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

NUMBERS = {Protocol.TCP: TCP, Protocol.UDP: UDP, Protocol.SCTP: SCTP, Protocol.ICMP: ICMP}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A rule in its policy. verdict: None for Pass.

    everywhere: no destinations given. networks: collapsed, both families. names: (canonical name, under a wildcard).
    ports: merged, or None for every protocol. tcp: the part of ports that is TCP; empty where none is.
    on_mismatch, on_encrypted, on_missing: the refusals when the rule asks for a name in vain, None where evaluation goes on.
    """

    key: RuleKey
    enforced: bool
    verdict: Verdict | None
    egress: bool
    everywhere: bool
    networks: tuple[Network, ...]
    names: tuple[tuple[str, bool], ...]
    ports: tuple[PortRange, ...] | None
    tcp: tuple[PortRange, ...]
    on_mismatch: Verdict | None
    on_encrypted: Verdict | None
    on_missing: Verdict | None


def prepare(policy: Policy) -> tuple[Prepared, ...]:
    """Return the policy's rules in order. Raises ValueError for a policy that check.py refuses or that needs a service's address."""
    return tuple(_prepare(policy, index, rule) for index, rule in enumerate(policy.spec.rules))


def _prepare(policy: Policy, index: int, rule: Rule) -> Prepared:
    name = f"rules[{index}]" if rule.name is UNSET else rule.name
    key = RuleKey(policy.kind, policy.namespace, policy.metadata.name, name)
    mode = policy.spec.mode if rule.mode is UNSET else rule.mode
    networks, names = _destinations(rule.match)
    ports = None if rule.match.ports is UNSET else merged(tuple(map(_port_range, rule.match.ports)))
    tcp = (PortRange(TCP, 0, 65535),) if ports is None else tuple(each for each in ports if each.protocol == TCP)
    refusals = _refusals(policy.spec.names, key) if names else (None, None, None)
    return Prepared(
        key, mode is Mode.ENFORCE, _verdict(rule, key, keeps(policy)), rule.egress is not UNSET, rule.match.destinations is UNSET,
        networks, names, ports, tcp, *refusals,
    )  # fmt: skip


def _destinations(match: Match) -> tuple[tuple[Network, ...], tuple[tuple[str, bool], ...]]:
    v4, v6, names = [], [], []
    for each in () if match.destinations is UNSET else match.destinations:
        if each.cidr is not UNSET:
            network = ipaddress.ip_network(each.cidr)
            v4.append(network) if isinstance(network, ipaddress.IPv4Network) else v6.append(network)
        elif each.domain is not UNSET:
            names.append(domains.pattern(each.domain))
        else:
            raise ValueError("needs feature Services")
    return (*ipaddress.collapse_addresses(v4), *ipaddress.collapse_addresses(v6)), tuple(dict.fromkeys(names))


def _port_range(entry: PortEntry) -> PortRange:
    protocol = NUMBERS[Protocol.TCP if entry.protocol is UNSET else entry.protocol]
    if entry.port is UNSET:
        return PortRange(protocol, 0, 65535)
    return PortRange(protocol, entry.port, entry.port if entry.end_port is UNSET else entry.end_port)


def merged(ports: tuple[PortRange, ...]) -> tuple[PortRange, ...]:
    """Return the same ports with no two ranges that touch, by protocol and port."""
    out: list[PortRange] = []
    for each in sorted(ports, key=lambda each: (each.protocol, each.first, each.last)):
        last = out[-1] if out else None
        if last is not None and last.protocol == each.protocol and each.first <= last.last + 1:
            out[-1] = PortRange(last.protocol, last.first, max(last.last, each.last))
        else:
            out.append(each)
    return tuple(out)


def keeps(policy: Policy) -> bool:
    """Return whether what the policy's rules decided stays as it is when policies change."""
    return policy.spec.on_policy_change is OnPolicyChange.KEEP


def _verdict(rule: Rule, key: RuleKey, keep: bool) -> Verdict | None:
    source = None if rule.egress is UNSET or rule.egress.source_address is UNSET else rule.egress.source_address.value
    match rule.action:
        case RuleAction.PASS:
            return None
        case RuleAction.ALLOW:
            return Verdict(Action.ALLOW, Reason.RULE_MATCHED, key, source_address=source, keep=keep)
        case RuleAction.INTERCEPT:
            return Verdict(Action.INTERCEPT, Reason.RULE_MATCHED, key, source_address=source, keep=keep)
        case RuleAction.ROUTE:
            if rule.route is UNSET:
                raise ValueError("Route without route")
            route = _route(rule.route)
            return Verdict(Action.ROUTE, Reason.RULE_MATCHED, key, route=route, source_address=source, keep=keep)
        case RuleAction.BLOCK:
            block = rule.block
            if block is UNSET:
                return Verdict(Action.BLOCK, Reason.RULE_MATCHED, key)
            status = 403 if block.status is UNSET else block.status
            body = "" if block.body is UNSET else block.body
            return Verdict(Action.BLOCK, Reason.RULE_MATCHED, key, block.response, status, body)


def _route(spec: RouteSpec) -> Route:
    via = None if spec.via is UNSET else Via(spec.via.protocol.value, _packed(spec.via.address), spec.via.port)
    if spec.to is UNSET:
        return Route(None, None, via)
    if spec.to.address is UNSET or spec.to.port is UNSET:
        raise ValueError("needs feature Services")
    return Route(_packed(spec.to.address), spec.to.port, via)


def _packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


def _refusals(names: Names, key: RuleKey) -> tuple[Verdict | None, Verdict | None, Verdict | None]:
    """What a rule with domains says of a mismatch, an encrypted hello, a missing name. 421: RFC 9110 §15.5.20."""
    return (
        Verdict(Action.BLOCK, Reason.HOST_MISMATCH, key, Response.RESPOND, 421)
        if names.host_mismatch is Mismatch.BLOCK
        else None,
        Verdict(Action.BLOCK, Reason.ENCRYPTED_CLIENT_HELLO, key)
        if names.encrypted_client_hello is EncryptedHello.BLOCK
        else None,
        Verdict(Action.BLOCK, Reason.NAME_MISSING, key) if names.missing_sni is MissingName.BLOCK else None,
    )
