"""What the kernel decides for a group, as plan.AddressRule lists: what addresses alone decide, and what has no name to wait for."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from .plan import AddressRule, PortRange
from .prepare import Network, Prepared, merged
from .verdict import Action, Reason, Response, RuleKey, Verdict

MAX_NAMELESS = 65536
"""Entries of one tier's list. Pass is written out as the later tiers' entries within its match; past this many it blocks."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """An AddressRule with parsed networks."""

    rule: RuleKey | None
    reason: Reason
    networks: tuple[Network, ...] | None
    ports: tuple[PortRange, ...] | None
    allow: bool
    response: Response
    keep: bool = False

    def rendered(self) -> AddressRule:
        networks = None if self.networks is None else tuple(map(str, self.networks))
        return AddressRule(self.rule, self.reason.value, networks, self.ports, self.allow, self.response, self.keep)

    def total(self) -> bool:
        return self.networks is None and self.ports is None


def leading(tiers: list[list[Prepared]], default: Verdict) -> tuple[AddressRule, ...]:
    """Return the TCP rules before the first that needs the proxy, Audit ones too; with the default when no rule needs it.

    A rule that holds no TCP port is left out, and does not end the list.
    """
    entries: list[_Entry] = []
    for rule in (rule for tier in tiers for rule in tier):
        if not rule.tcp:
            continue
        verdict = rule.verdict
        if verdict is None or not rule.enforced or rule.names or rule.egress or not _said_by_kernel(verdict):
            return tuple(entry.rendered() for entry in entries)
        entries.append(_entry(verdict, rule, None if rule.ports is None else rule.tcp))
    entries.append(_total(default))
    return tuple(entry.rendered() for entry in entries)


def _said_by_kernel(verdict: Verdict) -> bool:
    return verdict.action is Action.ALLOW or (
        verdict.action is Action.BLOCK and verdict.response is not Response.RESPOND
    )


def nameless(tiers: list[list[Prepared]], default: Verdict) -> tuple[AddressRule, ...]:
    """Return all enforced rules with every name absent (decide.py, rule 4), ending in an entry that matches everything.

    Respond becomes Reset; Route and Intercept block with NotRoutable; an egress override is the proxy's and has no effect here.
    """
    after = [_total(default)]
    for rules in reversed(tiers):
        after = _flat([rule for rule in rules if rule.enforced], after)
    return tuple(entry.rendered() for entry in after)


def _flat(rules: list[Prepared], after: list[_Entry]) -> list[_Entry]:
    """Return the entries of one tier followed by those of the later ones; first match wins."""
    out: list[_Entry] = []
    for rule in rules:
        if rule.everywhere or rule.networks:
            entry = _entry(rule.verdict, rule, rule.ports)
            if rule.verdict is not None:
                out.append(entry)
            elif len(out) + len(after) <= MAX_NAMELESS:
                out += _within(entry, after)
            else:
                out.append(entry)
            if entry.total():
                return out
        if rule.on_missing is not None and rule.tcp:
            out.append(_Entry(rule.key, Reason.NAME_MISSING, None, rule.tcp, False, Response.RESET))
    return out + after


def _entry(verdict: Verdict | None, rule: Prepared, ports: tuple[PortRange, ...] | None) -> _Entry:
    networks = None if rule.everywhere else rule.networks
    if verdict is None or verdict.action in (Action.ROUTE, Action.INTERCEPT):
        return _Entry(rule.key, Reason.NOT_ROUTABLE, networks, ports, False, Response.RESET)
    allow = verdict.action is Action.ALLOW
    return _Entry(rule.key, verdict.reason, networks, ports, allow, _spoken(verdict), verdict.keep)


def _spoken(verdict: Verdict) -> Response:
    return Response.DROP if verdict.response is Response.DROP else Response.RESET


def _total(default: Verdict) -> _Entry:
    return _Entry(None, default.reason, None, None, default.action is Action.ALLOW, _spoken(default), default.keep)


def _within(match: _Entry, entries: list[_Entry]) -> list[_Entry]:
    """Return entries, each narrowed to what match matches; up to the first that covers all of it."""
    out = []
    for each in entries:
        networks = _common_networks(match.networks, each.networks)
        ports = _common_ports(match.ports, each.ports)
        if networks != () and ports != ():
            out.append(_Entry(each.rule, each.reason, networks, ports, each.allow, each.response, each.keep))
            if networks == match.networks and ports == match.ports:
                break
    return out


def _common_networks(one: tuple[Network, ...] | None, other: tuple[Network, ...] | None) -> tuple[Network, ...] | None:
    """Two prefixes are nested or disjoint, so what they share is the longer one or nothing."""
    if one is None or other is None:
        return other if one is None else one
    v4: list[ipaddress.IPv4Network] = []
    v6: list[ipaddress.IPv6Network] = []
    for a in one:
        for b in other:
            if isinstance(a, ipaddress.IPv4Network) and isinstance(b, ipaddress.IPv4Network):
                if a.overlaps(b):
                    v4.append(max(a, b, key=lambda network: network.prefixlen))
            elif isinstance(a, ipaddress.IPv6Network) and isinstance(b, ipaddress.IPv6Network) and a.overlaps(b):
                v6.append(max(a, b, key=lambda network: network.prefixlen))
    return (*ipaddress.collapse_addresses(v4), *ipaddress.collapse_addresses(v6))


def _common_ports(
    one: tuple[PortRange, ...] | None, other: tuple[PortRange, ...] | None
) -> tuple[PortRange, ...] | None:
    if one is None or other is None:
        return other if one is None else one
    return merged(tuple(
        PortRange(a.protocol, max(a.first, b.first), min(a.last, b.last))
        for a in one for b in other
        if a.protocol == b.protocol and max(a.first, b.first) <= min(a.last, b.last)
    ))  # fmt: skip
