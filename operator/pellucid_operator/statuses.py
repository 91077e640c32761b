"""What the operator writes into statuses, in the vocabulary of the Gateway API. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .judge import Judged, Judgement
from .world import AUTHORITIES, NODES, PROXIES, USER_KINDS, Body, Key, World

MAX_NAMED = 10
"""Failing nodes in a message."""
MAX_MESSAGE = 4096


def statuses(world: World, judged: Judged, now: str) -> dict[Key, dict[str, Any]]:
    """The status of each object of a user's kind. now: RFC 3339, for conditions that change."""
    nodes = world.of(NODES)
    found = {}
    for kind in USER_KINDS:
        for key, body in world.of(kind).items():
            before = body.get("status") or {}
            conditions = [_accepted(judged.of[key])]
            status: dict[str, Any] = {"observedGeneration": body["metadata"].get("generation", 0)}
            if kind is not AUTHORITIES:
                failing = _failing(nodes, key, judged, world)
                done = len(nodes) - len(failing)
                status["revision"] = judged.snapshot.index.revision
                status["nodes"] = {"desired": len(nodes), "programmed": done, "summary": f"{done}/{len(nodes)}"}
                conditions.append(_programmed(judged.of[key], failing, len(nodes)))
            if kind is PROXIES:
                conditions.append(_verified(nodes))
            generation = status["observedGeneration"]
            status["conditions"] = [_since(each, before, generation, now) for each in conditions]
            found[key] = status
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


def _failing(nodes: Mapping[Key, Body], key: Key, judged: Judged, world: World) -> dict[str, str]:
    """Which nodes do not enforce the version in force of an object, and what each says."""
    digest = judged.of[key].digest
    offered = judged.snapshot.index.revision
    found = {}
    for (_, _, name), body in nodes.items():
        status = body.get("status") or {}
        revision = status.get("revision", "")
        if revision != offered and world.history.get(revision, {}).get(key, "") != digest:
            found[name] = _own_words(status)
    return found


def _own_words(status: Mapping[str, Any]) -> str:
    for each in status.get("conditions") or ():
        if each["type"] == "Programmed" and each["status"] != "True":
            return str(each.get("message", ""))
    return ""


def _programmed(judgement: Judgement, failing: Mapping[str, str], nodes: int) -> dict[str, Any]:
    if judgement.in_force is None:
        return _condition("Programmed", False, "NotAccepted", "there is no version of it that could be enforced")
    if not nodes:
        return _condition("Programmed", False, "NoNodes", "no node has reported yet")
    if not failing:
        which = "" if judgement.accepted else "its last accepted version is enforced "
        return _condition(
            "Programmed",
            judgement.accepted,
            "Programmed" if judgement.accepted else "OldVersion",
            f"{which}on {nodes} nodes",
        )
    troubled = {name: words for name, words in failing.items() if words}
    named = "; ".join(f"{name}: {words}" if words else name for name, words in sorted(failing.items())[:MAX_NAMED])
    more = f"; and {len(failing) - MAX_NAMED} more" if len(failing) > MAX_NAMED else ""
    return _condition("Programmed", False, "NodesFailed" if troubled else "Pending", f"not on {named}{more}")


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
