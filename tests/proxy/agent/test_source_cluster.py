"""A node's policy out of a cluster: snapshot and pods, whole or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pellucid_policy.objects import Objects
from pellucid_policy.parse import parse_files
from pellucid_policy.snapshot import snapshot_of
from pellucid_proxy.agent import source_cluster
from pellucid_proxy.agent.policy import BadPolicy
from pellucid_proxy.agent.source_cluster import (
    ClusterSource,
    KeptPod,
    OwnNode,
    kept_pod,
    own_node,
    pods_of,
    scope_of,
    wants,
)

from ..kube.server import NODES, PODS, SNAPSHOTS, FakeServer, serving

DAEMON_SETS = "/apis/apps/v1/namespaces/pellucid-system/daemonsets"
PATIENCE_S = 10.0


def objects(*domains: str, proxy: str = "") -> Objects:
    text = proxy
    for number, domain in enumerate(domains):
        text += f"""---
apiVersion: pellucid.dev/v1alpha1
kind: TransparentPolicy
metadata: {{name: p{number}, namespace: shop}}
spec: {{podSelector: {{}}, rules: [{{match: {{destinations: [{{domain: {domain}}}]}}, action: Block}}]}}
"""
    found = parse_files({"x.yaml": text.encode()}) if text else Objects()
    assert isinstance(found, Objects), found
    return found


def pod(
    name: str, *addresses: str, node: str = "n1", created: str = "2026-01-01T00:00:00Z", **more: Any
) -> dict[str, Any]:
    return {
        "metadata": {
            "name": name,
            "namespace": "shop",
            "uid": name,
            "creationTimestamp": created,
            **more.pop("meta", {}),
        },
        "spec": {"nodeName": node, "containers": [], **more},
        "status": {"phase": "Running", "podIPs": [{"ip": each} for each in addresses]},
    }


class World:
    def __init__(self, server: FakeServer, source: ClusterSource, task: asyncio.Task[None]) -> None:
        self.server = server
        self.source = source
        self._task = task

    async def end(self) -> None:
        """The source's work is over."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def offer(self, found: Objects, *, index_first: bool = False) -> str:
        snapshot, _ = snapshot_of(found)
        pieces: list[dict[str, Any]] = [
            {"metadata": {"name": name}, "spec": {"piece": {"data": data}}} for name, data in snapshot.pieces.items()
        ]
        index = {"metadata": {"name": "current"}, "spec": {"index": msgspec.to_builtins(snapshot.index)}}
        for each in [index, *pieces] if index_first else [*pieces, index]:
            await self.server.put(SNAPSHOTS, each)
        return snapshot.index.revision

    async def refuses(self) -> str:
        """Why the source comes to be refused."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                await self.source.changed(None)
                try:
                    if found := self.source.read().problems:
                        return "; ".join(found)
                except BadPolicy as bad:
                    return str(bad)

    async def comes_to(self, revision: str = "", pods: tuple[str, ...] | None = None) -> bool:
        """Whether what is read comes to be of that snapshot, with those pods."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    found = self.source.read()
                    if found.snapshot == (revision or found.snapshot) and (
                        pods is None or tuple(each.name for each in found.policy.pods) == pods
                    ):
                        return True
                except BadPolicy:
                    pass
                await self.source.changed(None)


@asynccontextmanager
async def world(tmp_path: Path, **node_spec: Any) -> AsyncIterator[World]:
    spec = {"podCIDRs": ["10.244.1.0/24", "fd00:244:1::/64"], **node_spec}
    node = {"metadata": {"name": "n1", "uid": "u1", "labels": {"a": "b"}}, "spec": spec}
    server = FakeServer(collections={PODS: {}, SNAPSHOTS: {}, NODES: {"n1": node}, DAEMON_SETS: {}})
    async with serving(server, str(tmp_path / "token")) as access:
        source = ClusterSource(access, "n1", ("pellucid-system", "pellucid-node"))
        task = asyncio.create_task(source.run())
        try:
            yield World(server, source, task)
        finally:
            task.cancel()
            await asyncio.wait([task])


def test_the_first_read_has_policies_pods_and_scope(tmp_path: Path) -> None:
    async def act() -> None:
        async with world(tmp_path) as w:
            await w.server.put(PODS, pod("api", "10.244.1.5", "fd00:244:1::5"))
            revision = await w.offer(objects("one.example"))
            await w.source.first(PATIENCE_S)
            found = w.source.read()
            assert (found.snapshot, w.source.offered) == (revision, revision)
            assert [(each.name, len(each.addresses), each.group) for each in found.policy.pods] == [("api", 2, 0)]
            assert found.wishes.scope == ("10.244.1.0/24", "fd00:244:1::/64")

    asyncio.run(act())


@pytest.mark.parametrize(
    "labels", [{f"l{number}": "" for number in range(1000)}, {f"{'a.' * 126}a/{'n' * 63}": "x" * 63}]
)
def test_whatever_labels_a_pod_has_it_is_known(tmp_path: Path, labels: dict[str, str]) -> None:
    async def act() -> None:
        async with world(tmp_path) as w:
            await w.server.put(PODS, pod("api", "10.244.1.5", meta={"labels": labels}))
            revision = await w.offer(objects("one.example"))
            await w.source.first(PATIENCE_S)
            assert await w.comes_to(revision, ("api",))

    asyncio.run(act())


@pytest.mark.parametrize("index_first", [False, True])
def test_an_index_counts_when_all_its_pieces_are_there(tmp_path: Path, index_first: bool) -> None:
    async def act() -> None:
        async with world(tmp_path) as w:
            await w.offer(objects("one.example"))
            await w.source.first(PATIENCE_S)
            revision = await w.offer(objects("two.example"), index_first=index_first)
            assert await w.comes_to(revision)

    asyncio.run(act())


def test_pieces_that_do_not_come_are_told_and_what_was_read_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_cluster, "COMPLETE_S", 0.1)

    async def act() -> None:
        async with world(tmp_path) as w:
            await w.offer(objects("one.example"))
            await w.source.first(PATIENCE_S)
            index = snapshot_of(objects("two.example"))[0].index
            await w.server.put(
                SNAPSHOTS, {"metadata": {"name": "current"}, "spec": {"index": msgspec.to_builtins(index)}}
            )
            assert "is not there" in await w.refuses()

    asyncio.run(act())


def test_pods_come_and_go_while_a_snapshot_is_refused(tmp_path: Path) -> None:
    """An operator that is newer than its nodes: their pods are held to the last policies that they could take."""

    async def act() -> None:
        async with world(tmp_path) as w:
            revision = await w.offer(objects("one.example"))
            await w.source.first(PATIENCE_S)
            w.source.read()
            newer = {"index": {"revision": "newer", "format": 1, "features": ["Telepathy"], "pieces": []}}
            await w.server.put(SNAPSHOTS, {"metadata": {"name": "current"}, "spec": newer})
            assert "needs feature Telepathy" in await w.refuses()
            await w.server.put(PODS, pod("late", "10.244.1.9"))
            assert await w.comes_to(revision, ("late",))
            found = w.source.read()
            assert (found.policy.pods[0].group, found.snapshot, w.source.offered) == (0, revision, "newer")
            assert found.problems
            again = await w.offer(objects("two.example"))
            assert await w.comes_to(again, ("late",))
            assert w.source.read().problems == ()

    asyncio.run(act())


def test_pods_come_change_and_go(tmp_path: Path) -> None:
    async def act() -> None:
        async with world(tmp_path) as w:
            revision = await w.offer(objects("one.example"))
            await w.source.first(PATIENCE_S)
            await w.server.put(PODS, pod("api", "10.244.1.5"))
            assert await w.comes_to(revision, ("api",))
            await w.server.put(PODS, pod("web", "10.244.1.6"))
            assert await w.comes_to(revision, ("api", "web"))
            await w.server.remove(PODS, "api")
            assert await w.comes_to(revision, ("web",))
            asked = [query for _, path, query in w.server.requests if path == PODS]
            assert {query["fieldSelector"] for query in asked} == {"spec.nodeName=n1"}, "never a pod of another node"

    asyncio.run(act())


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"index": {"revision": "x", "format": 1, "features": ["Telepathy"], "pieces": []}}, "needs feature Telepathy"),
        ({"index": {"revision": "x", "format": 9, "features": [], "pieces": []}}, "has format 9"),
        ({"index": {"revision": "x", "format": 1, "features": [], "pieces": [], "more": 1}}, "unknown field `more`"),
    ],
)
def test_a_snapshot_of_another_version_is_refused_with_the_cure(tmp_path: Path, spec: dict[str, Any], why: str) -> None:
    async def act() -> None:
        async with world(tmp_path) as w:
            await w.offer(objects("one.example"))
            await w.source.first(PATIENCE_S)
            await w.server.put(SNAPSHOTS, {"metadata": {"name": "current"}, "spec": spec})
            said = await w.refuses()
            assert why in said
            assert "bring" in said

    asyncio.run(act())


def test_what_the_index_does_not_name_hinders_nobody(tmp_path: Path) -> None:
    async def act() -> None:
        async with world(tmp_path) as w:
            await w.server.put(SNAPSHOTS, {"metadata": {"name": "stray"}, "spec": {"of": "a later version"}})
            revision = await w.offer(objects("one.example"))
            await w.source.first(PATIENCE_S)
            assert w.source.read().snapshot == revision

    asyncio.run(act())


@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        ("nothing", "there is no TransparentSnapshot current with all its pieces; is the operator running"),
        ("no cidr", "has no spec.podCIDRs"),
        ("no rights", "401"),
    ],
)
def test_what_is_missing_at_the_start_is_told(tmp_path: Path, prepare: str, why: str) -> None:
    async def act() -> None:
        async with world(tmp_path, **({"podCIDRs": []} if prepare == "no cidr" else {})) as w:
            if prepare == "no rights":
                w.server.token = "other"
            if prepare == "no cidr":
                await w.offer(objects("one.example"))
            with pytest.raises(BadPolicy, match=why):
                await w.source.first(1.0)

    asyncio.run(act())


@pytest.mark.parametrize(
    ("daemon_set", "stays"),
    [
        (None, False),
        ({"metadata": {"name": "pellucid-node"}, "spec": {"template": {"spec": {}}}}, True),
        ({"metadata": {"name": "pellucid-node", "deletionTimestamp": "now"}, "spec": {"template": {"spec": {}}}}, False),
        ({"metadata": {"name": "pellucid-node"}, "spec": {"template": {"spec": {"nodeSelector": {"a": "b"}}}}}, True),
        ({"metadata": {"name": "pellucid-node"}, "spec": {"template": {"spec": {"nodeSelector": {"a": "c"}}}}}, False),
    ],
)  # fmt: skip
def test_rules_stay_while_the_daemon_set_wants_a_pod_here(
    tmp_path: Path, daemon_set: dict[str, Any] | None, stays: bool
) -> None:
    async def act() -> None:
        async with world(tmp_path) as w:
            if daemon_set is not None:
                await w.server.put(DAEMON_SETS, daemon_set)
            await w.offer(objects("one.example"))
            await w.source.first(PATIENCE_S)
            await w.end()
            assert await w.source.stays() is stays
            w.server.token = "other"
            assert await w.source.stays(), "who cannot ask leaves the rules"

    asyncio.run(act())


def test_a_node_that_lost_the_label_is_not_waited_for(tmp_path: Path) -> None:
    async def act() -> None:
        async with world(tmp_path) as w:
            selects = {"template": {"spec": {"nodeSelector": {"a": "b"}}}}
            await w.server.put(DAEMON_SETS, {"metadata": {"name": "pellucid-node"}, "spec": selects})
            await w.offer(objects("one.example"))
            await w.source.first(PATIENCE_S)
            assert await w.source.stays()
            node = w.server.collections[NODES]["n1"]
            await w.server.put(NODES, {**node, "metadata": {**node["metadata"], "labels": {"a": "c"}}})
            await w.end()
            assert not await w.source.stays()

    asyncio.run(act())


def test_who_leaves_takes_its_transparent_node_away(tmp_path: Path) -> None:
    async def act() -> None:
        async with world(tmp_path) as w:
            nodes = "/apis/pellucid.dev/v1alpha1/transparentnodes"
            await w.server.put(nodes, {"metadata": {"name": "n1"}})
            await w.end()
            await w.source.left()
            assert w.server.collections[nodes] == {}
            await w.source.left()  # and may do so twice

    asyncio.run(act())


# Pure


def kept(*pods: dict[str, Any]) -> list[KeptPod]:
    return list(map(kept_pod, pods))


def owners(*pods: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    return {each.metadata.name: each.addresses() for each in pods_of(kept(*pods))}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"meta": {"deletionTimestamp": "now"}, "created": "2026-01-02T00:00:00Z"}, {}),
        ({"created": "2026-01-01T00:00:00Z"}, {"created": "2026-01-02T00:00:00Z"}),
    ],
    ids=["being deleted", "older"],
)
def test_of_two_pods_with_an_address_the_one_that_has_it_now_keeps_it(old: dict[str, Any], new: dict[str, Any]) -> None:
    found = owners(pod("old", "10.0.0.1", "fd00::1", **old), pod("new", "10.0.0.1", **new))
    assert found == {"new": ("10.0.0.1",), "old": ("fd00::1",)}
    assert owners(pod("old", "10.0.0.1", **old), pod("new", "10.0.0.1", **new)) == {"new": ("10.0.0.1",), "old": ()}


def test_host_network_and_ended_pods_have_no_address() -> None:
    ended = pod("ended", "10.0.0.2")
    ended["status"]["phase"] = "Succeeded"
    assert owners(pod("host", "192.0.2.1", hostNetwork=True), ended) == {"host": (), "ended": ()}


def test_a_node_of_the_api() -> None:
    value = {"metadata": {"name": "n1", "uid": "u"}, "spec": {"podCIDR": "10.244.1.0/24"}}
    assert own_node(value) == OwnNode("u", ("10.244.1.0/24",))
    assert own_node({"metadata": {"name": "n1"}}) == OwnNode("", ())


@pytest.mark.parametrize(
    ("wished", "scope"),
    [
        (None, ("10.244.1.0/24", "fd00:1::/64")),
        ((), ("10.244.1.0/24", "fd00:1::/64")),
        (("10.244.0.0/16",), ("10.244.1.0/24",)),
        (("10.244.0.0/16", "fd00:1::/48"), ("10.244.1.0/24", "fd00:1::/64")),
    ],
)
def test_a_node_takes_its_own_pods_alone(wished: tuple[str, ...] | None, scope: tuple[str, ...]) -> None:
    assert scope_of(("10.244.1.0/24", "fd00:1::/64"), wished) == scope


def test_networks_that_hold_no_pod_of_the_node_are_a_fault() -> None:
    with pytest.raises(BadPolicy, match=r"holds none of this node's own networks \(10.244.1.0/24\)"):
        scope_of(("10.244.1.0/24",), ("10.0.0.0/24",))


def test_a_daemon_set_for_an_unknown_node_is_wanted() -> None:
    assert wants({"metadata": {}, "spec": {"template": {"spec": {"nodeSelector": {"a": "b"}}}}}, None)
