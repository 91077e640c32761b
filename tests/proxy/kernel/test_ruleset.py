"""The text follows from the state alone."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid_policy.plan import AddressRule, KernelGroup, Pod
from pellucid_policy.verdict import RuleKey
from pellucid_proxy.kernel.ruleset import EVENTS, CounterKey, change, counter_keys, removal, ruleset
from pellucid_proxy.kernel.state import KernelState, boot_hold, kernel_state
from pellucid_proxy.kernel.totals import Totals
from pellucid_proxy.settings import NodeSettings

SETTINGS = NodeSettings(scope=("10.244.1.0/24", "fd00:244:1::/64"))
KEY = RuleKey("TransparentPolicy", "test", "p", "r")
REST = AddressRule(None, "DefaultAction", None, None, True)
GROUP = KernelGroup(
    (AddressRule(KEY, "RuleMatched", ("192.0.2.0/24",), None, False),), (REST,), closed=False, reject_quic=False
)
ADDRESSES = [
    ipaddress.ip_address(text).packed for text in ("10.244.1.10", "10.244.1.11", "fd00:244:1::10", "fd00:244:1::11")
]


def state(assigned: list[int | None | str], groups: int = 2) -> KernelState:
    """assigned: for each of ADDRESSES a group, None for direct, "" for unknown."""
    pairs = list(zip(ADDRESSES, assigned, strict=True))
    return KernelState(
        SETTINGS,
        (GROUP,) * groups,
        {a: g for a, g in pairs if isinstance(g, int)},
        frozenset(a for a, g in pairs if g is None),
    )


assignments = st.lists(st.sampled_from([0, 1, None, ""]), min_size=4, max_size=4).map(state)


@given(assignments, assignments)
def test_churn_is_the_difference_of_elements_and_nothing_else(old: KernelState, new: KernelState) -> None:
    sets = elements(ruleset(old))
    for line in change(old, new).splitlines():
        verb, _, _, _, name, body = line.split(" ", 5)
        own = set(body.strip("{ }").split(", "))
        if verb == "delete":
            assert own <= sets[name]
            sets[name] -= own
        else:
            assert not {e.split(" : ")[0] for e in own} & {e.split(" : ")[0] for e in sets[name]}
            sets[name] |= own
    assert sets == elements(ruleset(new))


def elements(text: str) -> dict[str, set[str]]:
    found = {}
    for line in text.splitlines():
        if line.startswith(("set ", "map ")) and "interval" not in line:
            _, _, listed = line.partition("elements = {")
            found[line.split()[1]] = {e for e in listed.rpartition("}; }")[0].strip().split(", ") if e}
    return found


def test_other_rules_are_filled_into_the_chains_and_sets_that_are_there() -> None:
    """What is at a hook or looked into must not be missing for a moment."""
    old = state([0, 1, None, ""])
    for new in (
        replace(old, groups=(GROUP, msgspec.structs.replace(GROUP, closed=True))),
        replace(old, strangers=1),
        replace(old, hold=True),
        replace(old, drain=True),
    ):
        text = change(old, new)
        assert text.startswith("flush table inet pellucid\n")
        assert "delete table" not in text
        kept = {line.split()[1] for line in ruleset(new).splitlines() if line.startswith(("set ", "map ", "chain "))}
        gone = {
            line.split()[-1]
            for line in text.splitlines()
            if line.startswith(("delete set", "delete map", "delete chain"))
        }
        assert not gone & kept
        assert change(new, new) == change(old, old) == ""


def test_a_counter_goes_on_where_it_counts_the_same_and_starts_anew_where_not() -> None:
    """Deleted with every change, it lost what it counted between its last reading and the change."""
    other = AddressRule(RuleKey("TransparentPolicy", "test", "p", "other"), "RuleMatched", None, None, False)
    old = state([0, 1, None, ""])
    groups = (
        msgspec.structs.replace(GROUP, leading=(*GROUP.leading, other)),
        msgspec.structs.replace(GROUP, leading=(other,)),
    )
    text = change(old, replace(old, groups=groups))
    assert {line.split()[-1] for line in text.splitlines() if line.startswith("delete counter")} == {"lead1_0"}
    drained = change(old, replace(old, drain=True))
    assert len(drained.split("delete counter ")) == 1 + len(EVENTS) - 1 + len(counter_keys(old))
    assert "delete counter inet pellucid ended" not in drained, "what was ended stays so"


def test_other_settings_are_another_table() -> None:
    old = state([0, 1, None, ""])
    new = replace(old, settings=msgspec.structs.replace(SETTINGS, exclude=("192.0.2.0/24",)))
    assert change(old, new) == ruleset(new)
    assert change(old, new).startswith(removal(SETTINGS))


def test_the_order_of_pods_does_not_show() -> None:
    one = state([0, 1, 0, 1])
    other = KernelState(SETTINGS, one.groups, dict(reversed(list(one.members.items()))))
    assert ruleset(one) == ruleset(other)


def test_counters_are_named_by_place_and_known_by_rule() -> None:
    keys = counter_keys(state([0, 0, 0, 0]))
    assert keys["lead1_0"] == CounterKey(1, KEY, "RuleMatched")
    assert keys["last0_0"] == CounterKey(0, None, "DefaultAction")
    assert len(keys) == 4
    assert not set(keys) & set(EVENTS)


@pytest.mark.parametrize("table", ["x; flush ruleset", "", "A", "a" * 32, "a b", "a\n"])
def test_a_table_name_that_is_none_is_refused(table: str) -> None:
    with pytest.raises(ValueError, match=r"^settings\.table: .* is no table name; use "):
        ruleset(boot_hold(msgspec.structs.replace(SETTINGS, table=table)))


def test_a_scope_that_is_no_network_is_refused() -> None:
    with pytest.raises(ValueError, match="has host bits set"):
        ruleset(boot_hold(msgspec.structs.replace(SETTINGS, scope=("10.244.1.1/24",))))


def test_without_ipv6_no_rule_speaks_of_it() -> None:
    assert "ip6" not in ruleset(KernelState(msgspec.structs.replace(SETTINGS, ipv6=False), (GROUP,), {}, strangers=0))


def test_a_state_names_only_groups_that_exist_and_each_address_once() -> None:
    with pytest.raises(ValueError, match="group 2 is named but there are 1"):
        KernelState(SETTINGS, (GROUP,), {ADDRESSES[0]: 2})
    with pytest.raises(ValueError, match="group 0 is named but there are 0"):
        KernelState(SETTINGS, strangers=0)
    with pytest.raises(ValueError, match="both direct and member"):
        KernelState(SETTINGS, (GROUP,), {ADDRESSES[0]: 0}, frozenset(ADDRESSES))


def test_a_policy_set_becomes_groups_members_direct_pods_and_strangers() -> None:
    from pellucid_policy.compile import Group, PolicySet
    from pellucid_policy.index import build
    from pellucid_policy.verdict import Action, Reason, Verdict

    tree = build([], Verdict(Action.ALLOW, Reason.DEFAULT_ACTION))
    pods = (
        Pod("test", "a", "", "default", "", (ADDRESSES[0], ADDRESSES[2]), 0),
        Pod("test", "b", "", "default", "", (ADDRESSES[1],), None),
    )
    made = kernel_state(PolicySet("r", (Group((), tree, None, GROUP),), pods, 0, ()), SETTINGS)
    assert made == KernelState(
        SETTINGS, (GROUP,), {ADDRESSES[0]: 0, ADDRESSES[2]: 0}, frozenset([ADDRESSES[1]]), 0, revision="r"
    )


def test_totals_add_up() -> None:
    totals: Totals[str] = Totals()
    for packets in (1, 2, 3):
        totals.add("a", packets, 10 * packets)
    assert totals.sums() == {"a": (6, 60)}
