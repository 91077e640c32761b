"""The stage of lab and demo: three pods, a node, and servers for web, mail and cloud metadata, with a journal of what reached them.

pod cart   (shop)  10.244.1.10 ──┐        ┌── web     192.0.2.10       HTTP 80, HTTPS 443
pod trial  (shop)  10.244.1.11 ──┤  node  ├── canary  192.0.2.11       HTTP 80, HTTPS 443
pod free   (tools) 10.244.1.12 ──┘        ├── mail    192.0.2.12       SMTP 25
                                          └── meta    169.254.169.254  HTTP 80
IPv6: fd00:244:1::10 and on             IPv6: 2001:db8::10 and on
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from pellucid_policy.objects import Objects

from .servers import Journal, RecordingServer, Talk, speak_http, speak_https, speak_smtp
from .topology import POD_CIDRS, Pod, Server, Topology

POLICY = Path(__file__).parent / "policy"
"""The folder of manifests that belongs to this stage; examples/demo in the repository."""

PODS: dict[str, tuple[str, ...]] = {
    "cart": ("10.244.1.10", "fd00:244:1::10"),
    "trial": ("10.244.1.11", "fd00:244:1::11"),
    "free": ("10.244.1.12", "fd00:244:1::12"),
}
METADATA = "169.254.169.254"
MAX_NAME, MAX_PODS = 11, 200
_TAKEN = ("node", "web", "canary", "mail", "meta")
_WEB: Mapping[int, Talk] = {80: speak_http, 443: speak_https}


def pods_for(objects: Objects, count: int) -> dict[str, tuple[str, ...]]:
    """Names and addresses of the pods that objects describe, as far as they lie in POD_CIDRS, filled up to count by others.

    A pod keeps its name where a namespace can bear it (1-11 characters, not taken), else it is called pod-N."""
    networks = [ipaddress.ip_network(cidr) for cidr in POD_CIDRS]
    found: dict[str, tuple[str, ...]] = {}
    for pod in objects.pods:
        addresses = pod.addresses()
        if addresses and all(any(ipaddress.ip_address(each) in network for network in networks) for each in addresses):
            name = pod.metadata.name
            free = len(name) <= MAX_NAME and name not in {*found, *_TAKEN}
            found[name if free else f"pod-{len(found)}"] = addresses
    taken = {address for addresses in found.values() for address in addresses}
    for number in range(10, 10 + MAX_PODS):
        addresses = (f"10.244.1.{number}", f"fd00:244:1::{number}")
        if len(found) >= count:
            break
        if taken.isdisjoint(addresses):
            found[f"pod-{len(found)}"] = addresses
    return found


class Scene:
    """A context manager: inside it the stage stands and the servers answer; afterwards nothing of it is left.

    pods: name (1-11 characters) and addresses. Needs the rights that sandbox.enter() gives.
    """

    def __init__(self, pods: Mapping[str, Sequence[str]] = PODS) -> None:
        self.topology = Topology()
        self.journal = Journal()
        self.scope = POD_CIDRS
        self._wanted = pods
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.topology)
            for name, addresses in self._wanted.items():
                self.topology.add_pod(name, *addresses)
            for name, ports in (("web", _WEB), ("canary", _WEB), ("mail", {25: speak_smtp})):
                server = self.topology.add_server(name)
                stack.enter_context(RecordingServer(server, ports, self.journal))
            metadata = self.topology.add_server("meta", METADATA)
            stack.enter_context(RecordingServer(metadata, {80: speak_http}, self.journal))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def pod(self, name: str) -> Pod:
        """The pod called name."""
        return self.topology.pods[name]

    def server(self, name: str) -> Server:
        """The server called name."""
        return self.topology.servers[name]
