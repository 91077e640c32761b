"""Connections as connection tracking knows them: listed and marked by netlink (linux/netfilter/nfnetlink_conntrack.h)."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from . import netlink

_NEW, _GET = 1 << 8 | 0, 1 << 8 | 1  # NFNL_SUBSYS_CTNETLINK
_GENERAL = struct.Struct("=BBH")
_ORIGINAL, _PROTOINFO, _MARK, _COUNTERS, _ZONE, _TIMESTAMP, _MARK_MASK = 1, 4, 8, 9, 18, 20, 21
_TCP, _TCP_STATE = 1, 1
_OVER = (7, 8)  # TIME_WAIT, CLOSE (linux/netfilter/nf_conntrack_tcp.h)
_ADDRESSES, _PROTOCOL = 1, 2
_SOURCES, _TARGETS = (1, 3), (2, 4)
_NUMBER, _SOURCE_PORT, _TARGET_PORT = 1, 2, 3
_SYSCTLS = "/proc/sys/net/netfilter"
COUNTING = ("nf_conntrack_acct", "nf_conntrack_timestamp")
"""Sysctls under which the kernel counts the packets of connections and notes when they began."""


class Connection(NamedTuple):
    """As its first packet was: source and target packed, port the target's, ports 0 where the protocol has
    none. packets: of its source, 0 where nobody
    counts. began_ns: since the epoch, 0 where nobody notes it. identity: what names it to the kernel. over: a TCP connection that both
    sides have closed, or one has reset, as far as the kernel saw."""

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
    over: bool = False


def connections(
    since_ns: int, wanted: Callable[[bytes], bool] | None = None, *, unmarked: int = 0
) -> Iterator[Connection]:
    """Those of this network namespace that began at since_ns or later, as far as the kernel noted it; 0: all.

    wanted: whether those of a packed source address are asked for. unmarked: bits of which their marks have none. Raises OSError."""
    with netlink.opened(netlink.NETLINK_NETFILTER, buffer=1 << 20) as asking:
        body = _GENERAL.pack(0, 0, 0)
        if unmarked:
            body += netlink.attribute(_MARK, bytes(4)) + netlink.attribute(_MARK_MASK, unmarked.to_bytes(4, "big"))
        request = netlink.message(_GET, netlink.REQUEST | netlink.DUMP, body)
        for answer in netlink.asked(asking, request):
            found = dict(netlink.attributes(answer.body[_GENERAL.size :]))
            stamp = found.get(_TIMESTAMP)
            began_ns = 0 if stamp is None else int.from_bytes(stamp[4:12], "big")
            if began_ns < since_ns or _ORIGINAL not in found:
                continue
            if wanted is None or wanted(_source(found[_ORIGINAL])):
                yield _connection(answer.body[0], found, began_ns)


def _source(original: memoryview) -> bytes:
    """The source of an entry's first packet."""
    addresses = dict(netlink.attributes(dict(netlink.attributes(original))[_ADDRESSES]))
    return bytes(next(addresses[kind] for kind in _SOURCES if kind in addresses))


def _connection(family: int, found: dict[int, memoryview], began_ns: int) -> Connection:
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
        began_ns=began_ns,
        family=family,
        identity=identity,
        over=_PROTOINFO in found and _tcp_state(found[_PROTOINFO]) in _OVER,
    )


def _tcp_state(protoinfo: memoryview) -> int | None:
    of_tcp = dict(netlink.attributes(protoinfo)).get(_TCP)
    state = None if of_tcp is None else dict(netlink.attributes(of_tcp)).get(_TCP_STATE)
    return None if state is None else state[0]


def mark(found: Iterable[Connection], value: int, mask: int) -> None:
    """The bits of mask in the mark of each that has not ended by itself are value. Raises OSError."""
    marked = netlink.attribute(_MARK, value.to_bytes(4, "big")) + netlink.attribute(_MARK_MASK, mask.to_bytes(4, "big"))
    with netlink.opened(netlink.NETLINK_NETFILTER) as asking:
        for each in found:
            body = _GENERAL.pack(each.family, 0, 0) + each.identity + marked
            with contextlib.suppress(FileNotFoundError):
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
