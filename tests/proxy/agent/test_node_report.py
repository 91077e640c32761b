"""What a TransparentNode says, of what the node knows."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

from pellucid_policy import installation
from pellucid_policy.model import Condition
from pellucid_proxy.agent.node_report import Canaries, node_status
from pellucid_proxy.agent.status import NodeStatus

NOW, LATER = "2026-01-31T12:00:00Z", "2026-01-31T12:05:00Z"
FINE = NodeStatus(
    version="0.1.0", node="n1", pid=1, phase="enforcing", revision="abc", source="cluster", folder="", problems=(), workers=(),
    connections=0, groups=1, pods=2, policies=(), scope=("10.244.1.0/24",), listen=(), engine_form="compiled", uptime_s=1.0,
    last_apply_s=None, flows=None, flows_dropped=0, metrics=None,
)  # fmt: skip


def told(
    status: NodeStatus = FINE,
    *,
    offered: str = "r2",
    enforced: str = "r2",
    silent: tuple[int, ...] | None = (),
    now: str = NOW,
    before: tuple[Condition, ...] = (),
) -> installation.NodeStatus:
    found = node_status(status, offered=offered, enforced=enforced, silent=silent, now=now, before=before)
    assert msgspec.convert(msgspec.to_builtins(found), installation.NodeStatus) == found, "within the API's bounds"
    return found


def condition(found: installation.NodeStatus, kind: str) -> tuple[str, object, str]:
    assert isinstance(found.conditions, tuple)
    (one,) = (each for each in found.conditions if each.type == kind)
    return one.status, one.reason, str(one.message)


@pytest.mark.parametrize(
    ("status", "offered", "enforced", "says", "reason", "message"),
    [
        (FINE, "r2", "r2", "True", "Programmed", "enforces revision r2"),
        (FINE, "r2", "r1", "False", "Pending", "r2 is not enforced yet"),
        (FINE, "", "r1", "False", "Pending", "none is not enforced yet"),
        (replace(FINE, problems=("needs feature X",)), "r2", "r1", "False", "Refused", "X; revision r1 stays in force"),
        (replace(FINE, problems=("settings wait",)), "r2", "r2", "True", "Programmed", "r2"),
        (replace(FINE, phase="starting"), "r2", "r2", "False", "NotEnforcing", "the node is starting"),
        (replace(FINE, phase="starting", problems=("no API",)), "", "", "False", "Refused", "no API"),
    ],
)
def test_programmed_means_that_the_offered_snapshot_is_enforced(
    status: NodeStatus, offered: str, enforced: str, says: str, reason: str, message: str
) -> None:
    found = condition(told(status, offered=offered, enforced=enforced), "Programmed")
    assert found[:2] == (says, reason)
    assert message in found[2]


@pytest.mark.parametrize(
    ("silent", "says", "reason", "message"),
    [
        ((), "True", "CanaryAnswered", ""),
        (None, "Unknown", "Waiting", ""),
        ((6,), "False", "CanarySilent", "over IPv6:"),
        ((4, 6), "False", "CanarySilent", "over IPv4 and IPv6:"),
    ],
)
def test_interception_is_verified_by_canaries(
    silent: tuple[int, ...] | None, says: str, reason: str, message: str
) -> None:
    found = condition(told(silent=silent), "InterceptionVerified")
    assert found[:2] == (says, reason)
    assert message in found[2]


def test_times_stay_where_nothing_changes() -> None:
    first = told(silent=None)
    assert isinstance(first.conditions, tuple)
    second = told(now=LATER, before=first.conditions)
    assert isinstance(second.conditions, tuple)
    assert [each.last_transition_time for each in second.conditions] == [NOW, LATER, NOW]


def test_findings_are_bounded_and_the_worst_come_first() -> None:
    status = replace(FINE, problems=("p" * 5000,), rules=("somebody deletes them",), strains=("few ports",) * 100)
    found = told(status).findings
    assert isinstance(found, tuple)
    assert [each.type for each in found[:3]] == ["Policy", "Rules", "Limits"]
    assert condition(told(status), "RulesIntact")[:2] == ("False", "SecondOwner")


def test_silence_means_something_only_after_a_while() -> None:
    canaries = Canaries((4, 6), 30.0, 100.0)
    assert canaries.silent(129.0) is None
    assert canaries.silent(131.0) == (4, 6)
    canaries.count(4, 1, 132.0)
    assert canaries.silent(133.0) == (6,)
    canaries.count(6, 7, 133.0)
    assert canaries.silent(133.0) == ()
    canaries.count(6, 7, 170.0)  # no new one
    assert canaries.silent(163.5) == (4, 6)
    canaries.count(6, 1, 171.0)  # a worker was started again: too few to know
    assert canaries.silent(171.0) == (4, 6)
    canaries.count(6, 2, 172.0)
    canaries.count(4, 2, 172.0)
    assert canaries.silent(172.0) == ()


def test_both_answered_early_is_known_early() -> None:
    canaries = Canaries((4,), 30.0, 100.0)
    canaries.count(4, 1, 101.0)
    canaries.count(6, 1, 101.0)  # nothing of it is in scope
    assert canaries.silent(101.0) == ()
