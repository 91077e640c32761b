"""What `kubectl pellucid status` tells, from the objects' own statuses. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

OK = "ok"
CONDITIONS = ("Programmed", "InterceptionVerified", "RulesIntact")


@dataclass(frozen=True)
class Told:
    """good: everything is enforced everywhere. why: what is not, a line each. nodes, policies: rows of tables."""

    nodes: tuple[tuple[str, ...], ...]
    policies: tuple[tuple[str, ...], ...]
    why: tuple[str, ...]

    @property
    def good(self) -> bool:
        return not self.why


NODE_HEADER = ("node", "version", "revision", *CONDITIONS)
POLICY_HEADER = ("policy", "accepted", "programmed", "nodes")


def told(
    expected: Iterable[str], nodes: Sequence[dict[str, Any]], policies: Sequence[dict[str, Any]], offered: str
) -> Told:
    """expected: nodes that have a pod of the DaemonSet. nodes: TransparentNodes. policies: both kinds. offered: the snapshot's revision."""
    by_name = {each["metadata"]["name"]: each.get("status", {}) for each in nodes}
    why = [f"node {name}: its pod has not reported yet" for name in sorted(set(expected) - by_name.keys())]
    node_rows = []
    for name, status in sorted(by_name.items()):
        row = [name, status.get("version", "-"), status.get("revision", "-")]
        for kind in CONDITIONS:
            cell, line = _cell(status, kind)
            row.append(cell)
            if line:
                why.append(f"node {name}: {kind}: {line}")
        if offered and status.get("revision") != offered:
            why.append(f"node {name}: has not enforced revision {offered} yet")
        node_rows.append(tuple(row))
    policy_rows = []
    for each in sorted(policies, key=_name):
        status = each.get("status", {})
        stale = status.get("observedGeneration") != each["metadata"].get("generation")
        cells = []
        for kind in ("Accepted", "Programmed"):
            cell, line = _cell(status, kind)
            if not line and stale:
                cell, line = "-", "the operator has not seen this version yet"
            cells.append(cell)
            if line:
                why.append(f"{_name(each)}: {kind}: {line}")
        policy_rows.append((_name(each), *cells, status.get("nodes", {}).get("summary", "-")))
    if not by_name and not why:
        why.append("no node has reported yet")
    return Told(tuple(node_rows), tuple(policy_rows), tuple(why))


def _cell(status: dict[str, Any], kind: str) -> tuple[str, str]:
    """What a table says of a condition, and why it is not True."""
    found = next((each for each in status.get("conditions", ()) if each["type"] == kind), None)
    if found is None:
        return "-", "not known yet"
    if found["status"] == "True":
        return OK, ""
    return f"WRONG: {found.get('reason', found['status'])}", found.get("message") or found.get("reason") or "not True"


def _name(policy: dict[str, Any]) -> str:
    meta = policy["metadata"]
    return (
        f"{policy['kind']} {meta['namespace']}/{meta['name']}"
        if "namespace" in meta
        else f"{policy['kind']} {meta['name']}"
    )
