"""Sockets in TIME_WAIT that bear others' addresses, and stand in the way of connections past the proxy.

The proxy's end of a connection between a pod and a server has their very addresses and ports. For a minute after its end, a new
connection with the same ports that is only to be forwarded is found to belong to that socket by the kernel's early demux
(net/ipv4/tcp_ipv4.c), and ip_forward() drops what belongs to a socket. While the proxy takes such connections, tproxy takes care of
it; when it stops taking them, these sockets have to go.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from collections.abc import Iterator

from ..settings import NodeSettings

_NETLINK_SOCK_DIAG, _BY_FAMILY, _DESTROY = 4, 20, 21  # linux/sock_diag.h
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST, _DUMP = 0x1, 0x300
_TIME_WAIT = 6
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_QUERY = struct.Struct("=BBBBI48s")  # struct inet_diag_req_v2: family, protocol, extensions, pad, states, id
_ID = slice(4, 52)  # of struct inet_diag_msg: ports, addresses, interface, cookie
_BATCH = 256  # messages of one send
_BUFFER = 1 << 17
_TIMEOUT_S = 5.0


def forget(settings: NodeSettings, own: frozenset[bytes]) -> int:
    """No socket in TIME_WAIT that bears an address other than own (packed) with an end in scope is left; returns how many there were.

    Where the kernel cannot (no CONFIG_INET_DIAG_DESTROY, before 5.19) they stay for their minute. Raises OSError.
    """
    scope = [ipaddress.ip_network(cidr) for cidr in settings.scope]
    count = 0
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(_TIMEOUT_S)
        for family in (socket.AF_INET, socket.AF_INET6) if settings.ipv6 else (socket.AF_INET,):
            size = 4 if family == socket.AF_INET else 16
            version = 4 if size == 4 else 6
            networks = [(int(n.netmask), int(n.network_address)) for n in scope if n.version == version]
            foreign = []
            for identity in _time_wait(netlink, family):
                source, target = identity[4 : 4 + size], identity[20 : 20 + size]
                if source not in own and (_within(source, networks) or _within(target, networks)):
                    foreign.append(_message(_DESTROY, _REQUEST, family, identity))
            for start in range(0, len(foreign), _BATCH):
                netlink.send(b"".join(foreign[start : start + _BATCH]))
            count += len(foreign)
    return count


def _within(address: bytes, networks: list[tuple[int, int]]) -> bool:
    number = int.from_bytes(address, "big")
    return any(number & mask == network for mask, network in networks)


def _time_wait(netlink: socket.socket, family: int) -> Iterator[bytes]:
    """struct inet_diag_sockid of every TCP socket in TIME_WAIT."""
    netlink.send(_message(_BY_FAMILY, _REQUEST | _DUMP, family, bytes(48)))
    while True:
        data = netlink.recv(_BUFFER)
        while data:
            length, kind, *_ = _HEADER.unpack_from(data)
            body, data = data[_HEADER.size : length], data[(length + 3) & ~3 :]
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                (code,) = struct.unpack_from("=i", body)
                raise OSError(-code, errno.errorcode.get(-code, "unknown error"))
            yield body[_ID]


def _message(kind: int, flags: int, family: int, identity: bytes) -> bytes:
    query = _QUERY.pack(family, socket.IPPROTO_TCP, 0, 0, 1 << _TIME_WAIT, identity)
    return _HEADER.pack(_HEADER.size + len(query), kind, flags, 0, 0) + query
