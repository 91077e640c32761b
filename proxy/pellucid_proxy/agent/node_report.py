"""What a node tells its cluster: the status of its TransparentNode. Pure; node_object.py writes it.

Conditions in the vocabulary of the Gateway API:
Programmed             workers and kernel enforce the snapshot that the operator offers
InterceptionVerified   a canary on this node, which dials an address that only a worker answers, was answered over each IP version in scope
RulesIntact            nobody else changes the kernel rules faster than they can be put right
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import UNSET
from msgspec.structs import replace

from pellucid_policy import installation
from pellucid_policy.installation import Finding
from pellucid_policy.model import Condition

from .status import NodeStatus

TRUE, FALSE, UNKNOWN = "True", "False", "Unknown"
MAX_MESSAGE = 4096
MAX_FINDINGS = 64
ENFORCING = "enforcing"


def node_status(
    told: NodeStatus,
    *,
    offered: str,
    enforced: str,
    silent: Sequence[int] | None,
    now: str,
    before: Iterable[Condition] = (),
) -> installation.NodeStatus:
    """The status to write. offered, enforced: revisions of snapshots, "" for none. silent: IP versions (4, 6) over which no canary was
    answered of late; None: it is too early to say. now: RFC 3339. before: the conditions as they are; times stay where nothing changes."""
    known = {each.type: each for each in before}
    conditions = (_programmed(told, offered, enforced), _verified(silent), _intact(told.rules))
    return installation.NodeStatus(
        revision=enforced or UNSET,
        version=told.version,
        conditions=tuple(_since(each, known.get(each.type), now) for each in conditions),
        findings=_findings(told),
    )


def _since(now: Condition, before: Condition | None, time: str) -> Condition:
    stays = before is not None and before.status == now.status and before.last_transition_time is not UNSET
    return replace(now, last_transition_time=before.last_transition_time if before is not None and stays else time)


def _programmed(told: NodeStatus, offered: str, enforced: str) -> Condition:
    if told.phase == ENFORCING and enforced and enforced == offered:
        return _condition("Programmed", TRUE, "Programmed", f"enforces revision {enforced}")
    if told.problems:
        stays = f"; revision {enforced} stays in force" if enforced else ""
        return _condition("Programmed", FALSE, "Refused", "; ".join(told.problems) + stays)
    if told.phase != ENFORCING:
        return _condition("Programmed", FALSE, "NotEnforcing", f"the node is {told.phase}")
    return _condition("Programmed", FALSE, "Pending", f"revision {offered or 'none'} is not enforced yet")


def _verified(silent: Sequence[int] | None) -> Condition:
    if silent is None:
        return _condition("InterceptionVerified", UNKNOWN, "Waiting", "no canary has had the time to ask")
    if not silent:
        return _condition("InterceptionVerified", TRUE, "CanaryAnswered", "a worker answers canaries of this node")
    families = " and ".join(f"IPv{version}" for version in silent)
    return _condition(
        "InterceptionVerified", FALSE, "CanarySilent",
        f"no canary was answered over {families}: is the pod pellucid-canary of this node running? If it is, pods' packets do not pass "
        "this node's netfilter; a network plugin that routes by eBPF has a setting for it",
    )  # fmt: skip


def _intact(rules: Sequence[str]) -> Condition:
    if rules:
        return _condition("RulesIntact", FALSE, "SecondOwner", "; ".join(rules))
    return _condition("RulesIntact", TRUE, "Intact", "the kernel rules are as this node made them")


def _condition(kind: str, status: str, reason: str, message: str) -> Condition:
    return Condition(type=kind, status=status, reason=reason, message=message[:MAX_MESSAGE])


def _findings(told: NodeStatus) -> tuple[Finding, ...]:
    """The worst first: what does not fit is cut off at the end."""
    said = (("Policy", told.problems), ("Rules", told.rules), ("Limits", told.strains), ("Rights", told.unconfined))
    return tuple(Finding(type=kind, message=each[:MAX_MESSAGE]) for kind, lines in said for each in lines)[
        :MAX_FINDINGS
    ]


class Canaries:
    """Over which IP versions canaries are answered, from how often workers have answered any."""

    def __init__(self, versions: Sequence[int], patience_s: float, now: float) -> None:
        """patience_s: so long after the start, or after the last answer, silence means something. now: monotonic seconds."""
        self._patience_s = patience_s
        self._count = dict.fromkeys(versions, 0)
        self._heard = dict.fromkeys(versions, float("-inf"))
        self._since = now

    def count(self, version: int, answers: int, now: float) -> None:
        """So many have been answered over it by now; a worker that was started again counts from 0."""
        if version in self._count:
            if answers > self._count[version]:
                self._heard[version] = now
            self._count[version] = answers

    def silent(self, now: float) -> tuple[int, ...] | None:
        """node_status's silent."""
        missing = tuple(version for version, at in self._heard.items() if now - at > self._patience_s)
        return None if missing and now - self._since <= self._patience_s else missing
