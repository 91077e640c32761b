"""The cluster's API server as where a node's policy comes from: the operator's snapshot, and the node's own pods."""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import UNSET
from msgspec.structs import replace

from pellucid_policy.features import ONE_NODE
from pellucid_policy.installation import SnapshotIndex, SnapshotSpec
from pellucid_policy.meta import API_VERSION, Pod, PodAddress, PodStatus
from pellucid_policy.objects import Objects
from pellucid_policy.snapshot import INDEX_NAME, Unusable, objects_of

from ..kube.access import Access, ApiError
from ..kube.client import NOT_FOUND, Client
from ..kube.reflector import Reflector
from .node_object import NodeObject, Owner
from .policy import BadPolicy, Fresh, accept_objects
from .report import Report

SNAPSHOTS = f"/apis/{API_VERSION}/transparentsnapshots"
PODS = "/api/v1/pods"
SETTLE_S = 0.02  # no event for so long: what belongs together is there
MAX_SETTLE_S = 0.5
COMPLETE_S = 5.0  # for the pieces of an index to come; then it is told that they are missing
STAYS_S = 5.0  # for the API server to say whether the DaemonSet is still there


@dataclass(frozen=True, slots=True)
class OwnNode:
    """The Node object of this machine, as far as it matters."""

    uid: str
    pod_cidrs: tuple[str, ...]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class KeptPod:
    """pod: as policies see it. order: of two with one address the greater one has it; who is being deleted, or is older, has lost it."""

    pod: Pod
    order: tuple[bool, str]


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the API server had at one moment."""

    index: SnapshotIndex | None
    pieces: Mapping[str, str]
    pods: tuple[KeptPod, ...]
    broken: tuple[str, ...]  # why the index, or a piece that it names, is none


class ClusterSource:
    """source.Source. daemon_set: namespace and name of what this pod belongs to."""

    name = "cluster"
    comes_later = True

    def __init__(self, access: Access, node: str, daemon_set: tuple[str, str]) -> None:
        self._access = access
        self._node = node
        self._daemon_set = daemon_set
        self._client = Client(access)
        self._changed = asyncio.Event()
        self._own: OwnNode | None = None
        self._snapshots = Reflector(self._client, SNAPSHOTS, kept_snapshot, self._changed.set)
        self._pods = Reflector(
            self._client, PODS, kept_pod, self._changed.set, {"fieldSelector": f"spec.nodeName={node}"}
        )
        self._read: _Seen | None = None  # what read() reads: taken on the loop, for read() is called in a thread
        self._taken: tuple[str, Objects] | None = None  # the revision that read() gave last, and its objects
        self._problem = "the API server has not been asked yet"
        self._first = asyncio.Event()
        self._open = asyncio.Event()

    async def run(self) -> None:
        async with self._client, asyncio.TaskGroup() as tasks:
            self._open.set()
            tasks.create_task(self._snapshots.run(), name="watch snapshots")
            tasks.create_task(self._pods.run(), name="watch pods")
            tasks.create_task(self._know_node(), name="know the node")

    async def _know_node(self) -> None:
        while True:
            try:
                self._own = own_node(await self._client.get(f"/api/v1/nodes/{self._node}"))
                self._changed.set()
                if self._own.pod_cidrs:
                    return
                self._problem = (
                    f"Node {self._node} has no spec.podCIDRs (yet): which addresses are its pods is not known"
                )
            except ApiError as err:
                self._problem = str(err)
            await asyncio.sleep(1.0)

    async def first(self, patience_s: float) -> None:
        try:
            async with asyncio.timeout(patience_s):
                while not self._complete(self._look()):
                    await self._changed.wait()
                    self._changed.clear()
        except TimeoutError:
            raise BadPolicy([self._why()]) from None
        self._read = self._look()

    async def changed(self, patience_s: float | None) -> float:
        try:
            async with asyncio.timeout(patience_s):
                await self._changed.wait()
        except TimeoutError:
            pass
        noticed = time.time()
        await self._settled()
        self._read = self._look()
        return noticed

    async def _settled(self) -> None:
        began = time.monotonic()
        while True:
            self._changed.clear()
            spent = time.monotonic() - began
            if spent > (MAX_SETTLE_S if self._complete(self._look()) else COMPLETE_S):
                return
            try:
                async with asyncio.timeout(SETTLE_S):
                    await self._changed.wait()
            except TimeoutError:
                if self._complete(self._look()):
                    return

    def _look(self) -> _Seen:
        snapshots, pods = self._snapshots.objects, self._pods.objects
        found = snapshots.get(("", INDEX_NAME))
        index = found.index if isinstance(found, SnapshotSpec) and found.index is not UNSET else None
        named = {INDEX_NAME, *(() if index is None else index.pieces)}
        return _Seen(
            index,
            {
                name: each.piece.data
                for (_, name), each in snapshots.items()
                if isinstance(each, SnapshotSpec) and each.piece is not UNSET
            },
            tuple(pods[key] for key in sorted(pods)),
            tuple(each for (_, name), each in snapshots.items() if name in named and isinstance(each, str)),
        )

    def _complete(self, seen: _Seen) -> bool:
        """Whether there is something to read, if only to be refused."""
        synced = self._snapshots.synced.is_set() and self._pods.synced.is_set()
        known = self._own is not None and bool(self._own.pod_cidrs)
        whole = seen.index is not None and set(seen.index.pieces) <= seen.pieces.keys()
        return synced and known and (whole or bool(seen.broken))

    def _why(self) -> str:
        """Why there is nothing to read."""
        for each in (self._snapshots, self._pods):
            if each.problem:
                return each.problem
        if self._own is None or not self._own.pod_cidrs:
            return self._problem
        if not (self._snapshots.synced.is_set() and self._pods.synced.is_set()):
            return "the API server has not answered yet"
        return f"there is no TransparentSnapshot {INDEX_NAME} with all its pieces; is the operator running?"

    def read(self) -> Fresh:
        """The policies that are offered, or, where they cannot be taken, the last ones that could; with the pods of now either way: a pod
        that comes while a snapshot is refused is decided by its own policy, not by that of whoever had its address."""
        seen, own = self._read, self._own
        if seen is None or own is None:
            raise BadPolicy([self._why()])
        problems: tuple[str, ...] = ()
        try:
            revision, objects = self._policies(seen)
        except BadPolicy as bad:
            if self._taken is None:
                raise
            problems = tuple(bad.problems)
            revision, objects = self._taken
        objects = dataclasses.replace(objects, pods=pods_of(seen.pods))
        accepted = accept_objects(objects, revision)
        scope = scope_of(own.pod_cidrs, accepted.wishes.scope)
        self._taken = revision, objects
        return replace(accepted, wishes=replace(accepted.wishes, scope=scope), problems=problems)

    def _policies(self, seen: _Seen) -> tuple[str, Objects]:
        """The revision that is offered, and its objects. Raises BadPolicy."""
        if seen.broken:
            raise BadPolicy(list(seen.broken))
        index = seen.index
        if index is None:
            raise BadPolicy([self._why()])
        if self._taken is not None and self._taken[0] == index.revision:
            return self._taken  # pods come and go more often than policies
        try:
            return index.revision, objects_of(index, seen.pieces, ONE_NODE)
        except Unusable as err:
            raise BadPolicy([f"snapshot {index.revision}: {each}" for each in err.problems]) from err

    @property
    def offered(self) -> str:
        """The revision that the operator offers, "" if it is not known."""
        index = self._look().index
        return "" if index is None else index.revision

    async def stays(self) -> bool:
        """The rules stay while there is a DaemonSet that wants a pod on this node, or where nobody can say that there is none."""
        namespace, name = self._daemon_set
        try:
            async with asyncio.timeout(STAYS_S), Client(self._access) as client:  # run() is over by now
                found = await client.get(f"/apis/apps/v1/namespaces/{namespace}/daemonsets/{name}")
                own = await self._node_now(client)
        except ApiError as err:
            return err.status != NOT_FOUND
        except TimeoutError:
            return True
        return wants(found, own)

    async def _node_now(self, client: Client) -> OwnNode | None:
        """With the labels of this moment: a label taken away may be why this run is to end. None: there is no such Node any more."""
        try:
            return own_node(await client.get(f"/api/v1/nodes/{self._node}"))
        except ApiError as err:
            if err.status == NOT_FOUND:
                return None
            raise

    async def tell(self, report: Report) -> None:
        await self._open.wait()
        while self._own is None:
            await self._changed.wait()
            await asyncio.sleep(SETTLE_S)
        owner = Owner("v1", "Node", self._node, self._own.uid)
        await NodeObject(self._client, self._node, owner, report, lambda: self.offered).run()

    async def left(self) -> None:
        try:
            async with asyncio.timeout(STAYS_S), Client(self._access) as client:
                await client.delete(f"/apis/{API_VERSION}/transparentnodes/{self._node}")
        except (ApiError, TimeoutError):
            pass  # it goes with its Node at the latest


def kept_snapshot(value: Mapping[str, Any]) -> SnapshotSpec | str:
    """The spec of a TransparentSnapshot, or why it is none that this version knows."""
    try:
        return msgspec.convert(value.get("spec"), SnapshotSpec)
    except msgspec.ValidationError as err:
        return f"TransparentSnapshot {value['metadata']['name']}: {err}; bring the node to the operator's version"


def kept_pod(value: Mapping[str, Any]) -> KeptPod:
    """A pod of the API as policies see it."""
    meta = value["metadata"]
    return KeptPod(
        msgspec.convert(value, Pod), ("deletionTimestamp" not in meta, str(meta.get("creationTimestamp", "")))
    )


def own_node(value: Mapping[str, Any]) -> OwnNode:
    """A Node of the API."""
    spec, meta = value.get("spec", {}), value["metadata"]
    cidrs = spec.get("podCIDRs") or ([spec["podCIDR"]] if spec.get("podCIDR") else [])
    return OwnNode(str(meta.get("uid", "")), tuple(cidrs), meta.get("labels") or {})


def pods_of(kept: Iterable[KeptPod]) -> tuple[Pod, ...]:
    """The pods of a node, each address at the pod that has it now."""
    taken: set[str] = set()
    found = []
    for each in sorted(kept, key=lambda each: each.order, reverse=True):
        pod = each.pod
        own = pod.addresses()
        free = tuple(address for address in own if address not in taken)
        taken.update(free)
        if free != own:
            addresses = tuple(PodAddress(ip=address) for address in free)
            status = PodStatus(pod_ips=addresses) if free else PodStatus(phase="Failed")
            pod = replace(pod, status=status)
        found.append(pod)
    return tuple(sorted(found, key=lambda pod: (pod.metadata.namespace, pod.metadata.name)))


def scope_of(own: Iterable[str], wished: Iterable[str] | None) -> tuple[str, ...]:
    """The node's own networks, as far as they are within those that TransparentProxy names: pods of other nodes are theirs to take.

    Raises BadPolicy where nothing is left."""
    networks = list(map(ipaddress.ip_network, own))
    limits = [ipaddress.ip_network(each) for each in wished or ()]
    found = [
        str(each)
        for each in networks
        if not limits or any(each.version == limit.version and each.subnet_of(limit) for limit in limits)  # type: ignore[arg-type]
    ]
    if not found:
        said = ", ".join(map(str, networks))
        raise BadPolicy(
            [
                f"TransparentProxy spec.podCIDRs: holds none of this node's own networks ({said}); leave it out, or add them"
            ]
        )
    return tuple(found)


def wants(daemon_set: Mapping[str, Any], own: OwnNode | None) -> bool:
    """Whether a DaemonSet will have a pod on a node again."""
    if "deletionTimestamp" in daemon_set["metadata"]:
        return False
    selector = daemon_set["spec"]["template"]["spec"].get("nodeSelector") or {}
    return own is None or all(own.labels.get(key) == value for key, value in selector.items())


def daemon_set_of(environment: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """Namespace and name, as the chart tells its pods."""
    return environment.get("POD_NAMESPACE", "pellucid-system"), environment.get("PELLUCID_DAEMONSET", "pellucid-node")
