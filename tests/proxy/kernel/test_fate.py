"""What becomes of a live flow that the kernel had let pass, when another policy is in force."""

from __future__ import annotations

import ipaddress

import pytest

from pellucid_policy.facts import ICMP, TCP, UDP
from pellucid_policy.plan import AddressRule, KernelGroup, Pod, PortRange
from pellucid_proxy.kernel.judgement import Era, Fate, alike, concerned, fate
from pellucid_proxy.kernel.state import KernelState
from pellucid_proxy.settings import NodeSettings

SETTINGS = NodeSettings(scope=("10.0.0.0/24",), exclude=("192.0.2.99/32",))


def packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


def rule(allow: bool, *ports: int, keep: bool = False) -> AddressRule:
    """Of any address; without ports of everything."""
    ranges = tuple(PortRange(protocol, port, port) for port in ports for protocol in (TCP, UDP)) or None
    return AddressRule(None, "RuleMatched", None, ranges, allow, keep=keep)


A, B, SERVER, EXCLUDED = packed("10.0.0.1"), packed("10.0.0.2"), packed("192.0.2.1"), packed("192.0.2.99")
ALLOW, BLOCK, KEEP = rule(True), rule(False), rule(True, keep=True)
EVERYTHING = KernelGroup((ALLOW,), (ALLOW,), closed=False, reject_quic=False)
NOTHING = KernelGroup((BLOCK,), (BLOCK,), closed=False, reject_quic=False)
KEPT = KernelGroup((KEEP,), (KEEP,), closed=False, reject_quic=False)
ONE, TWO = (Pod("shop", name, "", "", "", (A,), 0) for name in ("one", "two"))


def era(group: KernelGroup | None, since_ns: int = 0, owner: Pod | None = ONE) -> Era:
    """A is selected by group, None: direct."""
    owners = {} if owner is None else {A: owner}
    if group is None:
        return Era(KernelState(SETTINGS, direct=frozenset([A])), owners, since_ns)
    return Era(KernelState(SETTINGS, (group,), {A: 0}), owners, since_ns)


def after(*eras: Era, protocol: int = TCP, port: int = 80, began_ns: int = 0, target: bytes = SERVER) -> Fate:
    return fate(eras, A, target, protocol, port, began_ns, local=False)


@pytest.mark.parametrize("protocol", [TCP, UDP, ICMP])
def test_what_is_denied_ends_and_what_is_allowed_goes_on(protocol: int) -> None:
    for before in (EVERYTHING, None):
        assert after(era(before), era(NOTHING, 9), protocol=protocol) is Fate.POLICY_CHANGED
        assert after(era(before), era(EVERYTHING, 9), protocol=protocol) is Fate.GOES_ON
    assert after(era(EVERYTHING), era(None, 9), protocol=protocol) is Fate.GOES_ON
    assert after(era(EVERYTHING), era(NOTHING, 9), protocol=protocol, target=EXCLUDED) is Fate.GOES_ON


@pytest.mark.parametrize("protocol", [TCP, UDP, ICMP])
def test_what_a_keep_rule_allowed_is_kept_and_only_that(protocol: int) -> None:
    assert after(era(KEPT), era(NOTHING, 9), protocol=protocol) is Fate.KEPT
    assert after(era(KEPT), era(NOTHING, 9), protocol=protocol, began_ns=8) is Fate.KEPT
    assert (
        after(era(KEPT), era(NOTHING, 9), protocol=protocol, began_ns=9) is Fate.POLICY_CHANGED
    )  # nothing kept it then
    assert after(era(NOTHING), era(KEPT, 5), era(NOTHING, 9), protocol=protocol, began_ns=6) is Fate.KEPT
    assert after(era(EVERYTHING), era(KEPT, 5), era(NOTHING, 9), protocol=protocol, began_ns=4) is Fate.POLICY_CHANGED
    blocked_by_keep = KernelGroup((rule(False, keep=True),), (rule(False, keep=True),), closed=False, reject_quic=False)
    assert after(era(blocked_by_keep), era(NOTHING, 9), protocol=protocol) is Fate.POLICY_CHANGED


def test_what_a_worker_would_decide_goes_on_if_it_needs_no_name() -> None:
    lenient = KernelGroup((), (ALLOW,), closed=False, reject_quic=False)
    strict = KernelGroup((), (BLOCK,), closed=False, reject_quic=False)
    assert after(era(EVERYTHING), era(lenient, 9)) is Fate.GOES_ON
    assert after(era(EVERYTHING), era(strict, 9)) is Fate.POLICY_CHANGED
    shut = KernelGroup((rule(False, 80),), (ALLOW,), closed=False, reject_quic=False)
    assert after(era(EVERYTHING), era(shut, 9)) is Fate.POLICY_CHANGED
    assert after(era(EVERYTHING), era(shut, 9), port=81) is Fate.GOES_ON


def test_a_flow_of_another_pod_ends_whatever_the_policies_say() -> None:
    assert after(era(KEPT), era(EVERYTHING, 9, TWO)) is Fate.POD_CHANGED
    assert after(era(None), era(None, 9, TWO)) is Fate.POD_CHANGED
    assert after(era(EVERYTHING), era(EVERYTHING, 9, None)) is Fate.POD_CHANGED
    assert after(era(EVERYTHING), era(EVERYTHING, 9, TWO), began_ns=9) is Fate.GOES_ON
    assert (
        after(era(EVERYTHING, 0, None), era(EVERYTHING, 9, ONE)) is Fate.GOES_ON
    )  # a stranger was that pod all the time


def test_quic_that_is_refused_now_ends() -> None:
    group = KernelGroup((ALLOW,), (ALLOW,), closed=False, reject_quic=True)
    assert after(era(EVERYTHING), era(group, 9), protocol=UDP, port=443) is Fate.POLICY_CHANGED
    assert after(era(EVERYTHING), era(group, 9), protocol=UDP, port=53) is Fate.GOES_ON


def test_only_whose_rules_or_owner_are_others_is_concerned() -> None:
    for before, now, expected in (
        (era(EVERYTHING), era(NOTHING), True),
        (era(None), era(NOTHING), True),
        (era(EVERYTHING), era(EVERYTHING), False),
        (era(EVERYTHING), era(EVERYTHING, 0, TWO), True),
    ):
        assert concerned([before, now])(A) is expected
        assert concerned([before, now])(SERVER) is False  # not in scope
        assert concerned([before, now])(B) is False
        assert alike(before, now) is not expected
    assert concerned([era(EVERYTHING), era(NOTHING), era(EVERYTHING)])(A)
