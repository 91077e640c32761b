"""What is known of the cluster's objects, from lists and events that may overtake each other. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .world import DAEMON_SETS, NAMESPACES, WATCHED, Body, Key, Kind, key_of


class Store:
    """The newest version of each object. An event that comes while a list is under way counts if it is newer than what is listed."""

    def __init__(self) -> None:
        self._objects: dict[str, dict[Key, Body]] = {kind.name: {} for kind in (*WATCHED, DAEMON_SETS)}
        self._versions: dict[Key, int] = {}
        self._meanwhile: dict[str, list[tuple[bool, Body]]] = {}  # events of kinds that are being listed

    def all(self) -> dict[str, dict[Key, Body]]:
        """A copy, by kind's name and key."""
        return {name: dict(found) for name, found in self._objects.items()}

    def event(self, kind: Kind, gone: bool, body: Body) -> bool:
        """An object is there in this version, or was when it was deleted. Returns whether that is news."""
        if kind.name in self._meanwhile:
            self._meanwhile[kind.name].append((gone, body))
        return self._take(kind, gone, body)

    def list_begins(self, kind: Kind) -> None:
        """What is listed from now on may be older than events that come meanwhile."""
        self._meanwhile[kind.name] = []

    def listed(self, kind: Kind, found: Iterable[Body]) -> bool:
        """All objects of a kind, as they were at one moment since list_begins. Returns whether that is news."""
        before = self._objects[kind.name]
        for key in before:
            self._versions.pop(key, None)
        self._objects[kind.name] = {}
        for body in found:
            self._take(kind, False, body)
        for gone, body in self._meanwhile.pop(kind.name, ()):
            self._take(kind, gone, body)
        return self._objects[kind.name] != before

    def _take(self, kind: Kind, gone: bool, body: Body) -> bool:
        key, version = key_of(kind.name, body), int(body["metadata"].get("resourceVersion") or 0)
        if version < self._versions.get(key, 0):
            return False
        self._versions[key] = version
        objects = self._objects[kind.name]
        if gone:
            return objects.pop(key, None) is not None
        kept = _kept(kind, body)
        if objects.get(key) == kept:
            return False
        objects[key] = kept
        return True


def _kept(kind: Kind, body: Body) -> Body:
    """What of an object is remembered: without what others manage, and of namespaces the labels."""
    meta = body["metadata"]
    if kind is NAMESPACES:
        return {"metadata": {"name": meta["name"], "labels": dict(meta.get("labels") or {})}}
    metadata: Mapping[str, Any] = {
        name: value for name, value in meta.items() if name not in ("managedFields", "resourceVersion")
    }
    if kind is DAEMON_SETS:
        return {"metadata": metadata}
    return {name: value for name, value in body.items() if name != "metadata"} | {"metadata": metadata}
