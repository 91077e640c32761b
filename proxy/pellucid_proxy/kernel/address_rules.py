"""Ordered address rules as nftables statements: first match wins, whatever the number of rules.

Rules in a row with the same ports become one lookup: their networks are cut into disjoint ranges, each of which knows the first
rule that holds it. So ten thousand CIDRs cost a packet a few binary searches, and every rule still has its own counter.
"""

from __future__ import annotations

import functools
import heapq
import ipaddress
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pellucid_policy.facts import ICMP, SCTP, TCP, UDP
from pellucid_policy.plan import AddressRule, PortRange
from pellucid_policy.verdict import Response

_PORTED = {TCP: "tcp", UDP: "udp", SCTP: "sctp"}
_ALL_PORTS = (0, 65535)
_LOOK_BACK = 65  # blocks that a rule may move ahead of: keeps thousands of different ports from taking quadratic time
_FAMILIES = ((4, "ip daddr"), (6, "ip6 daddr"))


@dataclass(frozen=True, slots=True)
class NamedRule:
    """A rule and the name of its counter. position: where it stands in the order, 0 first."""

    position: int
    counter: str
    rule: AddressRule


@dataclass(frozen=True, slots=True)
class Block:
    """Rules that ask for the same ports, in their order."""

    ports: tuple[PortRange, ...] | None
    rules: list[NamedRule]


def statements(
    rules: Sequence[AddressRule], counters: Sequence[str], *, passed: str = "accept", kept: str = "accept"
) -> list[str]:
    """nft rules that decide as the first matching one of rules does and count in its counter; counters: a name for each.

    passed, kept: the nft verdict of a rule that allows, and of one that does so with onPolicyChange: Keep."""
    lines: list[str] = []
    for block in blocks(NamedRule(i, counters[i], rule) for i, rule in enumerate(rules)):
        lines += _single(block.rules[0], passed, kept) if len(block.rules) == 1 else _lookups(block, passed, kept)
    return lines


def blocks(rules: Iterable[NamedRule]) -> list[Block]:
    """rules in blocks of equal ports. A rule moves ahead of others only where no packet could match both."""
    made: list[Block] = []
    for named in rules:
        home = None
        if named.rule.networks is not None:
            for block in made[:-_LOOK_BACK:-1]:
                if block.ports == named.rule.ports and block.rules[0].rule.networks is not None:
                    home = block
                if home is not None or not _disjoint(block.ports, named.rule.ports):
                    break
        if home is None:
            made.append(Block(named.rule.ports, [named]))
        else:
            home.rules.append(named)
    return made


def first_match(spans: Iterable[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """Disjoint ranges in ascending order, each with the smallest value that covers it; in and out (first, last inclusive, value)."""
    waiting = sorted(spans, reverse=True)
    cuts = sorted({first for first, _, _ in waiting} | {last + 1 for _, last, _ in waiting})
    active: list[tuple[int, int]] = []  # (value, last) of what may cover the cursor, the smallest value on top
    grown: tuple[int, int, int] | None = None
    for begin, end in pairwise(cuts):
        while waiting and waiting[-1][0] == begin:
            _, last, value = waiting.pop()
            heapq.heappush(active, (value, last))
        while active and active[0][1] < begin:
            heapq.heappop(active)
        if not active:
            continue
        value = active[0][0]
        if grown is not None and grown[2] == value and grown[1] == begin - 1:
            grown = (grown[0], end - 1, value)
            continue
        if grown is not None:
            yield grown
        grown = (begin, end - 1, value)
    if grown is not None:
        yield grown


def _single(named: NamedRule, passed: str, kept: str) -> list[str]:
    networks = named.rule.networks
    allowed = kept if named.rule.keep else passed
    if networks is None:
        return _decide("", f'counter name "{named.counter}"', named.rule, named.rule.ports, allowed)
    lines: list[str] = []
    for version, field in _FAMILIES:
        own = ranges(version, networks)
        if own:
            lines += _decide(
                f"{field} {{ {', '.join(own)} }} ",
                f'counter name "{named.counter}"',
                named.rule,
                named.rule.ports,
                allowed,
            )
    return lines


def _lookups(block: Block, passed: str, kept: str) -> list[str]:
    lines: list[str] = []
    by_position = {named.position: named for named in block.rules}
    for version, field in _FAMILIES:
        elements: dict[tuple[bool, Response, bool], list[str]] = {}
        spans = (
            (first, last, named.position)
            for named in block.rules
            for first, last in _spans(version, named.rule.networks or ())
        )
        for first, last, position in first_match(spans):
            named = by_position[position]
            outcome = _outcome(named.rule)
            elements.setdefault(outcome, []).append(f'{_text(version, first, last)} : "{named.counter}"')
        for outcome, own in elements.items():
            example = next(named.rule for named in block.rules if _outcome(named.rule) == outcome)
            counted = f"counter name {field} map {{ {', '.join(own)} }}"
            lines += _decide("", counted, example, block.ports, kept if example.keep else passed)
    return lines


def _outcome(rule: AddressRule) -> tuple[bool, Response, bool]:
    return rule.allow, rule.response, rule.allow and rule.keep


def _decide(where: str, count: str, rule: AddressRule, ports: tuple[PortRange, ...] | None, allowed: str) -> list[str]:
    return [f"{where}{match}{count} {outcome}" for match, outcome in _outcomes(rule, ports, allowed)]


def _outcomes(rule: AddressRule, ports: tuple[PortRange, ...] | None, allowed: str) -> list[tuple[str, str]]:
    """(match of protocol and ports, verdict) pairs, exclusive of each other; a reset says itself differently in TCP."""
    if rule.allow or rule.response is Response.DROP:
        verdict = allowed if rule.allow else "drop"
        return [(match, verdict) for _, match in _port_matches(ports)]
    found: list[tuple[str, str]] = []
    for protocol, match in _port_matches(ports):
        if protocol == TCP:
            found.append((match, "reject with tcp reset"))
        elif protocol is None:
            found += [
                ("meta l4proto tcp ", "reject with tcp reset"),
                ("meta l4proto != tcp ", "reject with icmpx type admin-prohibited"),
            ]
        else:
            found.append((match, "reject with icmpx type admin-prohibited"))
    return found


def _port_matches(ports: tuple[PortRange, ...] | None) -> list[tuple[int | None, str]]:
    if ports is None:
        return [(None, "")]
    spans: dict[int, list[tuple[int, int, int]]] = {}
    for port in ports:
        spans.setdefault(port.protocol, []).append((port.first, port.last, 0))
    found: list[tuple[int | None, str]] = []
    for protocol, own in spans.items():
        merged = [(first, last) for first, last, _ in first_match(own)]
        if protocol == ICMP:
            match = "meta l4proto { icmp, ipv6-icmp } "
        elif protocol not in _PORTED or merged == [_ALL_PORTS]:
            match = f"meta l4proto {protocol} "
        else:
            match = f"{_PORTED[protocol]} dport {{ {', '.join(_range(str(a), str(b)) for a, b in merged)} }} "
        found.append((protocol, match))
    return found


def _disjoint(one: tuple[PortRange, ...] | None, other: tuple[PortRange, ...] | None) -> bool:
    if one is None or other is None:
        return False
    return not any(a.protocol == b.protocol and a.first <= b.last and b.first <= a.last for a in one for b in other)


def ranges(version: int, networks: Iterable[str]) -> list[str]:
    """The addresses of networks (CIDRs of both families) that are of version, as disjoint nft set elements."""
    return [
        _text(version, first, last) for first, last, _ in first_match((a, b, 0) for a, b in _spans(version, networks))
    ]


def _spans(version: int, networks: Iterable[str]) -> Iterator[tuple[int, int]]:
    for text in networks:
        found, first, last = _parsed(text)
        if found == version:
            yield first, last


@functools.lru_cache(maxsize=65536)
def _parsed(cidr: str) -> tuple[int, int, int]:
    """(IP version, first address, last address). Raises ValueError."""
    network = ipaddress.ip_network(cidr)
    return network.version, int(network.network_address), int(network.broadcast_address)


def address_text(address: bytes) -> str:
    """A packed address as nft reads it; twenty times as fast as ipaddress."""
    return ".".join(map(str, address)) if len(address) == 4 else address.hex(":", 2)


def _text(version: int, first: int, last: int) -> str:
    size = 4 if version == 4 else 16
    return _range(address_text(first.to_bytes(size, "big")), address_text(last.to_bytes(size, "big")))


def _range(first: str, last: str) -> str:
    return first if first == last else f"{first}-{last}"
