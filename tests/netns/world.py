"""The network that most tests use: pods a and b, a node with services and a masquerading CNI, the servers web and mail."""

from __future__ import annotations

import ipaddress
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import msgspec

from pellucid_cli.lab.topology import POD_CIDRS, Topology
from pellucid_policy.plan import AddressRule, KernelGroup, PortRange
from pellucid_policy.verdict import Response, RuleKey
from pellucid_proxy.kernel import routing
from pellucid_proxy.kernel.apply import Kernel
from pellucid_proxy.kernel.state import KernelState
from pellucid_proxy.settings import NodeSettings

from .peers import PATIENCE_S, Peer, StandIn

PORT = 8080
SETTINGS = NodeSettings(scope=POD_CIDRS)
SERVICES = {  # service address → (backend address, port), as kube-proxy would have it
    "10.96.0.10": ("192.0.2.10", PORT), "fd00:96::10": ("2001:db8::10", PORT),  # web
    "10.96.0.11": ("10.244.1.10", PORT), "fd00:96::11": ("fd00:244:1::10", PORT),  # pod a
    "10.96.0.12": ("192.0.2.1", PORT), "fd00:96::12": ("2001:db8::1", PORT),  # the node itself, as the API server often is
    "10.96.0.13": ("10.244.1.11", PORT), "fd00:96::13": ("fd00:244:1::11", PORT),  # pod b
}  # fmt: skip
SERVICE_PORT = 80


def packed(*addresses: str) -> list[bytes]:
    return [ipaddress.ip_address(address).packed for address in addresses]


def rule(
    name: str | None,
    *networks: str,
    ports: tuple[PortRange, ...] | None = None,
    allow: bool = False,
    response: Response = Response.RESET,
) -> AddressRule:
    """A rule of the policy test/p for networks (none: any); without a name, the default action."""
    key = RuleKey("TransparentPolicy", "test", "p", name) if name else None
    return AddressRule(key, "RuleMatched" if name else "DefaultAction", networks or None, ports, allow, response)


ALLOW_REST = rule(None, allow=True)
BLOCK_REST = rule(None)
OPEN = KernelGroup(leading=(), nameless=(ALLOW_REST,), closed=False, reject_quic=False)
CLOSED = msgspec.structs.replace(OPEN, closed=True)


class World:
    """A topology with the product's rules loaded (group OPEN for pod a, pod b direct), peers on every host, and no proxy yet."""

    def __init__(self, *, bridge: bool = False) -> None:
        with ExitStack() as self._stack:
            self._build(bridge)
            self._stack = self._stack.pop_all()

    def _build(self, bridge: bool) -> None:
        self.topology = self._stack.enter_context(Topology(bridge=bridge))
        self.node = self.topology.node
        self.a, self.b = self.topology.add_pod("a"), self.topology.add_pod("b")
        self.web, self.mail = self.topology.add_server("web"), self.topology.add_server("mail")
        self.peers = {
            n.name: self._stack.enter_context(Peer(n, PORT)) for n in (self.node, self.a, self.b, self.web, self.mail)
        }
        self.node.nft(_CLUSTER)
        self.kernel = Kernel(SETTINGS)
        self.state = KernelState(
            SETTINGS,
            (OPEN,),
            dict.fromkeys(packed(*self.a.addresses), 0),
            frozenset(packed(*self.b.addresses)),
            strangers=None,
        )
        self.node.call(routing.install, SETTINGS)
        self.apply(self.state)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def apply(self, state: KernelState) -> None:
        self.state = state
        self.node.call(self.kernel.apply, state)

    def group(self, group: KernelGroup) -> None:
        """Pod a is under group."""
        self.apply(KernelState(SETTINGS, (group,), self.state.members, self.state.direct, strangers=None))

    def stand_in(self, *, source: str = "Pod", dial: bool = True) -> StandIn:
        """A proxy; it ends with the world, or by close()."""
        return self._stack.enter_context(StandIn(self.node, SETTINGS, source=source, dial=dial))

    def event(self, name: str) -> int:
        """Packets of one of ruleset.EVENTS."""
        return self.node.call(self.kernel.events)[name][0]

    def count(self, name: str | None, group: int = 0) -> int:
        """Packets that rule (or the default action) decided."""
        counted = self.node.call(self.kernel.counters)
        return sum(
            c[0] for key, c in counted.items() if key.group == group and (key.rule.rule if key.rule else None) == name
        )

    def tap(self, server: str, match: str = "") -> Callable[[], int]:
        """A reader of how many packets from pods' or the node's addresses that match reached server: the proxy has no word in it."""
        host = self.topology.servers[server] if server in self.topology.servers else self.topology.pods[server]
        name = f"tap{time.monotonic_ns()}"
        host.nft(
            f"table inet {name} {{ counter c {{ }}; chain in {{ type filter hook prerouting priority raw; policy accept; "
            f"{match} counter name c; }}; }}"
        )

        def read() -> int:
            said = json.loads(host.run(["nft", "-j", "list", "counters", "table", "inet", name]).stdout)
            return next(entry["counter"]["packets"] for entry in said["nftables"] if "counter" in entry)

        return read


def in_a_user_namespace() -> bool:
    """Whether this process is root only in a namespace that an ordinary user made."""
    with open("/proc/self/uid_map") as maps:
        return maps.read().split()[2] == "1"  # one user is mapped, not all of them


def eventually(holds: Callable[[], bool], timeout_s: float = PATIENCE_S) -> bool:
    """Whether holds becomes true within timeout_s; asked again and again."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)  # between two looks, not in place of one
    return True


def _map(version: int) -> str:
    return ", ".join(
        f"{service} : {backend} . {port}"
        for service, (backend, port) in SERVICES.items()
        if (":" in service) == (version == 6)
    )


_CLUSTER = f"""
table inet cluster {{
  chain services {{ type nat hook prerouting priority dstnat; policy accept; goto backends; }}
  chain services_of_the_node {{ type nat hook output priority -100; policy accept; goto backends; }}
  chain backends {{
    tcp dport {SERVICE_PORT} dnat ip addr . port to ip daddr map {{ {_map(4)} }}
    tcp dport {SERVICE_PORT} dnat ip6 addr . port to ip6 daddr map {{ {_map(6)} }}
  }}
  chain cni {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {POD_CIDRS[0]} ip daddr != {POD_CIDRS[0]} masquerade
    ip6 saddr {POD_CIDRS[1]} ip6 daddr != {POD_CIDRS[1]} masquerade
  }}
}}
"""
