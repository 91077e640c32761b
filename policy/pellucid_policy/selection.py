"""Which policies hold for a pod, and in which order."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping

from msgspec import UNSET

from .meta import NAMESPACE_NAME_LABEL, Namespace
from .model import ClusterTransparentPolicy, Policy, Tier, TransparentPolicy

TIERS = ("Admin", "Application", "Baseline")


def tier_of(policy: Policy) -> int:
    """Return the policy's index into TIERS."""
    if isinstance(policy, TransparentPolicy):
        return 1
    return 0 if policy.spec.tier is Tier.ADMIN else 2


def in_order(policies: tuple[Policy, ...]) -> list[Policy]:
    """Return policies as they are evaluated: by tier, priority, creation time (absent is newest), namespace/name."""
    return sorted(policies, key=lambda each: (
        tier_of(each), each.spec.priority, _created(each), f"{each.namespace}/{each.metadata.name}",
    ))  # fmt: skip


def _created(policy: Policy) -> float:
    created = policy.metadata.creation_timestamp
    if not isinstance(created, str):
        return float("inf")
    return timestamp(created).timestamp()


def timestamp(text: str) -> dt.datetime:
    """Read an RFC 3339 time with its zone. Raises ValueError."""
    time = dt.datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError("has no time zone")
    return time


def namespace_labels(namespaces: tuple[Namespace, ...]) -> dict[str, dict[str, str]]:
    """Return the labels of each namespace that has an object, with the name label that Kubernetes gives to all."""
    labels = {}
    for each in namespaces:
        name = each.metadata.name
        labels[name] = {**({} if each.metadata.labels is UNSET else each.metadata.labels), NAMESPACE_NAME_LABEL: name}
    return labels


def selects(
    policy: Policy,
    namespace: str,
    labels: Mapping[str, str],
    service_account: str,
    of_namespaces: Mapping[str, Mapping[str, str]],
) -> bool:
    """Return whether policy holds for a pod. A namespace without an object has no labels but its name."""
    if isinstance(policy, TransparentPolicy):
        return policy.namespace == namespace and policy.spec.pod_selector.matches(labels)
    spec = policy.spec
    return (
        (spec.pod_selector is UNSET or spec.pod_selector.matches(labels))
        and (
            spec.namespace_selector is UNSET
            or spec.namespace_selector.matches(of_namespaces.get(namespace, {NAMESPACE_NAME_LABEL: namespace}))
        )
        and (
            spec.service_accounts is UNSET
            or any(each.namespace == namespace and each.name == service_account for each in spec.service_accounts)
        )
        and _has_selector(policy)
    )


def _has_selector(policy: ClusterTransparentPolicy) -> bool:
    spec = policy.spec
    return not (spec.pod_selector is UNSET and spec.namespace_selector is UNSET and spec.service_accounts is UNSET)
