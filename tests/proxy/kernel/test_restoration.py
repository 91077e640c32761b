"""What a changed table is restored by, and what the rules would have made of what slipped through."""

from __future__ import annotations

import ipaddress

import pytest

from pellucid_policy.facts import TCP, UDP
from pellucid_policy.plan import AddressRule, KernelGroup, PortRange
from pellucid_proxy.kernel.judgement import closed, in_scope, lets_pass
from pellucid_proxy.kernel.restoration import Inventory, restoration
from pellucid_proxy.kernel.ruleset import body, declared, ruleset
from pellucid_proxy.kernel.state import KernelState
from pellucid_proxy.settings import NodeSettings

SETTINGS = NodeSettings(scope=("10.0.0.0/24", "fd00::/64"), exclude=("192.0.2.99/32",))
BLOCK = AddressRule(None, "DefaultAction", None, None, False)
WEB = AddressRule(None, "RuleMatched", ("192.0.2.0/24",), (PortRange(TCP, 80, 80),), True)
DNS = AddressRule(None, "RuleMatched", None, (PortRange(UDP, 53, 53),), True)


def packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


STATE = KernelState(
    SETTINGS,
    (KernelGroup((WEB,), (DNS, BLOCK), closed=True, reject_quic=True),),
    {packed("10.0.0.1"): 0},
    frozenset([packed("10.0.0.2")]),
    strangers=None,
    adopt=True,
)


def inventory(without: frozenset[tuple[str, str]] = frozenset(), **more: set[str]) -> Inventory:
    there = declared(body(STATE)) - without
    names = {
        kind: {name for k, name in there if k == kind} | more.get(kind, set())
        for kind in ("chain", "set", "map", "counter")
    }
    chains, sets, maps, counters = (frozenset(names[kind]) for kind in ("chain", "set", "map", "counter"))
    return Inventory(chains, sets, maps, counters, others=False)


def test_what_is_there_stays_and_is_filled_anew() -> None:
    text = restoration(STATE, inventory())
    assert text.startswith("flush table inet pellucid\n")
    assert "delete" not in text
    assert "flush map inet pellucid member4\n" in text
    assert "flush set inet pellucid stranger4" not in text, "who connected is not forgotten"


def test_what_is_foreign_goes() -> None:
    text = restoration(STATE, inventory(chain={"theirs"}, set={"theirs_too"}))
    assert text.index("delete set inet pellucid theirs_too\n") < text.index("delete chain inet pellucid theirs\n")


def test_no_connection_from_before_the_start_is_let_in_a_second_time() -> None:
    assert "elements = { ipv4 timeout" in ruleset(STATE)
    assert "elements = { ipv4 timeout" not in restoration(STATE, inventory())


NOTHING: frozenset[str] = frozenset()


@pytest.mark.parametrize(
    "present",
    [
        Inventory(NOTHING, NOTHING, NOTHING, NOTHING, others=False),
        Inventory(frozenset(["x"]), NOTHING, NOTHING, NOTHING, others=True),
    ],
)
def test_where_nothing_is_there_or_what_we_cannot_undo_the_table_is_replaced(present: Inventory) -> None:
    assert restoration(STATE, present).startswith("add table inet pellucid\ndelete table inet pellucid\n")


@pytest.mark.parametrize(
    ("source", "target", "protocol", "port", "local", "passes"),
    [
        ("10.0.0.1", "192.0.2.1", TCP, 80, False, True),
        ("10.0.0.1", "192.0.2.1", TCP, 81, False, False),
        ("10.0.0.1", "198.51.100.1", TCP, 80, False, False),  # a worker's
        ("10.0.0.1", "198.51.100.1", TCP, 80, True, False),
        ("10.0.0.1", "192.0.2.99", TCP, 81, False, True),  # excluded
        ("10.0.0.1", "198.51.100.1", UDP, 53, False, True),
        ("10.0.0.1", "198.51.100.1", UDP, 54, False, False),
        ("10.0.0.1", "198.51.100.1", UDP, 443, False, False),
        ("10.0.0.1", "198.51.100.1", 1, 0, False, False),
        ("10.0.0.2", "198.51.100.1", TCP, 81, False, True),  # direct
        ("10.0.0.3", "198.51.100.1", TCP, 81, False, True),  # a stranger whom no policy selects
    ],
)
def test_what_the_rules_would_have_made_of_it(
    source: str, target: str, protocol: int, port: int, local: bool, passes: bool
) -> None:
    assert lets_pass(STATE, packed(source), packed(target), protocol, port, local=local) == passes


def test_who_is_in_scope_and_who_is_closed() -> None:
    assert in_scope(STATE, packed("10.0.0.9"))
    assert in_scope(STATE, packed("fd00::9"))
    assert not in_scope(STATE, packed("10.0.1.9"))
    assert closed(STATE, packed("10.0.0.1"))
    assert not closed(STATE, packed("10.0.0.2"))
