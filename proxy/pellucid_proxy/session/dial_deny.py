"""Targets that are never dialled on a pod's behalf, whatever a policy says.

What is safe from a pod may not be safe from the node: loopback and the node's own services trust who reaches them, and the cloud's
metadata service would answer for the node. Called for every connection: ordinary addresses leave after two comparisons.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

Networks = tuple[tuple[int, int, int], ...]
"""(bytes in an address, bits after the prefix, prefix) of each CIDR; made by networks()."""

_METADATA = frozenset(
    ipaddress.ip_address(text).packed
    for text in (
        "169.254.169.254",  # AWS, Azure, Google, OpenStack and most others
        "169.254.170.2",  # AWS ECS task credentials
        "169.254.170.23",  # AWS EKS pod identity
        "168.63.129.16",  # Azure's wire server
        "100.100.100.200",  # Alibaba
        "192.0.0.192",  # Oracle
        "fd00:ec2::254",  # AWS
        "fd00:ec2::23",  # AWS EKS pod identity
        "fd20:ce::254",  # Google
    )
)
_SUSPECT_IPV4 = frozenset({0, 100, 127, 168, 169, 192, *range(224, 240), 255})  # first bytes of what may be denied
_SUSPECT_IPV6 = frozenset({0x00, 0x20, 0xFD, 0xFE, 0xFF})
_BROADCAST = b"\xff\xff\xff\xff"
_NAT64 = (bytes.fromhex("0064ff9b") + bytes(8), bytes.fromhex("0064ff9b0001"))  # RFC 6052 §2.1, RFC 8215
_SIX_TO_FOUR = b"\x20\x02"  # RFC 3056 §2
_MAPPED = bytes(10) + b"\xff\xff"  # RFC 4291 §2.5.5.2


def networks(cidrs: Iterable[str]) -> Networks:
    """cidrs, ready for denied(). Raises ValueError."""
    made = []
    for cidr in cidrs:
        network = ipaddress.ip_network(cidr)
        size = network.max_prefixlen // 8
        after = network.max_prefixlen - network.prefixlen
        made.append((size, after, int(network.network_address) >> after))
    return tuple(made)


def denied(address: bytes, *, node_source: bool, node_addresses: frozenset[bytes], allow: Networks = ()) -> bool:
    """Whether address (packed, 4 or 16 bytes) must not be dialled.

    node_source: the connection would bear the node's own address. node_addresses: packed, of every interface of the node.
    allow: networks that the installation takes off this list, the node's addresses included; the address counts as it is written,
    not one embedded in it.
    """
    suspect = _SUSPECT_IPV4 if len(address) == 4 else _SUSPECT_IPV6
    if address[0] not in suspect and address not in node_addresses:
        return False
    return _listed(address, node_source, node_addresses) and not _within(address, allow)


def _listed(address: bytes, node_source: bool, node_addresses: frozenset[bytes]) -> bool:
    if address in node_addresses:
        return True
    if address in _METADATA:
        return node_source
    if len(address) == 4:
        return (
            address[0] in (0, 127)  # this host (RFC 1122 §3.2.1.3), loopback
            or 224 <= address[0] < 240  # multicast
            or address[:2] == b"\xa9\xfe"  # link-local
            or address == _BROADCAST
        )
    if address[0] == 0xFF or (address[0] == 0xFE and address[1] & 0xC0 == 0x80):  # multicast, link-local fe80::/10
        return True
    if address.startswith(_MAPPED):
        return True  # would leave as IPv4, past every rule about IPv4
    embedded = _embedded(address)
    return embedded is not None and _listed(embedded, node_source, node_addresses)


def _embedded(address: bytes) -> bytes | None:
    """The IPv4 address that a translator or a tunnel would make of an IPv6 one."""
    if address.startswith(_NAT64) or address.startswith(bytes(12)):  # the latter: IPv4-compatible, and so :: and ::1
        return address[12:]
    if address.startswith(_SIX_TO_FOUR):
        return address[2:6]
    return None


def _within(address: bytes, allow: Networks) -> bool:
    number = int.from_bytes(address, "big")
    return any(len(address) == size and number >> after == prefix for size, after, prefix in allow)
