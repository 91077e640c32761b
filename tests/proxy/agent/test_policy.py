"""What a folder may ask of a node without a cluster."""

from __future__ import annotations

import pytest

from pellucid_proxy.agent.node_settings import Wishes
from pellucid_proxy.agent.policy import BadPolicy, accept
from pellucid_proxy.agent.source_files import SourceFile

PROXY = "apiVersion: pellucid.dev/v1alpha1\nkind: TransparentProxy\nmetadata: {name: default}\nspec: {%s}\n"


def files(spec: str) -> tuple[SourceFile, ...]:
    return (SourceFile("p.yaml", (PROXY % spec).encode()),)


def test_every_wish_of_the_installation_is_taken_over() -> None:
    spec = (
        "podCIDRs: [10.244.0.0/16], sourceAddress: Node, exclude: {cidrs: [169.254.20.10/32]}, marks: {mask: 0x3000},"
        " workers: 3, limits: {connections: 9, connectionsPerPod: 4, connectionRatePerPod: 7}, defaultAction: Block"
    )
    accepted = accept(files(spec))
    assert accepted.wishes == Wishes(
        scope=("10.244.0.0/16",),
        exclude=("169.254.20.10/32",),
        source_address="Node",
        marks_mask=0x3000,
        workers=3,
        connections=9,
        connections_per_pod=4,
        connection_rate_per_pod=7,
    )


def test_a_folder_that_says_nothing_of_the_installation_wishes_nothing() -> None:
    namespace = SourceFile("n.yaml", b"apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n")
    assert accept((namespace,)).wishes == Wishes()


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ("nodeSelector: {disk: fast}", "spec.nodeSelector"),
        ("images: {proxy: pellucid}", "spec.images"),
        ("exclude: {ports: [53]}", "spec.exclude.ports"),
    ],
)
def test_what_a_node_cannot_do_is_refused_and_never_ignored(spec: str, path: str) -> None:
    with pytest.raises(BadPolicy) as raised:
        accept(files(spec))
    (problem,) = raised.value.problems
    assert problem.startswith(f"p.yaml:4: {path}: needs feature ")


def test_one_bad_file_refuses_the_whole_folder() -> None:
    with pytest.raises(BadPolicy, match=r"b\.yaml:1"):
        accept((*files("workers: 1"), SourceFile("b.yaml", b"nonsense")))
