"""Notices of the kernel about what others change among our rules: tables, ip rules, routes, lo and the node's addresses."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import sys
from collections.abc import Collection, Iterable
from enum import StrEnum
from typing import NamedTuple

from ..settings import NodeSettings
from . import netlink, nftables


class Cause(StrEnum):
    """What was changed, as rules_repairs counts it; of a transaction that changes several the one that stands here first."""

    TABLE = "table"
    CHAIN = "chain"
    SET = "set"
    RULE = "rule"
    ELEMENT = "element"
    COUNTER = "counter"
    OTHER = "other"  # what our table never holds: a flowtable, a quota
    IP_RULE = "ip_rule"
    ROUTE = "route"
    LINK = "link"  # lo, through which our route leads
    ADDRESS = "address"  # of the node: no rule of ours depends on it
    UNSEEN = "unseen"  # notices were lost, or what was to be there is not


class Drift(NamedTuple):
    """owner: who did it, as far as the kernel says: `nft, process 812`; "" where it does not."""

    cause: Cause
    owner: str = ""


_NFTABLES_GROUP = 7  # NFNLGRP_NFTABLES
_ROUTE_GROUPS = (
    1,
    5,
    9,
    7,
    11,
    8,
    19,
)  # RTNLGRP_: LINK, IPV4_IFADDR, IPV6_IFADDR, IPV4_ROUTE, IPV6_ROUTE, IPV4_RULE, IPV6_RULE
_BUFFER_BYTES = 16 << 20  # not memory in use, but how much may wait: a large rule set of ours comes at once
_READ = 1 << 16
_KINDS = {  # low byte of an nftables message: NEW and DEL of each
    0: Cause.TABLE, 2: Cause.TABLE, 3: Cause.CHAIN, 5: Cause.CHAIN, 6: Cause.RULE, 8: Cause.RULE, 9: Cause.SET, 11: Cause.SET,
    12: Cause.ELEMENT, 14: Cause.ELEMENT, 18: Cause.COUNTER, 20: Cause.COUNTER, 22: Cause.OTHER, 24: Cause.OTHER,
}  # fmt: skip
_ORDER = list(Cause)
_PROCESS_ID, _PROCESS_NAME = 2, 3
_LINKS, _ADDRESSES, _ROUTES, _RULES = (16, 17), (20, 21), (24, 25), (32, 33)  # RTM_NEW…, RTM_DEL…
_INDEX = struct.Struct("=i")
_RTA_TABLE, _FRA_PRIORITY, _FRA_TABLE = 15, 6, 15
_BODY_OF_ROUTE = 12  # struct rtmsg, struct fib_rule_hdr
_COMPAT = 252  # RT_TABLE_COMPAT: the table's number does not fit into a byte and is an attribute
_LO = 1


class Watch:
    """What others changed in one network namespace since it was made. Not for several threads at once; close() it.

    Raises OSError where the kernel gives no notices."""

    def __init__(self, settings: NodeSettings) -> None:
        self._settings = settings
        self._table = settings.table.encode() + b"\0"
        self._worst: Cause | None = None  # of the transaction whose end has not come yet
        self.generation: int | None = None  # of nftables, at the last change that we heard of; None: notices were lost
        with contextlib.ExitStack() as stack:
            self._nftables = stack.enter_context(
                netlink.opened(netlink.NETLINK_NETFILTER, (_NFTABLES_GROUP,), buffer=_BUFFER_BYTES)
            )
            self._routes = stack.enter_context(
                netlink.opened(socket.NETLINK_ROUTE, _ROUTE_GROUPS, buffer=_BUFFER_BYTES)
            )
            self.generation = nftables.generation()
            stack.pop_all()
        for each in (self._nftables, self._routes):
            each.setblocking(False)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Readable while read() has something to tell."""
        return self._nftables.fileno(), self._routes.fileno()

    def close(self) -> None:
        self._nftables.close()
        self._routes.close()

    def read(self, own: Collection[int]) -> list[Drift]:
        """What changed since the last call, without waiting. own: process ids of ours that changed tables since then, all ended."""
        drifts: list[Drift] = []
        for source, understand in ((self._nftables, self._on_table), (self._routes, self._on_route)):
            while True:
                try:
                    data = source.recv(_READ)
                except BlockingIOError:
                    break
                except OSError as err:
                    if err.errno != errno.ENOBUFS:
                        raise
                    if source is self._nftables:
                        self._worst = self.generation = None
                    drifts.append(Drift(Cause.UNSEEN))
                    continue
                for message in netlink.messages(data):
                    drifts += understand(message, own)
        return drifts

    def _on_table(self, message: netlink.Message, own: Collection[int]) -> Iterable[Drift]:
        """Changes come in the order of a transaction, and at its end who made it."""
        if message.kind == nftables.NEW_GENERATION:
            self.generation = nftables.generation_of(message.body)
            worst, self._worst = self._worst, None
            return () if worst is None or message.port in own else (Drift(worst, _owner(message.body)),)
        cause = _KINDS.get(message.kind & 0xFF)
        if message.port not in own and cause is not None and self._concerns_us(message.body):
            self._worst = cause if self._worst is None else min(self._worst, cause, key=_ORDER.index)
        return ()

    def _concerns_us(self, body: memoryview) -> bool:
        if body[0] != nftables.INET:
            return False
        return any(kind == nftables.TABLE and value == self._table for kind, value in netlink.attributes(body[4:]))

    def _on_route(self, message: netlink.Message, own: Collection[int]) -> Iterable[Drift]:
        kind, body, settings = message.kind, message.body, self._settings
        if kind in _LINKS:
            if _INDEX.unpack_from(body, 4)[0] == _LO:
                yield Drift(Cause.LINK)
        elif kind in _ADDRESSES:
            yield Drift(Cause.ADDRESS)
        elif kind in _ROUTES:
            if body[4] in (_COMPAT, settings.route_table) and _number(body, _RTA_TABLE) == settings.route_table:
                yield Drift(Cause.ROUTE)
        elif kind in _RULES:
            prefs = range(settings.rule_pref, settings.rule_pref + 3)
            if _number(body, _FRA_PRIORITY) in prefs or _number(body, _FRA_TABLE) == settings.route_table:
                yield Drift(Cause.IP_RULE)


def _number(body: memoryview, wanted: int) -> int | None:
    for kind, value in netlink.attributes(body[_BODY_OF_ROUTE:]):
        if kind == wanted:
            return int.from_bytes(value, sys.byteorder)
    return None


def _owner(body: memoryview) -> str:
    said = dict(netlink.attributes(body[nftables.GENERAL.size :]))
    if _PROCESS_NAME not in said:
        return ""
    number = int.from_bytes(said.get(_PROCESS_ID, memoryview(b"")), "big")
    return f"{netlink.text(said[_PROCESS_NAME])}, process {number}"
