"""What a folder of manifests holds once it is read: typed objects, where each came from, and the problems that were found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from .installation import InterceptionAuthority, TransparentNode, TransparentProxy, TransparentSnapshot
from .meta import Namespace, Pod
from .model import ClusterTransparentPolicy, TransparentPolicy
from .yaml_tree import Lines, line_at

Object = (
    TransparentPolicy
    | ClusterTransparentPolicy
    | InterceptionAuthority
    | TransparentProxy
    | TransparentSnapshot
    | TransparentNode
    | Pod
    | Namespace
)


class Problem(msgspec.Struct, frozen=True, order=True):
    """Why a folder is refused. line: of the field, or of its nearest part that is written; from 1. path: "" for a whole file."""

    file: str
    line: int
    path: str
    message: str
    cure: str = ""

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: "
        path = f"{self.path}: " if self.path else ""
        return where + path + self.message + (f"; {self.cure}" if self.cure else "")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an object stands. path: of the object within its document, () or ("items", 3)."""

    file: str
    path: tuple[str | int, ...]
    lines: Lines

    def problem(self, path: str | tuple[str | int, ...], message: str, cure: str = "") -> Problem:
        """Return the problem at path ("spec.rules[2].ports[0]", or its steps, within the object) with its line."""
        steps = self.path + (steps_of(path) if isinstance(path, str) else path)
        return Problem(self.file, line_at(self.lines, steps), path_of(steps), message, cure)


Key = tuple[str, str, str]
"""kind, namespace ("" for what has none) and name of an object."""


@dataclass(frozen=True, slots=True)
class Objects:
    """All objects of a folder that was taken as a whole. origins: where each came from; objects made in tests may have none."""

    policies: tuple[TransparentPolicy, ...] = ()
    cluster_policies: tuple[ClusterTransparentPolicy, ...] = ()
    pods: tuple[Pod, ...] = ()
    namespaces: tuple[Namespace, ...] = ()
    authorities: tuple[InterceptionAuthority, ...] = ()
    proxies: tuple[TransparentProxy, ...] = ()
    snapshots: tuple[TransparentSnapshot, ...] = ()
    nodes: tuple[TransparentNode, ...] = ()
    origins: Mapping[Key, Origin] = field(default_factory=dict, compare=False)

    def all(self) -> tuple[Object, ...]:
        return (
            *self.policies, *self.cluster_policies, *self.pods, *self.namespaces,
            *self.authorities, *self.proxies, *self.snapshots, *self.nodes,
        )  # fmt: skip

    def problem(self, each: Object, path: str, message: str, cure: str = "") -> Problem:
        """Return the problem at path of one of the objects."""
        origin = self.origins.get(key_of(each)) or Origin("", (), 0)
        return origin.problem(path, message, cure)


def key_of(each: Object) -> Key:
    """Return what makes an object one of a kind."""
    if isinstance(each, TransparentPolicy):
        namespace = each.namespace
    elif isinstance(each, Pod):
        namespace = each.metadata.namespace
    else:
        namespace = ""
    return each.kind, namespace, each.metadata.name


def collect(found: list[Object], origins: Mapping[Key, Origin]) -> Objects:
    """Sort objects by kind, and within a kind by namespace and name, so that the order of files does not matter."""
    of: dict[type[Any], list[Any]] = {}
    for each in sorted(found, key=key_of):
        of.setdefault(type(each), []).append(each)

    def take(kind: type[Any]) -> tuple[Any, ...]:
        return tuple(of.get(kind, ()))

    return Objects(
        take(TransparentPolicy), take(ClusterTransparentPolicy), take(Pod), take(Namespace), take(InterceptionAuthority),
        take(TransparentProxy), take(TransparentSnapshot), take(TransparentNode), origins,
    )  # fmt: skip


def path_of(steps: tuple[str | int, ...]) -> str:
    """Return spec.rules[2].name for ("spec", "rules", 2, "name")."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")


def steps_of(path: str) -> tuple[str | int, ...]:
    """Return ("spec", "rules", 2, "name") for spec.rules[2].name; for paths of the API, whose fields have no dots."""
    steps: list[str | int] = []
    for part in path.split("."):
        name, *indexes = part.split("[")
        if name:
            steps.append(name)
        steps.extend(int(index.rstrip("]")) for index in indexes if index.rstrip("]").isdigit())
    return tuple(steps)
