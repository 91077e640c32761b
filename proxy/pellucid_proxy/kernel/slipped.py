"""What got past the rules while somebody had changed them: found in connection tracking, counted, and ended where it must not live on."""

from __future__ import annotations

import socket
import struct
from collections.abc import Collection, Sequence
from typing import NamedTuple

from . import netlink
from .conntrack import Connection, connections, mark
from .judgement import closed, in_scope, lets_pass
from .state import KernelState

_SOCK_DIAG, _BY_FAMILY = 4, 20
_QUERY = struct.Struct("=BBBBI48s")  # struct inet_diag_req_v2
_ID = slice(4, 40)  # of struct inet_diag_msg: ports and addresses
_ALL_STATES = 0xFFF


class Slipped(NamedTuple):
    """packets: that pods sent. ended, left: connections that were made to end, and others."""

    packets: int = 0
    ended: int = 0
    left: int = 0


def settle(state: KernelState, since_ns: int, own: Collection[bytes]) -> Slipped:
    """What began at since_ns or later, and which state would have taken or refused, is counted; of closed pods it does not live on.

    own: the node's addresses, packed. A connection is ended by its mark, by which the rules reset both sides at their next packet. To
    make the kernel forget it would not do: if the server spoke first, it would be taken for one that the server opened.
    Raises OSError.
    """
    marks = state.settings.marks
    found = [
        each
        for each in connections(since_ns)
        if each.mark & marks.mask not in (marks.egress, marks.ended)
        and in_scope(state, each.source)
        and not lets_pass(state, each.source, each.target, each.protocol, each.port, local=each.target in own)
    ]
    slipped = without_own(found)
    to_end = [each for each in slipped if each.protocol == socket.IPPROTO_TCP and closed(state, each.source)]
    mark(to_end, marks.ended, marks.mask)
    packets = sum(max(1, each.packets) for each in slipped)
    return Slipped(packets, len(to_end), len(slipped) - len(to_end))


def without_own(found: Sequence[Connection]) -> list[Connection]:
    """found without those of the proxy's sockets: dialled while nothing marked them. Raises OSError."""
    dialled = _sockets() if found else frozenset()
    return [each for each in found if _identity(each) not in dialled]


def _identity(connection: Connection) -> bytes:
    ports = struct.pack("!HH", connection.source_port, connection.port)
    return ports + connection.source.ljust(16, b"\0") + connection.target.ljust(16, b"\0")


def _sockets() -> frozenset[bytes]:
    """Ports and addresses of this namespace's TCP sockets, as in struct inet_diag_sockid."""
    found = set()
    with netlink.opened(_SOCK_DIAG) as asking:
        for family in (socket.AF_INET, socket.AF_INET6):
            query = _QUERY.pack(family, socket.IPPROTO_TCP, 0, 0, _ALL_STATES, bytes(48))
            request = netlink.message(_BY_FAMILY, netlink.REQUEST | netlink.DUMP, query)
            found |= {bytes(answer.body[_ID]) for answer in netlink.asked(asking, request)}
    return frozenset(found)
