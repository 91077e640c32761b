"""From a folder of manifests to a policy that can be enforced, or to the problems that forbid it."""

from __future__ import annotations

import logging

import msgspec
from msgspec import UNSET

from pellucid_policy.compile import PolicySet, compile_policies
from pellucid_policy.features import unsupported
from pellucid_policy.installation import Limits, TransparentProxySpec, seconds
from pellucid_policy.objects import Objects
from pellucid_policy.parse import parse_files

from .node_settings import Wishes
from .source_files import SourceFile, UnreadableFolder, read_folder

log = logging.getLogger(__name__)


class Accepted(msgspec.Struct, frozen=True):
    """A whole folder, or snapshot of a cluster, that this node can enforce. snapshot: its revision, "" for a folder."""

    policy: PolicySet
    wishes: Wishes
    snapshot: str = ""


class Fresh(Accepted, frozen=True, kw_only=True):
    """As it was read just now. objects: what the policy was compiled from. problems: why it is not all that is offered."""

    objects: Objects
    problems: tuple[str, ...] = ()


class BadPolicy(Exception):
    """The folder is refused as a whole. problems: one line each, with file, line, path and cure."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def accept_folder(folder: str) -> Fresh:
    """What folder holds now. Raises BadPolicy and nothing else. May take seconds: to be called in a thread."""
    try:
        return accept(read_folder(folder))
    except BadPolicy:
        raise
    except UnreadableFolder as err:
        raise BadPolicy(err.problems) from err
    except Exception as err:
        log.exception("reading %s failed", folder)
        raise BadPolicy(
            [f"{folder}: cannot be judged, through a fault of pellucid ({err!r}); please report it"]
        ) from err


def accept(files: tuple[SourceFile, ...]) -> Fresh:
    """What files hold together. Raises BadPolicy; a file is never left out, nor an object of it."""
    objects = parse_files({file.path: file.content for file in files})
    if not isinstance(objects, Objects):
        raise BadPolicy([str(problem) for problem in objects])
    return accept_objects(objects)


def accept_objects(objects: Objects, snapshot: str = "") -> Fresh:
    """What objects say together. Raises BadPolicy."""
    if problems := unsupported(objects):
        raise BadPolicy([str(problem) for problem in problems])
    return Fresh(compile_policies(objects), wishes_of(objects), snapshot, objects=objects)


def wishes_of(objects: Objects) -> Wishes:
    """What the TransparentProxy object among objects asks for."""
    spec = objects.proxies[0].spec if objects.proxies else TransparentProxySpec()
    limits = Limits() if spec.limits is UNSET else spec.limits
    return Wishes(
        scope=None if spec.pod_cidrs is UNSET else spec.pod_cidrs,
        exclude=None if spec.exclude is UNSET else spec.exclude.cidrs,
        source_address=None if spec.source_address is UNSET else str(spec.source_address.value),
        marks_mask=None if spec.marks is UNSET else spec.marks.mask,
        unknown_pod_hold_s=None if spec.unknown_pods is UNSET else seconds(spec.unknown_pods.hold),
        unknown_pod_action=None if spec.unknown_pods is UNSET else str(spec.unknown_pods.then.value),
        workers=None if spec.workers is UNSET else spec.workers,
        connections=None if limits.connections is UNSET else limits.connections,
        connections_per_pod=None if limits.connections_per_pod is UNSET else limits.connections_per_pod,
        connection_rate_per_pod=None if limits.connection_rate_per_pod is UNSET else limits.connection_rate_per_pod,
    )
