"""Which version of each object is in force: the one that is there, or the last one that could be taken. Pure."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import msgspec
from msgspec import UNSET

from pellucid_policy.features import ALL, ONE_NODE, PLACEMENT, unsupported
from pellucid_policy.installation import SnapshotIndex, SnapshotSpec
from pellucid_policy.meta import Namespace
from pellucid_policy.objects import Object, Objects, collect, key_of
from pellucid_policy.parse import parse_values
from pellucid_policy.snapshot import INDEX_NAME, Incomplete, Snapshot, TooLarge, Unusable, objects_of, snapshot_of

from .world import NAMESPACES, SNAPSHOTS, USER_KINDS, Body, Key, World

log = logging.getLogger(__name__)

SUPPORTED = ONE_NODE | {PLACEMENT}
ACCEPTED, INVALID, UNSUPPORTED, TOO_LARGE = "Accepted", "Invalid", "UnsupportedFeature", "TooLarge"


class Unknown(Exception):
    """What is in force cannot be told now, and to guess would widen it: look again."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """reason: Accepted, or why not; message: path and cure. in_force: what nodes get, None: nothing; digest: of that, as in History."""

    reason: str
    message: str
    in_force: Object | None
    digest: str = ""

    @property
    def accepted(self) -> bool:
        return self.reason == ACCEPTED


@dataclass(frozen=True, slots=True)
class Judged:
    """of: every object of a user's kind."""

    of: Mapping[Key, Judgement]
    snapshot: Snapshot


def judge(world: World) -> Judged:
    """Judge every object by itself, so that a bad one hinders no other, and pack what is in force. Raises Unknown."""
    before = _offered_before(world) if world.before is None else world.before
    found = {key: _judged(key, body, before) for kind in USER_KINDS for key, body in world.of(kind).items()}
    namespaces = tuple(_namespace(body) for body in world.of(NAMESPACES).values())
    while True:
        objects = replace(
            collect([each.in_force for each in found.values() if each.in_force is not None], {}), namespaces=namespaces
        )
        try:
            snapshot, digests = snapshot_of(objects)
        except TooLarge as err:
            found[err.key] = _without(found[err.key], TOO_LARGE, str(err), before.get(err.key))
            continue
        return Judged({key: replace(each, digest=digests.get(key, "")) for key, each in found.items()}, snapshot)


def _judged(key: Key, body: Body, before: Mapping[Key, Object]) -> Judgement:
    try:
        return _read(key, body, before)
    except Exception as err:
        log.exception("%s cannot be judged", "/".join(filter(None, key)))
        return _refused(
            INVALID, f"cannot be judged, through a fault of the operator ({err!r}); please report it", before.get(key)
        )


def _read(key: Key, body: Body, before: Mapping[Key, Object]) -> Judgement:
    value = {name: part for name, part in body.items() if name != "status"}
    objects = parse_values([(f"{key[0]} {key[1]}/{key[2]}" if key[1] else f"{key[0]} {key[2]}", value)])
    if not isinstance(objects, Objects):
        return _refused(INVALID, _said(objects), before.get(key))
    if lacking := unsupported(objects, SUPPORTED):
        return _refused(UNSUPPORTED, _said(lacking), before.get(key))
    (each,) = objects.all()
    return Judgement(ACCEPTED, "the operator can compile it", each)


def _said(problems: Iterable[object]) -> str:
    """Problems without their source: whoever reads a status knows of which object it is."""
    lines = [str(each).partition(": ")[2] for each in problems]
    return "; ".join(lines[:10]) + (f"; and {len(lines) - 10} more" if len(lines) > 10 else "")


def _refused(reason: str, message: str, last: Object | None) -> Judgement:
    stays = "its last accepted version stays in force" if last is not None else "nothing of it is in force"
    return Judgement(reason, f"{message}. Until it is mended {stays}", last)


def _without(judged: Judgement, reason: str, message: str, last: Object | None) -> Judgement:
    """Who does not fit is out; a last version that does not fit either is, too."""
    return _refused(reason, message, None if last is judged.in_force else last)


def _offered_before(world: World) -> dict[Key, Object]:
    """What the snapshot in the cluster holds: the last accepted versions, with selectors of namespaces resolved then. Raises Unknown."""
    specs = {key[2]: body.get("spec") for key, body in world.of(SNAPSHOTS).items()}
    try:
        known = {name: msgspec.convert(spec, SnapshotSpec) for name, spec in specs.items()}
        current = known[INDEX_NAME].index
        assert isinstance(current, SnapshotIndex)
        pieces = {name: spec.piece.data for name, spec in known.items() if spec.piece is not UNSET}
        return {key_of(each): each for each in objects_of(current, pieces, ALL).all()}
    except Incomplete as err:
        raise Unknown(f"the snapshot in the cluster: {err}") from err
    except (
        KeyError,
        AssertionError,
        msgspec.ValidationError,
        Unusable,
    ):  # none yet, or of another version: there is no going back to it
        return {}


def _namespace(body: Body) -> Namespace:
    return msgspec.convert({"metadata": body["metadata"]}, Namespace)
