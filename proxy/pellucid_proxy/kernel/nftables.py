"""What nftables hold, asked by netlink: the generation of all tables, and the names in one of them, however many rules it has."""

from __future__ import annotations

import errno
import socket
import struct

from . import netlink
from .restoration import Inventory

SUBSYSTEM = 10 << 8  # linux/netfilter/nfnetlink.h
NEW_GENERATION, GET_GENERATION = SUBSYSTEM | 15, SUBSYSTEM | 16  # linux/netfilter/nf_tables.h
_GET_CHAIN, _GET_SET, _GET_OBJECT, _GET_FLOWTABLE = (SUBSYSTEM | kind for kind in (4, 10, 19, 23))
INET = 1  # NFPROTO_INET
GENERAL = struct.Struct("=BB2x")  # struct nfgenmsg: family, version; the resource id is for batches
TABLE = 1  # the attribute with the table's name, the same number for every kind of thing
_CHAIN_NAME, _SET_NAME, _SET_FLAGS, _OBJECT_NAME, _OBJECT_TYPE = 3, 2, 3, 2, 3
_ANONYMOUS, _MAP = 0x1, 0x8
_COUNTER = 1
_GENERATION_ID = 1


def generation() -> int:
    """The number of the last change of any table in this network namespace. Raises OSError."""
    with netlink.opened(netlink.NETLINK_NETFILTER) as asking:
        request = netlink.message(GET_GENERATION, netlink.REQUEST, GENERAL.pack(socket.AF_UNSPEC, 0))
        asking.send(request)
        for answer in netlink.messages(asking.recv(4096)):
            if answer.kind == NEW_GENERATION:
                return generation_of(answer.body)
    raise OSError(errno.EPROTO, "the kernel does not say nftables' generation")


def generation_of(body: memoryview) -> int:
    """The number that a message of NEW_GENERATION holds."""
    for kind, value in netlink.attributes(body[GENERAL.size :]):
        if kind == _GENERATION_ID:
            return int.from_bytes(value, "big")
    return 0


def inventory(table: str) -> Inventory:
    """What the table of family inet holds now; nothing where there is no such table. Raises OSError."""
    chains: set[str] = set()
    sets: set[str] = set()
    maps: set[str] = set()
    counters: set[str] = set()
    with netlink.opened(netlink.NETLINK_NETFILTER) as asking:
        for own in _dump(asking, _GET_CHAIN, table):
            chains.add(netlink.text(own[_CHAIN_NAME]))
        for own in _dump(asking, _GET_SET, table):
            flags = int.from_bytes(own.get(_SET_FLAGS, memoryview(b"")), "big")
            if not flags & _ANONYMOUS:
                (maps if flags & _MAP else sets).add(netlink.text(own[_SET_NAME]))
        others = False
        for own in _dump(asking, _GET_OBJECT, table):
            if int.from_bytes(own[_OBJECT_TYPE], "big") == _COUNTER:
                counters.add(netlink.text(own[_OBJECT_NAME]))
            else:
                others = True
        others = others or bool(_dump(asking, _GET_FLOWTABLE, table))
    return Inventory(frozenset(chains), frozenset(sets), frozenset(maps), frozenset(counters), others)


def _dump(asking: socket.socket, kind: int, table: str) -> list[dict[int, memoryview]]:
    """The attributes of everything of that kind in table."""
    body = GENERAL.pack(INET, 0) + netlink.attribute(TABLE, table.encode() + b"\0")
    try:
        found = [
            dict(netlink.attributes(answer.body[GENERAL.size :]))
            for answer in netlink.asked(asking, netlink.message(kind, netlink.REQUEST | netlink.DUMP, body))
        ]
    except OSError as err:
        if err.errno in (errno.ENOENT, errno.EOPNOTSUPP):
            return []
        raise
    return [own for own in found if TABLE in own and netlink.text(own[TABLE]) == table]
