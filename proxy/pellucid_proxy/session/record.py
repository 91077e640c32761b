"""What is told of a connection once it ended: one line of JSON, and the counts that become metrics.

Everything that does not change from one connection to the next is text already when it is needed: a source once a pod,
a verdict once a rule, an address once an address.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable, Iterator
from functools import lru_cache

from pellucid_policy.verdict import Action, RuleKey, Verdict

from ..control import Series
from .ending import ENDINGS

BLOCK = Action.BLOCK  # looked up in its enum it costs a microsecond in Python 3.11


def source_fragment(address: bytes, namespace: str, pod: str, uid: str, service_account: str) -> str:
    """JSON of a record's source up to the port's value."""
    known = {
        "namespace": namespace,
        "pod": pod,
        "uid": uid,
        "serviceAccount": service_account,
        "address": address_text(address),
    }
    return json.dumps(known, separators=(",", ":"))[:-1] + ',"port":'


@lru_cache(maxsize=4096)
def address_text(packed: bytes) -> str:
    return str(ipaddress.ip_address(packed))


class Tally:
    """One verdict: its text in a record, how many connections of it ended in which way, and of how many it would have been
    the verdict if rules in mode Audit were enforced."""

    def __init__(self, verdict: Verdict) -> None:
        self.action = str(verdict.action)
        self.reason = str(verdict.reason)
        self.rule = verdict.rule
        self.closed = [0] * len(ENDINGS)
        self.audited = 0
        self.fragment = f'"verdict":"{self.action}","reason":"{self.reason}","policy":{_policy(verdict.rule)}'


def _policy(rule: RuleKey | None) -> str:
    if rule is None:
        return "null"
    known = {"kind": rule.kind, "namespace": rule.namespace, "name": rule.policy, "rule": rule.rule}
    return json.dumps(known, separators=(",", ":"))


class Tallies:
    """Counts by verdict, over all revisions of the policy."""

    def __init__(self) -> None:
        self._by_key: dict[tuple[str, str, RuleKey | None], Tally] = {}
        self._by_identity: dict[int, tuple[Verdict, Tally]] = {}

    def of(self, verdict: Verdict) -> Tally:
        """The tally of verdict. By the object first: a compiled policy has one object a verdict, and hashing it is slow."""
        known = self._by_identity.get(id(verdict))
        if known is not None:
            return known[1]
        key = (str(verdict.action), str(verdict.reason), verdict.rule)
        tally = self._by_key.get(key)
        if tally is None:
            tally = self._by_key[key] = Tally(verdict)
        if len(self._by_identity) > 65536:
            self._by_identity.clear()
        self._by_identity[id(verdict)] = (verdict, tally)  # with the verdict: its id is not used again meanwhile
        return tally

    def forget_objects(self) -> None:
        """Let go of the verdicts of policies no longer in force; the counts stay."""
        self._by_identity.clear()

    def __iter__(self) -> Iterator[Tally]:
        return iter(self._by_key.values())


def tally_series(tallies: Iterable[Tally]) -> list[Series]:
    """The time series that tell of verdicts."""
    closed: dict[tuple[str, ...], int] = {}
    denied: dict[tuple[str, ...], int] = {}
    audited: dict[tuple[str, ...], int] = {}
    for tally in tallies:
        names = rule_labels(tally.rule)
        for ending, count in zip(ENDINGS, tally.closed, strict=True):
            if count:
                closed[tally.action, ending.why] = closed.get((tally.action, ending.why), 0) + count
        if tally.action == BLOCK and any(tally.closed):
            denied[*names, tally.reason] = denied.get((*names, tally.reason), 0) + sum(tally.closed)
        if tally.action == BLOCK and tally.audited:
            audited[names] = audited.get(names, 0) + tally.audited
    counts = (("connections_closed", closed), ("denied", denied), ("audit_would_deny", audited))
    return [Series(name, "counter", labels, count) for name, found in counts for labels, count in found.items()]


def rule_labels(rule: RuleKey | None) -> tuple[str, str]:
    """policy and rule as labels: namespace/name, or the name alone of a ClusterTransparentPolicy."""
    if rule is None:
        return "", ""
    return (f"{rule.namespace}/{rule.policy}" if rule.namespace else rule.policy), rule.rule
