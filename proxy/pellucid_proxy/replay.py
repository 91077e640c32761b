"""Recorded flows judged again, by the policy that is and by one that might be. Pure.

A record does not tell all facts of its flow: whether a hello was encrypted, whether names disagreed, whether a name was never read or never
came. Then every possibility is judged that fits what was recorded; where they do not come to one answer, the flow cannot be told.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from pellucid_policy.explain import Node, Outcome, outcome
from pellucid_policy.facts import ABSENT, TCP, UNKNOWN, Facts
from pellucid_policy.plan import Pod
from pellucid_policy.program import PolicySet
from pellucid_policy.verdict import Action, Reason, RuleKey, Verdict

from .session.judge import Judge
from .settings import NodeSettings

MAX_REMEMBERED = 65536
"""Flows whose answer is kept: clients do the same again and again."""

UNCHANGED, CHANGED, UNTOLD = "unchanged", "changed", "cannot tell"

_HELLO, _REQUEST, _NOTHING = "TLS", "HTTP/1", "None"


class RecordedRule(msgspec.Struct, frozen=True):
    kind: str
    namespace: str
    name: str
    rule: str


class RecordedSource(msgspec.Struct, frozen=True):
    namespace: str
    pod: str
    address: str


class RecordedDestination(msgspec.Struct, frozen=True):
    address: str
    port: int
    name: str | None


class Recorded(msgspec.Struct, frozen=True):
    """What of a flow record is judged (docs/flow-records.md)."""

    verdict: str
    reason: str
    policy: RecordedRule | None
    revision: str
    source: RecordedSource
    destination: RecordedDestination
    protocol: str


class Answer(NamedTuple):
    """result: unchanged, changed or cannot tell. before, after: verdicts, None where unknown. why: what is missing."""

    result: str
    before: Verdict | None = None
    after: Verdict | None = None
    why: str = ""


class _Side:
    """One of the two policies."""

    def __init__(self, policies: PolicySet, settings: NodeSettings) -> None:
        self.policies = policies
        self._node = Node(settings.scope, settings.exclude)
        self._judge = Judge(settings, ())
        self._default_source = settings.source_address
        self._by_name: dict[tuple[str, str], Pod] = {(pod.namespace, pod.name): pod for pod in policies.pods}
        self._by_address = {address: pod for pod in policies.pods for address in pod.addresses}

    def knows(self, source: RecordedSource) -> bool:
        return not source.pod or (source.namespace, source.pod) in self._by_name

    def outcome(self, source: RecordedSource, facts: Facts) -> Outcome:
        address = ipaddress.ip_address(source.address).packed
        pod = self._by_name[source.namespace, source.pod] if source.pod else self._by_address.get(address)
        group = self.policies.strangers if pod is None else pod.group
        found = outcome(self.policies, self._node, address, group, facts)
        if found.decided_by == "proxy" and found.verdict is not None and self._denied(found.verdict, facts):
            denied = Verdict(Action.BLOCK, Reason.DIAL_DENIED)
            return msgspec.structs.replace(found, verdict=denied, reason=denied.reason.value)
        return found

    def _denied(self, verdict: Verdict, facts: Facts) -> bool:
        """As session/session.py, but for the node's own addresses, which are not known here."""
        if verdict.action is Action.BLOCK:
            return False
        node_source = (verdict.source_address or self._default_source) == "Node"
        route = verdict.route
        target = facts.address if route is None or route.address is None else route.address
        return self._judge.dial_denied(target, node_source)


class Replay:
    """Judges recorded flows by both policies."""

    def __init__(
        self, before: PolicySet, after: PolicySet, settings: NodeSettings, settings_after: NodeSettings
    ) -> None:
        self._before = _Side(before, settings)
        self._after = _Side(after, settings_after)
        self._answers: dict[Recorded, Answer] = {}

    def judged(self, flow: Recorded) -> Answer:
        """Raises ValueError for addresses that are none."""
        known = self._answers.get(flow)
        if known is None:
            known = self._judged(flow)
            if len(self._answers) >= MAX_REMEMBERED:
                self._answers.clear()
            self._answers[flow] = known
        return known

    def _judged(self, flow: Recorded) -> Answer:
        if flow.reason == "Undecided":
            return Answer(UNTOLD, why="it ended before it was decided")
        if not (self._before.knows(flow.source) and self._after.knows(flow.source)):
            return Answer(UNTOLD, why="its pod is not among the objects, so its labels are not known")
        pairs = [
            (self._before.outcome(flow.source, facts), self._after.outcome(flow.source, facts))
            for facts in _possible(flow)
        ]
        if flow.revision == self._before.policies.revision:
            pairs = [pair for pair in pairs if _fits(pair[0], flow)]
            if not pairs:
                return Answer(
                    UNTOLD, why="the policy that recorded it comes to another verdict now: a fact is not in the record"
                )
        return _answer(pairs)


def _possible(flow: Recorded) -> Iterable[Facts]:
    """All that the flow may have been."""
    to = flow.destination
    plain = Facts(ipaddress.ip_address(to.address).packed, to.port, TCP, to.name or ABSENT)
    if to.name is None and flow.protocol == _NOTHING:
        return plain, msgspec.structs.replace(plain, name=UNKNOWN)
    found = [plain]
    if flow.protocol == _HELLO:
        found.append(msgspec.structs.replace(plain, encrypted=True))
    if flow.protocol in (_HELLO, _REQUEST):
        found.append(msgspec.structs.replace(plain, mismatch=True))
    return found


def _fits(before: Outcome, flow: Recorded) -> bool:
    if before.verdict is None:
        return False
    return (before.verdict.action.value, before.reason, _rule(before.verdict.rule)) == (
        flow.verdict,
        flow.reason,
        flow.policy,
    )


def _rule(key: RuleKey | None) -> RecordedRule | None:
    return None if key is None else RecordedRule(key.kind, key.namespace, key.policy, key.rule)


def _answer(pairs: list[tuple[Outcome, Outcome]]) -> Answer:
    found: set[tuple[str, Verdict | None, Verdict | None]] = set()
    for before, after in pairs:
        if before.verdict is None or after.verdict is None:
            return Answer(UNTOLD, why="a rule asks for the name, which was not read")
        result = UNCHANGED if _does(before.verdict) == _does(after.verdict) else CHANGED
        found.add((result, before.verdict, after.verdict))
    if len(found) == 1 or {result for result, _, _ in found} == {UNCHANGED}:
        return Answer(*next(iter(found)))
    return Answer(UNTOLD, why="it depends on whether its hello was encrypted, or its names disagreed")


def _does(verdict: Verdict) -> tuple[object, ...]:
    """What the flow feels of a verdict: not by which rule."""
    if verdict.action is Action.BLOCK:
        return verdict.action, verdict.response, verdict.status, verdict.body
    return verdict.action, verdict.route, verdict.source_address
