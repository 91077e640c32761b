"""The DaemonSets as they are to be: the chart's templates, and what the TransparentProxy says of placement, images and settings. Pure."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import UNSET
from msgspec.structs import replace

from pellucid_policy.installation import Images, TransparentProxy, TransparentProxySpec

from .world import World

SETTINGS = "pellucid.dev/settings"
"""Annotation of pods: a digest of what a running node cannot change, so that another value rolls them."""
APPLIED = "pellucid.dev/applied"
"""Annotation of what the operator makes of the chart's templates: a digest of all that it wants of it."""
NODE = "pellucid-node"


def daemon_sets(world: World, proxy: TransparentProxy) -> dict[str, dict[str, Any]]:
    """By name, ready to be applied."""
    return {name: _made(name, template, world, proxy.spec) for name, template in sorted(world.templates.items())}


def _made(name: str, template: Mapping[str, Any], world: World, spec: TransparentProxySpec) -> dict[str, Any]:
    made: dict[str, Any] = copy.deepcopy(dict(template))
    made["metadata"] = {**made["metadata"], "namespace": world.namespace}
    if world.owner is not None:
        made["metadata"]["ownerReferences"] = [dict(world.owner)]
    pod = made["spec"]["template"]
    if spec.node_selector is not UNSET:
        pod["spec"]["nodeSelector"] = {**pod["spec"].get("nodeSelector", {}), **spec.node_selector}
    images = Images() if spec.images is UNSET else spec.images
    if images.proxy is not UNSET:
        for container in pod["spec"]["containers"]:
            container["image"] = images.proxy
    if name == NODE:
        annotations = pod.setdefault("metadata", {}).setdefault("annotations", {})
        annotations[SETTINGS] = _digest(replace(spec, node_selector=UNSET, images=UNSET, default_action=UNSET))
    return stamped(made)


def stamped(made: dict[str, Any]) -> dict[str, Any]:
    """With a digest of itself, by which it is known again."""
    metadata = made["metadata"]
    return {
        **made,
        "metadata": {**metadata, "annotations": {**metadata.get("annotations", {}), APPLIED: _digest(made)}},
    }


def _digest(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()[:16]
