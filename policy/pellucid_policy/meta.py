"""What every kind shares: the strict base, bounded strings, metadata, label selectors; and the v1 kinds that are read, Pod and Namespace.

A field that is absent holds UNSET or its stated default. null is refused everywhere, and so is an empty list, map or string where it
could be taken for "everything" (tests/policy/test_absent.py goes through every field).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

API_VERSION = "pellucid.dev/v1alpha1"
NAMESPACE_NAME_LABEL = "kubernetes.io/metadata.name"

Text = Annotated[str, Meta(min_length=1, max_length=253)]
"""A name, address, CIDR, domain or key; check.py holds its syntax."""
LongText = Annotated[str, Meta(min_length=1, max_length=4096)]
LabelValue = Annotated[str, Meta(max_length=63)]  # may be empty: Kubernetes allows it, and it equals only itself
Labels = Annotated[dict[Text, LabelValue], Meta(max_length=64)]
GivenLabels = Annotated[dict[Annotated[str, Meta(min_length=1, max_length=317)], LabelValue], Meta(max_length=1 << 18)]
"""Of an object of the cluster: whatever the API server takes, a prefix of 253 before a name of 63, and as many as etcd's 1.5 MB hold."""
Opaque = Annotated[dict[Text, Any], Meta(max_length=64)]
"""An object that is carried and not looked into."""
Port = Annotated[int, Meta(ge=1, le=65535)]


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel", omit_defaults=True, kw_only=True):
    """A part of Pellucid's own API: an unknown field is refused, so that no constraint is ever dropped."""


class Tolerant(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True, kw_only=True):
    """A part of a Kubernetes kind of which only some fields are read."""


class ObjectMeta(Strict, frozen=True):
    """metadata of Pellucid's kinds. All fields of Kubernetes' ObjectMeta are known, so that a misspelt one is refused.

    namespace absent: "default" for a namespaced kind. creation_timestamp: RFC 3339; absent or null sorts as the newest.
    """

    name: Text
    namespace: Text | UnsetType = UNSET
    creation_timestamp: Annotated[str, Meta(min_length=1, max_length=64)] | None | UnsetType = UNSET
    labels: Annotated[dict[Text, LabelValue], Meta(max_length=256)] | UnsetType = UNSET
    annotations: Annotated[dict[Text, Annotated[str, Meta(max_length=262144)]], Meta(max_length=256)] | UnsetType = (
        UNSET
    )
    uid: Text | UnsetType = UNSET
    generation: Annotated[int, Meta(ge=0)] | UnsetType = UNSET
    resource_version: Text | UnsetType = UNSET
    generate_name: Text | UnsetType = UNSET
    self_link: LongText | UnsetType = UNSET
    deletion_timestamp: Text | UnsetType = UNSET
    deletion_grace_period_seconds: Annotated[int, Meta(ge=0)] | UnsetType = UNSET
    finalizers: Annotated[tuple[Text, ...], Meta(max_length=64)] | UnsetType = UNSET
    owner_references: Annotated[tuple[Opaque, ...], Meta(max_length=64)] | UnsetType = UNSET
    managed_fields: Annotated[tuple[Opaque, ...], Meta(max_length=256)] | UnsetType = UNSET


class Operator(enum.StrEnum):
    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


class LabelRequirement(Strict, frozen=True):
    """values: with In and NotIn, and only there."""

    key: Text
    operator: Operator
    values: Annotated[tuple[LabelValue, ...], Meta(min_length=1, max_length=64)] | UnsetType = UNSET


class LabelSelector(Strict, frozen=True):
    """Every entry given must hold; {} selects everything it is asked about. An empty map or list inside is refused."""

    match_labels: Annotated[dict[Text, LabelValue], Meta(min_length=1, max_length=64)] | UnsetType = UNSET
    match_expressions: Annotated[tuple[LabelRequirement, ...], Meta(min_length=1, max_length=64)] | UnsetType = UNSET

    def matches(self, labels: Mapping[str, str]) -> bool:
        """True when labels fulfil every entry. NotIn holds where the key is absent, as in Kubernetes."""
        if self.match_labels is not UNSET:
            for key, value in self.match_labels.items():
                if labels.get(key) != value:
                    return False
        return self.match_expressions is UNSET or all(_holds(each, labels) for each in self.match_expressions)


def _holds(requirement: LabelRequirement, labels: Mapping[str, str]) -> bool:
    value = labels.get(requirement.key)
    values = () if requirement.values is UNSET else requirement.values
    match requirement.operator:
        case Operator.IN:
            return value is not None and value in values
        case Operator.NOT_IN:
            return value is None or value not in values
        case Operator.EXISTS:
            return value is not None
        case Operator.DOES_NOT_EXIST:
            return value is None


class PodMeta(Tolerant, frozen=True):
    name: Text
    namespace: Text = "default"
    uid: Text | UnsetType = UNSET
    labels: GivenLabels | UnsetType = UNSET


class PodSpec(Tolerant, frozen=True):
    node_name: Text | UnsetType = UNSET
    service_account_name: Text = "default"
    host_network: bool = False


class PodAddress(Tolerant, frozen=True):
    ip: Text


class PodStatus(Tolerant, frozen=True):
    """phase Succeeded or Failed: the addresses are no longer the pod's."""

    phase: Text | UnsetType = UNSET
    pod_ip: Text | UnsetType = msgspec.field(default=UNSET, name="podIP")
    pod_ips: Annotated[tuple[PodAddress, ...], Meta(max_length=16)] | UnsetType = msgspec.field(
        default=UNSET, name="podIPs"
    )


class Pod(Tolerant, frozen=True):
    """v1 Pod as far as it is read; what else it carries is let pass."""

    kind: ClassVar[str] = "Pod"
    metadata: PodMeta
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()

    def addresses(self) -> tuple[str, ...]:
        """The pod's own addresses as text: none for a host-network pod (they are the node's) or one that has ended."""
        status = self.status
        if self.spec.host_network or status.phase in ("Succeeded", "Failed"):
            return ()
        if status.pod_ips is not UNSET and status.pod_ips:
            return tuple(each.ip for each in status.pod_ips)
        return () if status.pod_ip is UNSET else (status.pod_ip,)


class NamespaceMeta(Tolerant, frozen=True):
    name: Text
    labels: GivenLabels | UnsetType = UNSET


class Namespace(Tolerant, frozen=True):
    """v1 Namespace as far as it is read."""

    kind: ClassVar[str] = "Namespace"
    metadata: NamespaceMeta
