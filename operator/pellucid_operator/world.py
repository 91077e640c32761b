"""What the operator sees of the cluster at one moment, and what it remembers. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pellucid_policy.objects import Object

Body = Mapping[str, Any]
"""An object as the API server gives it."""


class Kind(NamedTuple):
    """path: what stands before the plural, without a leading slash."""

    name: str
    path: str
    plural: str


API = "apis/pellucid.dev/v1alpha1"
POLICIES = Kind("TransparentPolicy", API, "transparentpolicies")
CLUSTER_POLICIES = Kind("ClusterTransparentPolicy", API, "clustertransparentpolicies")
AUTHORITIES = Kind("InterceptionAuthority", API, "interceptionauthorities")
PROXIES = Kind("TransparentProxy", API, "transparentproxies")
SNAPSHOTS = Kind("TransparentSnapshot", API, "transparentsnapshots")
NODES = Kind("TransparentNode", API, "transparentnodes")
NAMESPACES = Kind("Namespace", "api/v1", "namespaces")
DAEMON_SETS = Kind("DaemonSet", "apis/apps/v1", "daemonsets")
EVENTS = Kind("Event", "api/v1", "events")
USER_KINDS = (POLICIES, CLUSTER_POLICIES, AUTHORITIES, PROXIES)
WATCHED = (*USER_KINDS, SNAPSHOTS, NODES, NAMESPACES)

Key = tuple[str, str, str]
"""kind, namespace ("" for what has none), name: as pellucid_policy.objects.key_of."""

History = Mapping[str, Mapping[Key, str]]
"""Of each revision that was offered: which version of an object it holds, by a digest of its content."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the chart wants made: DaemonSets by name, and the TransparentProxy `default`, None: it is somebody else's business."""

    daemon_sets: Mapping[str, Body]
    proxy: Body | None = None


@dataclass(frozen=True, slots=True)
class World:
    """objects: by kind's name and key. templates, proxy: as Wanted. owner: of the DaemonSets, an ownerReference.

    before: what was in force after the last plan; None: nothing is remembered, the snapshot in the cluster says."""

    objects: Mapping[str, Mapping[Key, Body]]
    templates: Mapping[str, Body] = field(default_factory=dict)
    owner: Body | None = None
    proxy: Body | None = None
    namespace: str = "pellucid-system"
    history: History = field(default_factory=dict)
    before: Mapping[Key, Object] | None = None

    def of(self, kind: Kind) -> Mapping[Key, Body]:
        """The objects of a kind, in order of their keys."""
        found = self.objects.get(kind.name, {})
        return {key: found[key] for key in sorted(found)}


def key_of(kind: str, body: Body) -> Key:
    """The key of an object of that kind."""
    metadata = body["metadata"]
    return kind, metadata.get("namespace", ""), metadata["name"]
