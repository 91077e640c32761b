"""Connections as connection tracking knows them: listed and marked by netlink (linux/netfilter/nfnetlink_conntrack.h)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from . import netlink

_NEW, _GET = 1 << 8 | 0, 1 << 8 | 1  # NFNL_SUBSYS_CTNETLINK
_GENERAL = struct.Struct("=BBH")
_ORIGINAL, _MARK, _COUNTERS, _ZONE, _TIMESTAMP, _MARK_MASK = 1, 8, 9, 18, 20, 21
_ADDRESSES, _PROTOCOL = 1, 2
_SOURCES, _TARGETS = (1, 3), (2, 4)
_NUMBER, _SOURCE_PORT, _TARGET_PORT = 1, 2, 3
_SYSCTLS = "/proc/sys/net/netfilter"
COUNTING = ("nf_conntrack_acct", "nf_conntrack_timestamp")
"""Sysctls under which the kernel counts the packets of connections and notes when they began."""


class Connection(NamedTuple):
    """As its first packet was: source and target packed, port the target's, ports 0 where the protocol has
    none. packets: of its source, 0 where nobody
    counts. began_ns: since the epoch, 0 where nobody notes it. identity: what names it to the kernel."""

    source: bytes
    target: bytes
    protocol: int
    source_port: int
    port: int
    mark: int
    packets: int
    began_ns: int
    family: int
    identity: bytes


def connections(since_ns: int) -> Iterator[Connection]:
    """Those of this network namespace that began at since_ns or later, as far as the kernel noted it. Raises OSError."""
    with netlink.opened(netlink.NETLINK_NETFILTER, buffer=1 << 20) as asking:
        request = netlink.message(_GET, netlink.REQUEST | netlink.DUMP, _GENERAL.pack(0, 0, 0))
        for answer in netlink.asked(asking, request):
            found = dict(netlink.attributes(answer.body[_GENERAL.size :]))
            stamp = found.get(_TIMESTAMP)
            if stamp is None or int.from_bytes(stamp[4:12], "big") < since_ns or _ORIGINAL not in found:
                continue
            yield _connection(answer.body[0], found)


def _connection(family: int, found: dict[int, memoryview]) -> Connection:
    original = dict(netlink.attributes(found[_ORIGINAL]))
    addresses = dict(netlink.attributes(original[_ADDRESSES]))
    protocol = dict(netlink.attributes(original[_PROTOCOL]))
    counters = dict(netlink.attributes(found[_COUNTERS])) if _COUNTERS in found else {}
    identity = netlink.nested(_ORIGINAL, bytes(found[_ORIGINAL]))
    if _ZONE in found:
        identity += netlink.attribute(_ZONE, bytes(found[_ZONE]))
    return Connection(
        source=bytes(next(addresses[kind] for kind in _SOURCES if kind in addresses)),
        target=bytes(next(addresses[kind] for kind in _TARGETS if kind in addresses)),
        protocol=protocol[_NUMBER][0],
        source_port=int.from_bytes(protocol.get(_SOURCE_PORT, b""), "big"),
        port=int.from_bytes(protocol.get(_TARGET_PORT, b""), "big"),
        mark=int.from_bytes(found.get(_MARK, b""), "big"),
        packets=int.from_bytes(counters.get(1, b""), "big"),
        began_ns=int.from_bytes(found[_TIMESTAMP][4:12], "big"),
        family=family,
        identity=identity,
    )


def mark(connection: Connection, value: int, mask: int) -> None:
    """The bits of mask in the connection's mark are value. Raises OSError, ENOENT where it has ended."""
    body = _GENERAL.pack(connection.family, 0, 0) + connection.identity
    body += netlink.attribute(_MARK, value.to_bytes(4, "big")) + netlink.attribute(_MARK_MASK, mask.to_bytes(4, "big"))
    with netlink.opened(netlink.NETLINK_NETFILTER) as asking:
        for _ in netlink.asked(asking, netlink.message(_NEW, netlink.REQUEST | netlink.ACK, body)):
            pass


def counted() -> dict[str, str]:
    """The values of COUNTING now, where the kernel has them."""
    found = {}
    for name in COUNTING:
        try:
            found[name] = Path(_SYSCTLS, name).read_text().strip()
        except OSError:
            continue
    return found


def count(values: dict[str, str]) -> None:
    """Those of COUNTING that are named have these values. Raises OSError."""
    for name, value in values.items():
        if name in COUNTING:
            Path(_SYSCTLS, name).write_text(value)
