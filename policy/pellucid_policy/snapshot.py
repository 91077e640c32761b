"""Policy on its way from the operator to the nodes: one index, and the pieces that it names by their content.

An edit of one policy changes one piece and the index, so that it costs each node some kilobytes however many policies there are. A piece
holds policies whose names hash alike, as compressed JSON: what a node reads is what a person would have written, and is checked alike.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET
from msgspec.structs import replace

from .features import BASE, needs
from .installation import InterceptionAuthority, SnapshotIndex, TransparentProxy
from .meta import (
    API_VERSION,
    NAMESPACE_NAME_LABEL,
    LabelRequirement,
    LabelSelector,
    ObjectMeta,
    Operator,
)
from .model import ClusterTransparentPolicy, ClusterTransparentPolicySpec, TransparentPolicy
from .objects import Key, Object, Objects, key_of
from .parse import parse_values
from .selection import namespace_labels

FORMAT = 1
INDEX_NAME = "current"
"""Of the TransparentSnapshot that is the index."""
PIECE_BYTES = 16 << 10
"""What a piece is meant to hold at most before it is compressed."""
MAX_PIECE_BYTES = 256 << 10
"""... and holds at most compressed."""
MAX_UNPACKED_BYTES = 16 << 20
_REVISION_DIGITS = 12
_NAME_DIGITS = 40

IN_NAMESPACES = "inNamespaces"
"""Beside metadata and spec of an object in a piece: the namespaces that its namespaceSelector was resolved to."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """pieces: base64 by name, the value of TransparentSnapshot's spec.piece.data; index names just these."""

    index: SnapshotIndex
    pieces: Mapping[str, str]


Shipped = TransparentPolicy | ClusterTransparentPolicy | InterceptionAuthority | TransparentProxy


class TooLarge(Exception):
    """An object does not fit into a piece. key: of the object."""

    def __init__(self, each: Object, size: int) -> None:
        self.key = key_of(each)
        super().__init__(f"is {size >> 10} KiB compressed, and a piece holds {MAX_PIECE_BYTES >> 10}; split the policy")


class Unusable(Exception):
    """A snapshot that this node cannot enforce as a whole. problems: one line each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class Incomplete(Unusable):
    """Pieces are missing: they are on their way, or gone already because a later index is."""


# The operator's half


def snapshot_of(objects: Objects) -> tuple[Snapshot, dict[Key, str]]:
    """Return what nodes are to enforce: policies, authorities and the installation of objects; namespaces resolve selectors.
    And a digest of each object as nodes will see it.

    The same objects give the same snapshot, in whichever order they came. Raises TooLarge.
    """
    labels = namespace_labels(objects.namespaces)
    shipped: tuple[Shipped, ...] = (
        *objects.policies,
        *objects.cluster_policies,
        *objects.authorities,
        *map(_without_placement, objects.proxies),
    )
    texts = {key_of(each): _text(each, labels) for each in shipped}
    features = BASE | {feature for each in shipped for _, feature in needs(each)}
    count = 1
    while count * PIECE_BYTES < sum(map(len, texts.values())):
        count *= 2
    buckets: dict[int, list[bytes]] = {}
    for each in sorted(shipped, key=key_of):
        text = texts[key_of(each)]
        if (
            len(text) > MAX_PIECE_BYTES // 2 and (alone := len(_packed([text]))) > MAX_PIECE_BYTES
        ):  # no text doubles when packed
            raise TooLarge(each, alone)
        number = int.from_bytes(hashlib.sha256("\0".join(key_of(each)).encode()).digest()[:4]) % count
        buckets.setdefault(number, []).append(text)
    packed = [part for number in sorted(buckets) for part in _fitting(buckets[number])]
    pieces = {piece_name(data): base64.b64encode(data).decode() for data in packed}
    said = msgspec.json.encode((FORMAT, sorted(features), sorted(pieces)))
    revision = hashlib.sha256(said).hexdigest()[:_REVISION_DIGITS]
    index = SnapshotIndex(
        revision=revision, format=FORMAT, features=tuple(sorted(features)), pieces=tuple(sorted(pieces))
    )
    digests = {key: hashlib.sha256(text).hexdigest()[:_REVISION_DIGITS] for key, text in texts.items()}
    return Snapshot(index, pieces), digests


def piece_name(data: bytes) -> str:
    """Return the name of the TransparentSnapshot that holds data."""
    return f"piece-{hashlib.sha256(data).hexdigest()[:_NAME_DIGITS]}"


def _without_placement(proxy: TransparentProxy) -> TransparentProxy:
    """Where the proxy runs, and as which image, is the operator's business alone."""
    return replace(proxy, spec=replace(proxy.spec, node_selector=UNSET, images=UNSET))


def _text(each: Shipped, labels: Mapping[str, Mapping[str, str]]) -> bytes:
    meta, spec = each.metadata, each.spec
    value: dict[str, Any] = {
        "apiVersion": API_VERSION,
        "kind": each.kind,
        "metadata": ObjectMeta(name=meta.name, namespace=meta.namespace, creation_timestamp=meta.creation_timestamp),
    }
    if isinstance(spec, ClusterTransparentPolicySpec) and spec.namespace_selector not in (UNSET, LabelSelector()):
        selector = spec.namespace_selector
        assert isinstance(selector, LabelSelector)
        value[IN_NAMESPACES] = sorted(name for name, of in labels.items() if selector.matches(of))
        spec = replace(spec, namespace_selector=LabelSelector())  # of any length, the names are what counts
    return msgspec.json.encode({**value, "spec": spec})


def _packed(texts: list[bytes]) -> bytes:
    return zlib.compress(b"[" + b",".join(texts) + b"]", 9)


def _fitting(texts: list[bytes]) -> Iterator[bytes]:
    """Yield texts as pieces, more than one where one would be too large."""
    data = _packed(texts)
    if len(data) <= MAX_PIECE_BYTES:
        yield data
        return
    yield from _fitting(texts[: len(texts) // 2])
    yield from _fitting(texts[len(texts) // 2 :])


# The node's half


def objects_of(index: SnapshotIndex, pieces: Mapping[str, str], supported: frozenset[str]) -> Objects:
    """Return what an index and the pieces that it names hold together, selectors resolved; pods and namespaces are the node's to add.

    pieces: base64 by name; more than the index names is no harm. supported: the features that this node has.
    Raises Incomplete, or Unusable for what is damaged or asks for more than this node can do: a part of a policy is never dropped.
    """
    if index.format != FORMAT:
        raise Unusable(
            [f"has format {index.format}, this version reads {FORMAT}; bring operator and nodes to one version"]
        )
    if lacking := sorted(set(index.features) - supported):
        raise Unusable(
            [
                f"needs feature {each}, which this version does not have; bring the node to the operator's version"
                for each in lacking
            ]
        )
    if missing := sorted(set(index.pieces) - set(pieces)):
        raise Incomplete([f"{each} is not there" for each in missing])
    values = [(name, value) for name in index.pieces for value in _unpacked(name, pieces[name])]
    resolved = [value.pop(IN_NAMESPACES, None) for _, value in values]
    objects = parse_values(values)
    if not isinstance(objects, Objects):
        raise Unusable([str(problem) for problem in objects])
    names = {
        value["metadata"]["name"]: tuple(found)
        for (_, value), found in zip(values, resolved, strict=True)
        if found is not None
    }
    return dataclasses.replace(
        objects, cluster_policies=tuple(_resolved(each, names) for each in objects.cluster_policies)
    )


def _unpacked(name: str, text: str) -> Iterator[dict[str, Any]]:
    try:
        data = base64.b64decode(text, validate=True)
        if piece_name(data) != name:
            raise Unusable([f"{name}: is damaged, its content has another hash"])
        unpacking = zlib.decompressobj()
        plain = unpacking.decompress(data, MAX_UNPACKED_BYTES)
        if not unpacking.eof:
            raise Unusable([f"{name}: is cut off, or larger than {MAX_UNPACKED_BYTES >> 20} MiB unpacked"])
        yield from msgspec.json.decode(plain, type=list[dict[str, Any]])
    except (binascii.Error, ValueError, zlib.error, msgspec.MsgspecError) as err:
        raise Unusable([f"{name}: cannot be read: {err}"]) from err


def _resolved(policy: ClusterTransparentPolicy, names: Mapping[str, tuple[str, ...]]) -> ClusterTransparentPolicy:
    """The policy with a selector of namespaces by name; one that selects none selects no pod, rather than every one."""
    if policy.metadata.name not in names:
        return policy
    only = LabelRequirement(key=NAMESPACE_NAME_LABEL, operator=Operator.IN, values=names[policy.metadata.name])
    return replace(policy, spec=replace(policy.spec, namespace_selector=LabelSelector(match_expressions=(only,))))
