"""From everything that is there to everything that should be. Pure: in whichever order events came, the same plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from pellucid_policy.installation import TransparentProxy
from pellucid_policy.objects import Object
from pellucid_policy.snapshot import INDEX_NAME

from .daemonsets import APPLIED, daemon_sets, stamped
from .judge import judge
from .statuses import differs, refusing, statuses
from .world import API, DAEMON_SETS, PROXIES, SNAPSHOTS, Key, World

API_VERSION = API.removeprefix("apis/")
THE_PROXY: Key = (PROXIES.name, "", "default")


@dataclass(frozen=True, slots=True)
class Plan:
    """In this order: the TransparentProxy; pieces, then the index that names them; DaemonSets; statuses (by key).

    needless: pieces that the index does not name, which may go once nodes have had the time to read it. unwanted: DaemonSets to delete.
    warnings: objects that are refused, and nodes that refuse, and why: for Events. in_force: for World.before.
    holds: for World.history."""

    proxy: dict[str, Any] | None
    pieces: Mapping[str, dict[str, Any]]
    index: dict[str, Any] | None
    daemon_sets: Mapping[str, dict[str, Any]]
    unwanted: tuple[str, ...]
    statuses: Mapping[Key, dict[str, Any]]
    needless: tuple[str, ...]
    revision: str
    holds: Mapping[Key, str]
    warnings: Mapping[Key, str]
    in_force: Mapping[Key, Object]


def plan(world: World, now: str) -> Plan:
    """What is to be written; what is there already as it should be is left out. now: RFC 3339."""
    judged = judge(world)
    snapshot = judged.snapshot
    there = {key[2]: body for key, body in world.of(SNAPSHOTS).items()}
    pieces = {name: _snapshot(name, {"piece": {"data": data}}) for name, data in snapshot.pieces.items()}
    pieces = {name: each for name, each in pieces.items() if there.get(name, {}).get("spec") != each["spec"]}
    index = _snapshot(INDEX_NAME, {"index": msgspec.json.decode(msgspec.json.encode(snapshot.index))})
    proxy = judged.of.get(THE_PROXY)
    wanted, unwanted = _daemon_sets(world, proxy.in_force if proxy is not None and proxy.accepted else None)
    written = {key: body.get("status") or {} for kind in world.objects for key, body in world.objects[kind].items()}
    return Plan(
        _proxy(world),
        pieces,
        None if INDEX_NAME in there and there[INDEX_NAME].get("spec") == index["spec"] else index,
        wanted,
        unwanted,
        {key: status for key, status in statuses(world, judged, now).items() if differs(status, written[key])},
        tuple(sorted(there.keys() - snapshot.pieces.keys() - {INDEX_NAME})),
        snapshot.index.revision,
        {key: each.digest for key, each in judged.of.items() if each.digest},
        {key: each.message for key, each in judged.of.items() if not each.accepted} | refusing(world),
        {key: each.in_force for key, each in judged.of.items() if each.in_force is not None},
    )


def _snapshot(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": API_VERSION, "kind": SNAPSHOTS.name, "metadata": {"name": name}, "spec": spec}


def _proxy(world: World) -> dict[str, Any] | None:
    """What the chart wants, unless it is so. Fields that users have added are theirs."""
    if world.proxy is None:
        return None
    wanted = stamped(dict(world.proxy))
    there = world.of(PROXIES).get(THE_PROXY, {"metadata": {}})
    applied = (there["metadata"].get("annotations") or {}).get(APPLIED)
    return None if applied == wanted["metadata"]["annotations"][APPLIED] else wanted


def _daemon_sets(world: World, proxy: object) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """Those that differ from what is there, and those that nobody wants. A TransparentProxy that is refused (None) changes nothing."""
    there = {key[2]: body for key, body in world.of(DAEMON_SETS).items() if key[1] == world.namespace}
    ours = {name: body for name, body in there.items() if APPLIED in (body["metadata"].get("annotations") or {})}
    if THE_PROXY not in world.of(PROXIES):
        return {}, tuple(sorted(ours))
    if not isinstance(proxy, TransparentProxy):
        return {}, ()
    wanted = daemon_sets(world, proxy)
    changed = {
        name: each
        for name, each in wanted.items()
        if name not in ours
        or ours[name]["metadata"]["annotations"][APPLIED] != each["metadata"]["annotations"][APPLIED]
    }
    return changed, tuple(sorted(ours.keys() - wanted.keys()))
