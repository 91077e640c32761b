"""Rules in blocks decide as the rules in their order do."""

from __future__ import annotations

import ipaddress
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pellucid_policy.plan import AddressRule, PortRange
from pellucid_policy.verdict import Response, RuleKey
from pellucid_proxy.kernel.address_rules import NamedRule, blocks, first_match, ranges, statements

Span = tuple[int, int, int]
spans = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 5)).map(lambda t: (min(t[:2]), max(t[:2]), t[2])),
    max_size=12,
)
ports = st.one_of(
    st.none(),
    st.lists(
        st.tuples(st.sampled_from([6, 17]), st.integers(1, 6), st.integers(0, 3)).map(
            lambda t: PortRange(t[0], t[1], t[1] + t[2])
        ),
        min_size=1,
        max_size=2,
    ).map(tuple),
)
networks = st.one_of(
    st.none(),
    st.lists(
        st.sampled_from(["192.0.2.0/24", "192.0.2.0/30", "192.0.2.1/32", "0.0.0.0/0", "2001:db8::/32"]),
        min_size=1,
        max_size=2,
    ).map(tuple),
)
rules = st.lists(st.builds(AddressRule, st.none(), st.just("RuleMatched"), networks, ports, st.booleans()), max_size=12)


@given(spans)
def test_ranges_know_the_first_rule_that_covers_them(given_spans: list[Span]) -> None:
    expected = {}
    for point in range(42):
        covering = [value for first, last, value in given_spans if first <= point <= last]
        if covering:
            expected[point] = min(covering)
    made = list(first_match(given_spans))
    assert {point: value for first, last, value in made for point in range(first, last + 1)} == expected
    assert all(a[1] < b[0] for a, b in pairwise(made))
    assert not any(a[1] + 1 == b[0] and a[2] == b[2] for a, b in pairwise(made))


@given(
    rules,
    st.sampled_from(["192.0.2.1", "192.0.2.9", "203.0.113.1", "2001:db8::1", "2001:db9::1"]),
    st.sampled_from([6, 17]),
    st.integers(0, 10),
)
def test_blocks_keep_first_match(given_rules: list[AddressRule], address: str, protocol: int, port: int) -> None:
    def matches(rule: AddressRule) -> bool:
        target = ipaddress.ip_address(address)
        here = rule.networks is None or any(
            target in ipaddress.ip_network(n)
            for n in rule.networks
            if ipaddress.ip_network(n).version == target.version
        )
        return here and (
            rule.ports is None or any(p.protocol == protocol and p.first <= port <= p.last for p in rule.ports)
        )

    expected = next((i for i, rule in enumerate(given_rules) if matches(rule)), None)
    made = blocks(NamedRule(i, f"c{i}", rule) for i, rule in enumerate(given_rules))
    assert next((named.position for block in made for named in block.rules if matches(named.rule)), None) == expected
    assert sorted(named.position for block in made for named in block.rules) == list(range(len(given_rules)))


def test_ten_thousand_networks_are_a_handful_of_statements() -> None:
    many = [
        AddressRule(None, "RuleMatched", (f"198.51.{i >> 8}.{i & 255}/32",), None, i % 3 == 0) for i in range(10_000)
    ]
    assert len(statements(many, [f"c{i}" for i in range(10_000)])) == 3  # allow, reset in TCP, reset elsewhere


def test_ranges_are_disjoint_and_of_one_family() -> None:
    mixed = ["192.0.2.0/25", "192.0.2.0/24", "2001:db8::/127", "192.0.3.0/24", "203.0.113.7/32"]
    assert ranges(4, mixed) == ["192.0.2.0-192.0.3.255", "203.0.113.7"]
    assert ranges(6, mixed) == ["2001:0db8:0000:0000:0000:0000:0000:0000-2001:0db8:0000:0000:0000:0000:0000:0001"]


def test_a_response_is_said_in_the_protocols_own_way() -> None:
    def said(
        ports: tuple[PortRange, ...] | None, allow: bool = False, response: Response = Response.RESET
    ) -> list[str]:
        return statements([AddressRule(None, "DefaultAction", None, ports, allow, response)], ["c"])

    count = 'counter name "c"'
    assert said(None) == [
        f"meta l4proto tcp {count} reject with tcp reset",
        f"meta l4proto != tcp {count} reject with icmpx type admin-prohibited",
    ]
    assert said((PortRange(6, 80, 80),)) == [f"tcp dport {{ 80 }} {count} reject with tcp reset"]
    assert said((PortRange(17, 53, 54), PortRange(17, 54, 60))) == [
        f"udp dport {{ 53-60 }} {count} reject with icmpx type admin-prohibited"
    ]
    assert said((PortRange(1, 0, 65535),), response=Response.DROP) == [
        f"meta l4proto {{ icmp, ipv6-icmp }} {count} drop"
    ]
    assert said((PortRange(6, 0, 65535), PortRange(47, 0, 65535)), allow=True) == [
        f"meta l4proto 6 {count} accept",
        f"meta l4proto 47 {count} accept",
    ]


def test_names_never_reach_the_text() -> None:
    evil = RuleKey('"; flush ruleset', "\n", "}", "{")
    made = statements([AddressRule(evil, "RuleMatched", ("192.0.2.0/24",), None, True)], ["c"])
    assert made == ['ip daddr { 192.0.2.0-192.0.2.255 } counter name "c" accept']
