"""What the operator writes into statuses, in the vocabulary of the Gateway API. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .judge import Judged, Judgement
from .world import AUTHORITIES, NODES, PROXIES, USER_KINDS, Body, Key, World

MAX_NAMED = 10
"""Failing nodes in a message."""
MAX_MESSAGE = 4096


def statuses(world: World, judged: Judged, now: str) -> dict[Key, dict[str, Any]]:
    """The status of each object of a user's kind. now: RFC 3339, for conditions that change."""
    nodes = world.of(NODES)
    by_revision = _by_revision(nodes)
    found = {}
    for kind in USER_KINDS:
        for key, body in world.of(kind).items():
            before = body.get("status") or {}
            conditions = [_accepted(judged.of[key])]
            status: dict[str, Any] = {"observedGeneration": body["metadata"].get("generation", 0)}
            if kind is not AUTHORITIES:
                failing = _failing(by_revision, key, judged, world)
                done = len(nodes) - len(failing)
                status["revision"] = judged.snapshot.index.revision
                status["nodes"] = {"desired": len(nodes), "programmed": done, "summary": f"{done}/{len(nodes)}"}
                conditions.append(_programmed(judged.of[key], failing, nodes))
            if kind is PROXIES:
                conditions.append(_verified(nodes))
            generation = status["observedGeneration"]
            status["conditions"] = [_since(each, before, generation, now) for each in conditions]
            found[key] = status
    return found


def refusing(world: World) -> dict[Key, str]:
    """Nodes that refuse the snapshot that they are offered, and their words."""
    found = {}
    for key, body in world.of(NODES).items():
        for each in (body.get("status") or {}).get("conditions") or ():
            if each["type"] == "Programmed" and each.get("reason") == "Refused":
                found[key] = str(each.get("message", ""))
    return found


def differs(status: Mapping[str, Any], written: Mapping[str, Any]) -> bool:
    """Whether a status says something that is not written. The revision alone is nothing: each edit of any policy changes it."""
    return bool(_told(status) != _told(written))


def _told(status: Mapping[str, Any]) -> Any:
    conditions = {
        each["type"]: (each["status"], each.get("reason"), each.get("message"))
        for each in status.get("conditions") or ()
    }
    return status.get("observedGeneration"), status.get("nodes"), conditions


def _accepted(judgement: Judgement) -> dict[str, Any]:
    return _condition("Accepted", judgement.accepted, judgement.reason, judgement.message)


def _by_revision(nodes: Mapping[Key, Body]) -> dict[str, list[Key]]:
    """Thousands of nodes are at a few revisions."""
    found: dict[str, list[Key]] = {}
    for key, body in nodes.items():
        found.setdefault((body.get("status") or {}).get("revision", ""), []).append(key)
    return found


def _failing(by_revision: Mapping[str, Sequence[Key]], key: Key, judged: Judged, world: World) -> list[Key]:
    """The nodes that do not enforce the version in force of an object."""
    digest, offered = judged.of[key].digest, judged.snapshot.index.revision
    behind = [
        nodes
        for revision, nodes in by_revision.items()
        if revision != offered and world.history.get(revision, {}).get(key, "") != digest
    ]
    return sorted(node for nodes in behind for node in nodes)


def _own_words(body: Body) -> str:
    for each in (body.get("status") or {}).get("conditions") or ():
        if each["type"] == "Programmed" and each["status"] != "True":
            return str(each.get("message", ""))
    return ""


def _programmed(judgement: Judgement, failing: Sequence[Key], nodes: Mapping[Key, Body]) -> dict[str, Any]:
    if judgement.in_force is None:
        return _condition("Programmed", False, "NotAccepted", "there is no version of it that could be enforced")
    if not nodes:
        return _condition("Programmed", False, "NoNodes", "no node has reported yet")
    if not failing:
        which = "" if judgement.accepted else "its last accepted version is enforced "
        reason = "Programmed" if judgement.accepted else "OldVersion"
        return _condition("Programmed", judgement.accepted, reason, f"{which}on {len(nodes)} nodes")
    words = {name: _own_words(nodes[kind, namespace, name]) for kind, namespace, name in failing[:MAX_NAMED]}
    named = "; ".join(f"{name}: {said}" if said else name for name, said in words.items())
    more = f"; and {len(failing) - MAX_NAMED} more" if len(failing) > MAX_NAMED else ""
    return _condition("Programmed", False, "NodesFailed" if any(words.values()) else "Pending", f"not on {named}{more}")


def _verified(nodes: Mapping[Key, Body]) -> dict[str, Any]:
    silent = sorted(name for (_, _, name), body in nodes.items() if not _holds(body, "InterceptionVerified"))
    if not nodes:
        return _condition("InterceptionVerified", False, "NoNodes", "no node has reported yet")
    if silent:
        more = f" and {len(silent) - MAX_NAMED} more" if len(silent) > MAX_NAMED else ""
        return _condition("InterceptionVerified", False, "NodesFailed", f"not on {', '.join(silent[:MAX_NAMED])}{more}")
    return _condition("InterceptionVerified", True, "CanariesAnswered", f"on {len(nodes)} nodes")


def _holds(body: Body, kind: str) -> bool:
    conditions: Iterable[Mapping[str, Any]] = (body.get("status") or {}).get("conditions") or ()
    return any(each["type"] == kind and each["status"] == "True" for each in conditions)


def _condition(kind: str, holds: bool, reason: str, message: str) -> dict[str, Any]:
    return {"type": kind, "status": "True" if holds else "False", "reason": reason, "message": message[:MAX_MESSAGE]}


def _since(condition: dict[str, Any], before: Mapping[str, Any], generation: int, now: str) -> dict[str, Any]:
    was: Mapping[str, Any] = next(
        (each for each in before.get("conditions") or () if each["type"] == condition["type"]), {}
    )
    time = was.get("lastTransitionTime", now) if was.get("status") == condition["status"] else now
    return {**condition, "lastTransitionTime": time, "observedGeneration": generation}
