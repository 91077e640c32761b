"""Absent, null and empty are never a wildcard: a table over every field of the API.

The table is made from the types. every-field.yaml must hold each field, so a new field fails here until the manifest shows it and, if
it may be left out or empty, until MAY_BE_ABSENT or MAY_BE_EMPTY says what that means.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import pytest

from pellucid_policy.meta import ObjectMeta
from pellucid_policy.objects import Objects, path_of
from pellucid_policy.parse import KINDS, parse_files
from pellucid_policy.yaml_tree import documents

Path_ = tuple[str | int, ...]
MANIFEST = Path(__file__).parent / "manifests" / "good" / "every-field.yaml"
DOCUMENTS = [value for value, _ in documents(MANIFEST.read_bytes())]

NEW = "an override, a record or bookkeeping: without it nothing more is matched or allowed"
MAY_BE_ABSENT = {
    "Match.destinations": "match itself is there; its fields narrow, and {} is the one way to say everything",
    "Match.ports": "as destinations: every protocol",
    "RequestMatch.methods": "as Match: narrows", "RequestMatch.path": "as Match: narrows",
    "LabelSelector.matchLabels": "the selector is there; its fields narrow", "LabelSelector.matchExpressions": "as matchLabels",
    "LabelRequirement.values": "with Exists and DoesNotExist only; check.py",
    "Destination.cidr": "exactly one; check_rules.py", "Destination.domain": "exactly one", "Destination.service": "exactly one",
    "PortEntry.port": "all ports of the protocol that is then required", "PortEntry.endPort": "one port",
    "PortEntry.protocol": "TCP, and then port is required",
    "ClusterTransparentPolicySpec.podSelector": "one of three must be there",
    "ClusterTransparentPolicySpec.namespaceSelector": "one of three",
    "ClusterTransparentPolicySpec.serviceAccounts": "one of three",
    "RouteTarget.address": "address or service", "RouteTarget.port": "required with address", "RouteTarget.service": "address or service",
    "RouteSpec.to": "to or via", "RouteSpec.via": "to or via",
    "Egress.routeTable": "one of three", "Egress.interface": "one of three", "Egress.sourceAddress": "one of three",
    "PathMatch.exact": "exactly one", "PathMatch.prefix": "exactly one",
    "AuthorityKey.secretRef": "exactly one", "AuthorityKey.files": "exactly one",
    "InterceptionAuthoritySpec.neverIntercept": "no name is excepted; names still bounds the authority",
    "Names.missingSNI": "Continue: the rule does not match", "Names.encryptedClientHello": "UseOuterName", "Names.hostMismatch": "Block",
    "Names.quic": "Reject where a rule has a domain",
    "Block.response": "Reset", "Block.status": "403", "Block.body": "none",
    "Rule.block": "Reset", "Rule.route": "required by action Route", "Rule.intercept": "required by action Intercept",
    "Rule.mode": "the policy's", "Rule.egress": NEW, "Rule.name": NEW,
    "Intercept.onClientRejects": "Block", "Trust.inject": "OptIn", "InterceptionAuthoritySpec.trust": NEW,
    "RequestRule.name": NEW, "RequestRule.request": NEW, "RequestRule.response": NEW, "RequestRule.block": "Reset",
    "RequestChange.setHeaders": NEW, "RequestChange.removeHeaders": NEW, "RequestChange.setHeadersFrom": NEW,
    "ResponseChange.setHeaders": NEW, "ResponseChange.removeHeaders": NEW, "ResponseChange.inject": NEW,
    **{
        f"{spec}.{field}": meaning
        for spec in ("TransparentPolicySpec", "ClusterTransparentPolicySpec")
        for field, meaning in (("priority", "500"), ("mode", "Enforce"), ("failureMode", "Closed"), ("onPolicyChange", "Reevaluate"),
                               ("names", "its defaults"))
    },
    "TransparentProxySpec.podCIDRs": "each node's own", "TransparentProxySpec.defaultAction": "Allow",
    **{f"TransparentProxySpec.{field}": NEW for field in ("sourceAddress", "unknownPods", "exclude", "marks", "workers", "limits",
                                                          "nodeSelector", "images")},
    "Exclude.cidrs": "excludes nothing", "Exclude.ports": "excludes nothing", "Limits.connectionsPerPod": NEW, "Limits.connections": NEW,
    "Limits.connectionRatePerPod": NEW,
    "Images.proxy": NEW,
    **{f"{kind}.status": NEW for kind in ("TransparentPolicy", "ClusterTransparentPolicy", "InterceptionAuthority", "TransparentProxy",
                                          "TransparentNode", "Pod")},
    **{f"PolicyStatus.{field}": NEW for field in ("observedGeneration", "revision", "nodes", "conditions")},
    **{f"NodeStatus.{field}": NEW for field in ("observedGeneration", "revision", "version", "findings", "conditions")},
    **{f"Condition.{field}": NEW for field in ("reason", "message", "lastTransitionTime", "observedGeneration")},
    **{f"ObjectMeta.{field.encode_name}": NEW for field in msgspec.structs.fields(ObjectMeta) if field.name != "name"},
    "PodMeta.namespace": "default", "PodMeta.uid": NEW, "PodMeta.labels": "none: only selectors of absence and {} select it",
    "Pod.spec": "the defaults of its fields", "PodSpec.nodeName": NEW, "PodSpec.serviceAccountName": "default",
    "PodSpec.hostNetwork": "false",
    "PodStatus.phase": "running", "PodStatus.podIP": "no address", "PodStatus.podIPs": "podIP", "NamespaceMeta.labels": "none",
}  # fmt: skip
MAY_BE_EMPTY = {
    "TransparentPolicySpec.podSelector": "{} is the one way to say every pod", "ClusterTransparentPolicySpec.podSelector": "as there",
    "ClusterTransparentPolicySpec.namespaceSelector": "{} is every namespace",
    "InterceptionAuthoritySpec.namespaces": "{} is every namespace",
    "Rule.match": "{} is the one way to say every flow", "RequestRule.match": "{} is every request",
    **{f"{spec}.names": "its defaults" for spec in ("TransparentPolicySpec", "ClusterTransparentPolicySpec")},
    "Rule.block": "Reset", "RequestRule.block": "Reset", "RequestRule.request": NEW, "RequestRule.response": NEW,
    "LabelSelector.matchLabels{}": "an empty label value equals only itself", "LabelRequirement.values[]": "as there",
    "ObjectMeta.labels": NEW, "ObjectMeta.labels{}": NEW, "ObjectMeta.annotations": NEW, "ObjectMeta.annotations{}": NEW,
    "ObjectMeta.finalizers": NEW, "ObjectMeta.ownerReferences": NEW, "ObjectMeta.ownerReferences[]": NEW,
    "ObjectMeta.managedFields": NEW, "ObjectMeta.managedFields[]": NEW,
    "TransparentProxySpec.podCIDRs": "each node's own", "Exclude.cidrs": "excludes nothing", "Exclude.ports": "excludes nothing",
    "TransparentProxy.spec": "the defaults", "TransparentProxySpec.exclude": "excludes nothing", "TransparentProxySpec.limits": NEW,
    "TransparentProxySpec.images": NEW, "TransparentProxySpec.nodeSelector{}": "a label value",
    **{f"{kind}.status": NEW for kind in ("TransparentPolicy", "ClusterTransparentPolicy", "InterceptionAuthority", "TransparentProxy",
                                          "TransparentNode", "Pod")},
    "SnapshotIndex.features": "a policy may need none", "SnapshotIndex.pieces": "no policy is one too: nothing is selected",
    "PolicyStatus.conditions": NEW, "NodeStatus.conditions": NEW, "NodeStatus.findings": NEW, "Condition.message": NEW,
    "Pod.spec": "its defaults", "PodMeta.labels": "none", "PodMeta.labels{}": "a label value", "PodStatus.podIPs": "podIP, or no address",
    "NamespaceMeta.labels": "none", "NamespaceMeta.labels{}": "a label value",
}  # fmt: skip
MAY_BE_NULL = {"ObjectMeta.creationTimestamp": "kubectl writes it so"}


def structs() -> Iterator[type[Any]]:
    """Every struct that a kind is made of."""
    waiting, seen = list(KINDS.values()), set()
    while waiting:
        kind = waiting.pop()
        if kind in seen:
            continue
        seen.add(kind)
        yield kind
        for hint in get_type_hints(kind).values():
            waiting += _structs_in(hint)


def _structs_in(hint: Any) -> list[type[Any]]:
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return [hint]
    return [each for inner in get_args(hint) for each in _structs_in(inner)]


def occurrences() -> Iterator[tuple[int, Path_, str, Any]]:
    """Document, path, Struct.field (with [] or {} for an entry of a list or map) and value of everything in every-field.yaml."""
    for at, document in enumerate(DOCUMENTS):
        kind = KINDS[document["apiVersion"], document["kind"]]
        body = {key: value for key, value in document.items() if key not in ("apiVersion", "kind")}
        for path, field, value in _within(kind, body, ()):
            yield at, path, field, value


def _within(kind: type[Any], value: dict[str, Any], path: Path_) -> Iterator[tuple[Path_, str, Any]]:
    hints = get_type_hints(kind)
    for field in msgspec.structs.fields(kind):
        if field.encode_name not in value:
            continue
        inner, here, said = value[field.encode_name], (*path, field.encode_name), f"{kind.__name__}.{field.encode_name}"
        yield here, said, inner
        structs_inside = _structs_in(hints[field.name])
        if isinstance(inner, list):
            for at, each in enumerate(inner):
                yield (*here, at), f"{said}[]", each
                if structs_inside:
                    yield from _within(structs_inside[0], each, (*here, at))
        elif structs_inside:
            yield from _within(structs_inside[0], inner, here)
        elif isinstance(inner, dict):
            for key, each in inner.items():
                yield (*here, key), f"{said}{{}}", each


OCCURRENCES = list(occurrences())
FIELDS = [each for each in OCCURRENCES if not each[2].endswith(("[]", "{}"))]


def _said(each: tuple[int, Path_, str, Any]) -> str:
    return f"{each[0]}-{path_of(each[1])}"


def changed(at: int, path: Path_, value: Any) -> list[str]:
    """Parse the manifest with the value at path replaced (or taken away, for ...); return the paths of the problems."""
    document = copy.deepcopy(DOCUMENTS[at])
    inner = document
    for step in path[:-1]:
        inner = inner[step]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    found = parse_files({"a.json": msgspec.json.encode(document)})
    return [] if isinstance(found, Objects) else [each.path for each in found]


def test_the_manifest_shows_every_field_of_every_kind() -> None:
    shown = {field for _, _, field, _ in OCCURRENCES}
    assert {
        f"{kind.__name__}.{field.encode_name}" for kind in structs() for field in msgspec.structs.fields(kind)
    } <= shown


def test_the_tables_name_only_fields_that_exist() -> None:
    assert {*MAY_BE_ABSENT, *MAY_BE_EMPTY, *MAY_BE_NULL} <= {field for _, _, field, _ in OCCURRENCES}


@pytest.mark.parametrize("each", OCCURRENCES, ids=_said)
def test_null_is_refused(each: tuple[int, Path_, str, Any]) -> None:
    at, path, field, _ = each
    problems = changed(at, path, None)
    assert bool(problems) != (field in MAY_BE_NULL)
    assert all(path_of(path).startswith(found) and found for found in problems)


@pytest.mark.parametrize("each", [each for each in OCCURRENCES if isinstance(each[3], list | dict | str)], ids=_said)
def test_empty_is_refused(each: tuple[int, Path_, str, Any]) -> None:
    at, path, field, value = each
    assert bool(changed(at, path, type(value)())) != (field in MAY_BE_EMPTY)


@pytest.mark.parametrize("each", FIELDS, ids=_said)
def test_absent_is_refused_or_has_a_stated_meaning(each: tuple[int, Path_, str, Any]) -> None:
    at, path, field, _ = each
    assert changed(at, path, ...) or field in MAY_BE_ABSENT


@pytest.mark.parametrize("kind", sorted(structs(), key=str), ids=str)
def test_every_list_map_string_and_number_is_bounded(kind: type[Any]) -> None:
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    for field in info.fields:
        for each in _plain_types(field.type):
            if isinstance(each, msgspec.inspect.StrType | msgspec.inspect.CollectionType | msgspec.inspect.DictType):
                assert each.max_length is not None, f"{info.cls.__name__}.{field.encode_name}"


def _plain_types(kind: msgspec.inspect.Type) -> Iterator[msgspec.inspect.Type]:
    yield kind
    if isinstance(kind, msgspec.inspect.UnionType):
        for each in kind.types:
            yield from _plain_types(each)
    elif isinstance(kind, msgspec.inspect.CollectionType):
        yield from _plain_types(kind.item_type)
    elif isinstance(kind, msgspec.inspect.DictType) and not isinstance(kind.value_type, msgspec.inspect.AnyType):
        yield from _plain_types(kind.key_type)
        yield from _plain_types(kind.value_type)
