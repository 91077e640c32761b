"""What the operator packs is what the nodes unpack, whole or not at all."""

from __future__ import annotations

import base64
import dataclasses
import random
import zlib

import msgspec
import pytest
from msgspec.structs import replace

from pellucid_policy.compile import compile_policies
from pellucid_policy.features import ALL, ONE_NODE
from pellucid_policy.meta import Namespace
from pellucid_policy.objects import Objects
from pellucid_policy.parse import parse_files
from pellucid_policy.snapshot import (
    MAX_UNPACKED_BYTES,
    Incomplete,
    Snapshot,
    TooLarge,
    Unusable,
    objects_of,
    piece_name,
)
from pellucid_policy.snapshot import (
    snapshot_of as packed,
)

from . import generate


def read(text: str) -> Objects:
    found = parse_files({"test.yaml": text.encode()})
    assert isinstance(found, Objects), found
    return found


def snapshot_of(objects: Objects) -> Snapshot:
    return packed(objects)[0]


def policy(name: str, domain: str = "example.com") -> str:
    return f"""---
apiVersion: pellucid.dev/v1alpha1
kind: TransparentPolicy
metadata: {{name: {name}, namespace: shop, creationTimestamp: "2026-01-31T12:00:00Z", resourceVersion: "7", labels: {{a: b}}}}
spec:
  podSelector: {{}}
  rules: [{{match: {{destinations: [{{domain: {domain}}}]}}, action: Block}}]
"""


DEFAULT = msgspec.convert({"metadata": {"name": "default"}}, Namespace)
NAMESPACES = """---
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {team: red}}
---
apiVersion: v1
kind: Namespace
metadata: {name: bank, labels: {team: blue}}
"""


def cluster_policy(selector: str) -> str:
    return f"""---
apiVersion: pellucid.dev/v1alpha1
kind: ClusterTransparentPolicy
metadata: {{name: all}}
spec:
  tier: Admin
  namespaceSelector: {selector}
  rules: [{{match: {{}}, action: Block}}]
"""


POD = """---
apiVersion: v1
kind: Pod
metadata: {name: api, namespace: %s}
status: {podIP: 10.0.0.1}
"""


def unpacked(snapshot: Snapshot, supported: frozenset[str] = ONE_NODE) -> Objects:
    return objects_of(snapshot.index, snapshot.pieces, supported)


def test_a_node_enforces_what_the_operator_read() -> None:
    for seed in range(60):
        objects = generate.objects(random.Random(seed), most=8)
        objects = dataclasses.replace(objects, namespaces=(*objects.namespaces, DEFAULT))  # a cluster has it
        found = dataclasses.replace(unpacked(snapshot_of(objects), ALL), pods=objects.pods)
        assert compile_policies(found) == compile_policies(objects), seed


def test_the_order_of_objects_makes_no_difference() -> None:
    objects = read("".join(policy(f"p{number}") for number in range(40)))
    other = dataclasses.replace(objects, policies=objects.policies[::-1])
    assert snapshot_of(objects) == snapshot_of(other)


@pytest.mark.parametrize(
    ("selector", "namespace", "selected"),
    [
        ("{matchLabels: {team: red}}", "shop", True),
        ("{matchLabels: {team: red}}", "bank", False),
        ("{matchLabels: {team: green}}", "shop", False),  # selects no namespace, rather than every one
        ("{}", "shop", True),
        ("{}", "later", True),
    ],
)
def test_a_node_needs_no_labels_of_namespaces(selector: str, namespace: str, selected: bool) -> None:
    found = unpacked(snapshot_of(read(cluster_policy(selector) + NAMESPACES)))
    assert not found.namespaces
    compiled = compile_policies(dataclasses.replace(found, pods=read(POD % namespace).pods))
    assert (compiled.pods[0].group is not None) is selected


def test_more_namespaces_than_a_selector_may_list_are_resolved() -> None:
    many = "".join(
        f"---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: n{number}, labels: {{team: red}}}}\n"
        for number in range(200)
    )
    found = unpacked(snapshot_of(read(cluster_policy("{matchLabels: {team: red}}") + many)))
    again = dataclasses.replace(found, namespaces=read(many).namespaces)
    assert unpacked(snapshot_of(again)) == found, "what was resolved may be packed again"
    assert compile_policies(dataclasses.replace(found, pods=read(POD % "n199").pods)).pods[0].group is not None


def test_what_only_the_operator_needs_is_not_shipped() -> None:
    objects = read(
        "apiVersion: pellucid.dev/v1alpha1\nkind: TransparentProxy\nmetadata: {name: default}\n"
        "spec: {podCIDRs: [10.0.0.0/8], nodeSelector: {a: b}, images: {proxy: x}}\n" + policy("p")
    )
    found = unpacked(snapshot_of(objects))
    assert msgspec.json.encode(found.proxies[0].spec) == b'{"podCIDRs":["10.0.0.0/8"]}'
    assert found.policies[0].metadata.resource_version is msgspec.UNSET


def test_an_edit_changes_one_piece() -> None:
    before = snapshot_of(read("".join(policy(f"p{number}") for number in range(1000))))
    after = snapshot_of(read("".join(policy(f"p{number}", f"v{number == 500}.example") for number in range(1000))))
    one = snapshot_of(
        read(
            "".join(policy(f"p{number}", "other.example" if number == 500 else "example.com") for number in range(1000))
        )
    )
    assert len(set(one.pieces) - set(before.pieces)) == 1
    assert len(set(after.pieces) - set(before.pieces)) == len(after.pieces)
    cost = len(msgspec.json.encode(one.index)) + sum(
        len(one.pieces[name]) for name in set(one.pieces) - set(before.pieces)
    )
    assert cost < 10_000, "bytes a node is sent for an edit"


def large(name: str, rules: int) -> str:
    """A policy whose names do not compress well."""
    noise = random.Random(name)
    names = [
        ", ".join(f"{{domain: {noise.randbytes(31).hex()}.{noise.randbytes(31).hex()}.example}}" for _ in range(500))
        for _ in range(rules)
    ]
    said = ", ".join(f"{{match: {{destinations: [{each}]}}, action: Block}}" for each in names)
    return f"""---
apiVersion: pellucid.dev/v1alpha1
kind: TransparentPolicy
metadata: {{name: {name}, namespace: shop}}
spec: {{podSelector: {{}}, rules: [{said}]}}
"""


def test_a_policy_that_fits_into_no_piece_is_named() -> None:
    small = "".join(policy(f"p{number}") for number in range(3))
    snapshot = snapshot_of(read(small + large("a", 5) + large("b", 5) + large("c", 5)))
    assert len(unpacked(snapshot).policies) == 6
    assert all(len(data) <= 350_000 for data in snapshot.pieces.values()), "the type's own bound"
    with pytest.raises(TooLarge, match="split the policy") as told:
        snapshot_of(read(small + large("larger", 9)))
    assert told.value.key == ("TransparentPolicy", "shop", "larger")


def test_what_is_missing_damaged_or_unknown_is_refused_as_a_whole() -> None:
    snapshot = snapshot_of(read(policy("p")))
    (name,) = snapshot.pieces
    with pytest.raises(Incomplete, match=f"{name} is not there"):
        objects_of(snapshot.index, {}, ONE_NODE)
    with pytest.raises(Unusable, match="has another hash"):
        objects_of(snapshot.index, {name: base64.b64encode(b"other").decode()}, ONE_NODE)
    with pytest.raises(Unusable, match="cannot be read"):
        objects_of(snapshot.index, {name: "no base64!"}, ONE_NODE)
    with pytest.raises(Unusable, match="needs feature Block"):
        objects_of(snapshot.index, snapshot.pieces, ONE_NODE - {"Block"})
    with pytest.raises(Unusable, match="has format 2"):
        objects_of(replace(snapshot.index, format=2), snapshot.pieces, ONE_NODE)


UNKNOWN_FIELD = b'[{"apiVersion": "pellucid.dev/v1alpha1", "kind": "TransparentPolicy", "metadata": {"name": "p"}, "spec": {"new": 1}}]'


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (zlib.compress(b"[]")[:-1], "cut off"),
        (zlib.compress(b" " * (MAX_UNPACKED_BYTES + 1)), "larger than 16 MiB"),
        (zlib.compress(b"[{]"), "cannot be read"),
        (zlib.compress(UNKNOWN_FIELD), "new"),
        (zlib.compress(b'[{"apiVersion": "pellucid.dev/v2", "kind": "TransparentPolicy"}]'), "no version"),
        (zlib.compress(b'[{"kind": 1}, 2]'), "cannot be read"),
    ],
)  # fmt: skip
def test_a_piece_that_hashes_well_and_holds_nonsense_is_refused(data: bytes, why: str) -> None:
    name = piece_name(data)
    index = replace(snapshot_of(read(policy("p"))).index, pieces=(name,))
    with pytest.raises(Unusable, match=why):
        objects_of(index, {name: base64.b64encode(data).decode()}, ONE_NODE)
