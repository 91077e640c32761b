"""The kinds beside policies: InterceptionAuthority, TransparentProxy, TransparentSnapshot, TransparentNode."""

from __future__ import annotations

import enum
from typing import Annotated, ClassVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from .meta import Labels, LabelSelector, LongText, ObjectMeta, Port, Strict, Text
from .model import Conditions, Count, PolicyStatus, SourceAddress

Domains = Annotated[tuple[Text, ...], Meta(min_length=1, max_length=1000)]
Duration = Annotated[str, Meta(min_length=2, max_length=16, pattern=r"^[0-9]+(ms|s|m|h)$")]


def seconds(duration: str) -> float:
    """The seconds of a Duration: 250ms, 2s, 1m, 1h."""
    for unit, factor in (("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0)):
        if duration.removesuffix(unit).isdigit():
            return int(duration.removesuffix(unit)) * factor
    raise ValueError(f"{duration!r} is no duration")


class SecretRef(Strict, frozen=True):
    name: Text


class KeyFiles(Strict, frozen=True):
    certificate: LongText
    key: LongText


class AuthorityKey(Strict, frozen=True):
    """Exactly one of its fields."""

    secret_ref: SecretRef | UnsetType = UNSET
    files: KeyFiles | UnsetType = UNSET


class TrustInject(enum.StrEnum):
    OPT_IN = "OptIn"
    NEVER = "Never"


class Trust(Strict, frozen=True):
    bundle: Text
    inject: TrustInject = TrustInject.OPT_IN


class InterceptionAuthoritySpec(Strict, frozen=True):
    """namespaces {}: every namespace may name this authority."""

    names: Domains
    namespaces: LabelSelector
    key: AuthorityKey
    never_intercept: Domains | UnsetType = UNSET
    trust: Trust | UnsetType = UNSET


class InterceptionAuthority(Strict, frozen=True):
    """A CA that may mint leaves: its names, the namespaces that may use it, where its key lives."""

    kind: ClassVar[str] = "InterceptionAuthority"
    metadata: ObjectMeta
    spec: InterceptionAuthoritySpec
    status: PolicyStatus | UnsetType = UNSET


class DefaultAction(enum.StrEnum):
    ALLOW = "Allow"
    BLOCK = "Block"


class UnknownPods(Strict, frozen=True):
    hold: Duration
    then: DefaultAction


class Exclude(Strict, frozen=True):
    """Destinations never taken; an empty list excludes nothing."""

    cidrs: Annotated[tuple[Text, ...], Meta(max_length=1000)] = ()
    ports: Annotated[tuple[Port, ...], Meta(max_length=1000)] = ()


class MarkField(Strict, frozen=True):
    mask: Annotated[int, Meta(ge=1, le=0xFFFFFFFF)]


class Limits(Strict, frozen=True):
    """Of the whole node, but connection_rate_per_pod: new connections a second of one address of a pod."""

    connections_per_pod: Annotated[int, Meta(ge=1)] | UnsetType = UNSET
    connections: Annotated[int, Meta(ge=1)] | UnsetType = UNSET
    connection_rate_per_pod: Annotated[int, Meta(ge=1, le=1_000_000)] | UnsetType = UNSET


class Images(Strict, frozen=True):
    proxy: LongText | UnsetType = UNSET


class TransparentProxySpec(Strict, frozen=True):
    """pod_cidrs [] or absent: each node's own podCIDRs."""

    pod_cidrs: Annotated[tuple[Text, ...], Meta(max_length=64)] | UnsetType = msgspec.field(
        default=UNSET, name="podCIDRs"
    )
    default_action: DefaultAction | UnsetType = UNSET
    source_address: SourceAddress | UnsetType = UNSET
    unknown_pods: UnknownPods | UnsetType = UNSET
    exclude: Exclude | UnsetType = UNSET
    marks: MarkField | UnsetType = UNSET
    workers: Annotated[int, Meta(ge=1, le=1024)] | UnsetType = UNSET
    limits: Limits | UnsetType = UNSET
    node_selector: Annotated[Labels, Meta(min_length=1)] | UnsetType = UNSET
    images: Images | UnsetType = UNSET


class TransparentProxy(Strict, frozen=True):
    """The installation. Cluster-wide there is one, named default."""

    kind: ClassVar[str] = "TransparentProxy"
    metadata: ObjectMeta
    spec: TransparentProxySpec
    status: PolicyStatus | UnsetType = UNSET


class SnapshotIndex(Strict, frozen=True):
    """What nodes enforce together: all pieces by name, and the features that a node must have for them."""

    revision: Text
    format: Annotated[int, Meta(ge=1)]
    features: Annotated[tuple[Text, ...], Meta(max_length=64)]
    pieces: Annotated[tuple[Text, ...], Meta(max_length=4096)]


class SnapshotPiece(Strict, frozen=True):
    """data: base64 of compressed policies; their hash is the object's name."""

    data: Annotated[str, Meta(min_length=1, max_length=350000)]


class SnapshotSpec(Strict, frozen=True):
    """Exactly one of its fields."""

    index: SnapshotIndex | UnsetType = UNSET
    piece: SnapshotPiece | UnsetType = UNSET


class TransparentSnapshot(Strict, frozen=True):
    """Compiled, content-addressed policy; carries no status."""

    kind: ClassVar[str] = "TransparentSnapshot"
    metadata: ObjectMeta
    spec: SnapshotSpec


class Finding(Strict, frozen=True):
    type: Text
    message: LongText


class NodeStatus(Strict, frozen=True):
    """revision: of the snapshot that is enforced. version: of Pellucid on the node."""

    revision: Text | UnsetType = UNSET
    version: Text | UnsetType = UNSET
    observed_generation: Count | UnsetType = UNSET
    conditions: Conditions | UnsetType = UNSET
    findings: Annotated[tuple[Finding, ...], Meta(max_length=64)] | UnsetType = UNSET


class TransparentNode(Strict, frozen=True):
    """One per node, written by that node."""

    kind: ClassVar[str] = "TransparentNode"
    metadata: ObjectMeta
    status: NodeStatus | UnsetType = UNSET
