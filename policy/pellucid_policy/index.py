"""From rules in order to the indexes of a Program."""

from __future__ import annotations

import heapq
from collections import defaultdict

from .plan import PortRange
from .prepare import Network, Prepared
from .program import NONE, Ports, Prefixes, Program, Tier
from .verdict import Verdict

Span = tuple[int, int, int]
"""First key and last key, inclusive (protocol << 16 | port), and the rank of a rule."""

_EVERY = (0, (256 << 16) - 1)


def build(tiers: list[list[Prepared]], default: Verdict) -> Program:
    """Return the program of rules that are given by tier, in order."""
    ranked = [rule for tier in tiers for rule in tier]
    built, rank = [], 0
    for rules in tiers:
        if rules:
            built.append(_tier(rules, rank))
        rank += len(rules)
    return Program(
        tuple(built),
        tuple(rule.verdict for rule in ranked),
        default,
        {r: refusal for t in built for r in _real(t.mismatched) if (refusal := ranked[r].on_mismatch)},
        {r: refusal for t in built for r in _real(t.encrypted) if (refusal := ranked[r].on_encrypted)},
        {r: refusal for t in built for r in _real(t.missing) if (refusal := ranked[r].on_missing)},
    )


def _real(ports: Ports) -> list[int]:
    return [rank for rank in ports.ranks if rank != NONE]


def _tier(rules: list[Prepared], first_rank: int) -> Tier:
    anywhere: list[Span] = []
    v4: dict[int, dict[bytes, list[Span]]] = defaultdict(lambda: defaultdict(list))
    v6: dict[int, dict[bytes, list[Span]]] = defaultdict(lambda: defaultdict(list))
    exact: dict[str, list[Span]] = defaultdict(list)
    suffixes: dict[str, list[Span]] = defaultdict(list)
    asking: tuple[list[Span], ...] = ([], [], [], [])
    for rank, rule in enumerate(rules, first_rank):
        spans = _spans(rule.ports, rank)
        if rule.everywhere:
            anywhere += spans
        for network in rule.networks:
            (v4 if network.version == 4 else v6)[network.prefixlen][_head(network)] += spans
        if rule.names:
            tcp = _spans(rule.tcp, rank)
            for name, wildcard in rule.names:
                (suffixes if wildcard else exact)[name] += tcp
            for spans_of, asks in zip(
                asking, (True, rule.on_mismatch, rule.on_encrypted, rule.on_missing), strict=True
            ):
                if asks:
                    spans_of += tcp
    return Tier(
        ports_of(anywhere), _prefixes(v4), _prefixes(v6),
        {name: ports_of(spans) for name, spans in exact.items() if spans},
        {name: ports_of(spans) for name, spans in suffixes.items() if spans},
        *map(ports_of, asking),
    )  # fmt: skip


def _spans(ports: tuple[PortRange, ...] | None, rank: int) -> list[Span]:
    if ports is None:
        return [(*_EVERY, rank)]
    return [(each.protocol << 16 | each.first, each.protocol << 16 | each.last, rank) for each in ports]


def _split(length: int) -> tuple[int, int]:
    """Return how many whole bytes a prefix has, and the mask of the bits beyond them."""
    whole, bits = divmod(length, 8)
    return whole, (0xFF00 >> bits) & 0xFF


def _head(network: Network) -> bytes:
    whole, keep = _split(network.prefixlen)
    return network.network_address.packed[: whole + (keep != 0)]


def _prefixes(by_length: dict[int, dict[bytes, list[Span]]]) -> tuple[Prefixes, ...]:
    out = []
    for length, heads in by_length.items():
        table = {head: ports_of(spans) for head, spans in heads.items()}
        least = min(rank for ports in table.values() for rank in ports.ranks)
        out.append(Prefixes(least, *_split(length), table))
    return tuple(sorted(out, key=lambda each: (each.least, each.whole, each.keep)))


def ports_of(spans: list[Span]) -> Ports:
    """Return the lowest rank for each key: a sweep over the ends of the spans."""
    if not spans:
        return Ports((0,), (NONE,))
    spans = sorted(spans)
    starts: list[int] = []
    ranks: list[int] = []
    open_spans: list[tuple[int, int]] = []  # a heap of (rank, last)
    taken = 0
    for at in sorted({0} | {first for first, _, _ in spans} | {last + 1 for _, last, _ in spans}):
        while taken < len(spans) and spans[taken][0] <= at:
            heapq.heappush(open_spans, (spans[taken][2], spans[taken][1]))
            taken += 1
        while open_spans and open_spans[0][1] < at:
            heapq.heappop(open_spans)
        rank = open_spans[0][0] if open_spans else NONE
        if not ranks or ranks[-1] != rank:
            starts.append(at)
            ranks.append(rank)
    return Ports(tuple(starts), tuple(ranks))
