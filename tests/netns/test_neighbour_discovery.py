"""Neighbour discovery of pods that may reach nothing: it works on the link, and goes no further."""

from __future__ import annotations

import ipaddress
import socket
import struct

import pytest

from pellucid_cli.lab.topology import Namespace
from pellucid_policy.plan import KernelGroup

from .peers import PATIENCE_S, readable
from .world import BLOCK_REST, World

SOLICITATION, ADVERTISEMENT = 135, 136
NOTHING = KernelGroup(leading=(BLOCK_REST,), nameless=(BLOCK_REST,), closed=True, reject_quic=False)


def solicited(host: Namespace, address: str, timeout_s: float = PATIENCE_S) -> bool:
    """Whether address answers when host asks it itself, by unicast, for its link-layer address. RFC 4861 §7.3.3."""
    with host.open_socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as opened:
        opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 255)
        target = ipaddress.ip_address(address).packed
        for known in (False, True):  # for the first one the kernel asks by multicast, and is answered as well
            while known and readable(opened, 0.05):
                opened.recv(1500)
            opened.sendto(struct.pack("!BBHI", SOLICITATION, 0, 0, 0) + target, (address, 0))
            if not _advertised(opened, address, target, timeout_s):
                return False
    return True


def _advertised(opened: socket.socket, address: str, target: bytes, timeout_s: float) -> bool:
    while readable(opened, timeout_s):
        said, peer = opened.recvfrom(1500)
        if said[0] == ADVERTISEMENT and peer[0] == address and said[8:24] == target:
            return True
    return False


@pytest.mark.parametrize("asks", ["0", "1"])
def test_pods_on_a_bridge_find_each_other_and_the_node_whether_the_bridge_asks_us_or_not(asks: str) -> None:
    with World(bridge=True) as world:
        world.node.set_sysctls({"net.bridge.bridge-nf-call-ip6tables": asks})
        world.group(NOTHING)
        assert solicited(world.a, world.b.ipv6)
        assert solicited(world.a, "fd00:244:1::1")


def test_a_pod_behind_a_veth_pair_finds_the_node_and_no_server(world: World) -> None:
    world.group(NOTHING)
    arrived = world.tap("web", "icmpv6 type nd-neighbor-solicit ip6 saddr fd00:244:1::/64")
    assert solicited(world.a, "fd00:244:1::1")
    assert not solicited(world.a, world.web.ipv6, timeout_s=0.2)
    assert arrived() == 0
