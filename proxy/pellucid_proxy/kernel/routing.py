"""The ip rules and routes that deliver marked packets to this machine, in both families.

    pref P    iif lo from <scope> goto P+2                  see _wanted
    pref P+1  from <scope> fwmark intercept/mask lookup T
    pref P+1  to <scope> fwmark reply/mask lookup T
    pref P+2  nop
    table T   local default dev lo

All carry proto kernel: systemd-networkd deletes what it does not know, but not these.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from ..settings import NodeSettings
from .apply import KernelError

_KERNEL = 2  # RTPROT_KERNEL
_TO_TABLE, _GOTO, _NOP = 1, 2, 3  # FR_ACT_*
_LOCAL = 2  # RTN_LOCAL
_WHOLE = 0xFFFFFFFF
_MOST_FOREIGN_RULES = 64  # taken away in one repair


@dataclass(frozen=True, slots=True)
class Rule:
    """An ip rule as far as we compare it. source and target: CIDR text, "" for any; a goto's target is in goto."""

    family: int
    pref: int
    action: int
    source: str = ""
    target: str = ""
    interface: str = ""
    mark: int = 0
    mask: int = 0
    table: int = 0
    goto: int = 0

    def __str__(self) -> str:
        parts = [f"pref {self.pref}", f"from {self.source or 'all'}"]
        parts += [f"to {self.target}"] if self.target else []
        parts += [f"iif {self.interface}"] if self.interface else []
        parts += [f"fwmark {self.mark:#x}/{self.mask:#x}"] if self.mask else []
        parts += [f"lookup {self.table}"] if self.action == _TO_TABLE else []
        return ("ip -6 rule " if self.family == socket.AF_INET6 else "ip rule ") + " ".join(parts)


def ipv6_available() -> bool:
    """Whether this network namespace speaks IPv6 at all: the listener's ::1 must be there."""
    try:
        return Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6").read_text().strip() == "0"
    except OSError:
        return False


def collisions(settings: NodeSettings) -> list[str]:
    """Other people's ip rules and routes that our preferences, table or mark bits would disturb, each as one sentence with its cure.

    Rules on the whole mark (wg-quick) are none: they compare bits that we keep. Raises KernelError.
    """
    with _netlink() as netlink:
        return [
            sentence
            for family in _families(settings)
            for rule in _present(netlink, family)
            if not _ours(rule, settings)
            for sentence in _collision(rule, settings)
        ] + [
            f"settings.route_table: table {settings.route_table} already holds a route to {target}; choose another, or remove it"
            for family in _families(settings)
            for target in _foreign_routes(netlink, settings, family)
        ]


def install(settings: NodeSettings) -> None:
    """Our rules and routes are there, exactly once, and no stale ones of ours. Raises KernelError on a collision."""
    refuse_ipv6_scope(settings)
    found = collisions(settings)
    if found:
        raise KernelError("; ".join(found))
    with _netlink() as netlink:
        for family in _families(settings):
            wanted = list(_wanted(settings, family))
            present = [rule for rule in _present(netlink, family) if _ours(rule, settings)]
            netlink.route("replace", **_route(settings, family))
            # First: to the kernel a rule from all addresses "exists" when one from some does (fib4_rule_compare).
            for rule in _surplus(present, wanted):
                netlink.rule("del", **_attributes(rule))
            for rule in wanted:
                if rule not in present:
                    netlink.rule("add", **_attributes(rule))


def remove(settings: NodeSettings) -> None:
    """Nothing of ours is left among rules and routes. Does nothing where there was nothing. Raises KernelError."""
    with _netlink() as netlink:
        for family in _families(settings):
            for rule in [rule for rule in _present(netlink, family) if _ours(rule, settings)]:
                netlink.rule("del", **_attributes(rule))
            try:
                netlink.route("del", **_route(settings, family))
            except NetlinkError as err:
                if err.code not in (errno.ESRCH, errno.ENOENT):
                    raise


def left(settings: NodeSettings) -> list[str]:
    """Rules and routes of our shape, whatever scope they were made for. Raises KernelError."""
    found: list[str] = []
    with _netlink() as netlink:
        for family in _families(settings):
            found += [str(rule) for rule in _present(netlink, family) if _ours(rule, settings)]
            for message in netlink.get_routes(family=family, table=settings.route_table, type=_LOCAL):
                if message.get_attr("RTA_TABLE") == settings.route_table and not message.get_attr("RTA_DST"):
                    found.append(f"local default dev lo table {settings.route_table}")
    return found


def missing(settings: NodeSettings) -> list[str]:
    """Which of our rules and routes are not there, as `ip rule` or `ip route` would show them. Raises KernelError."""
    absent: list[str] = []
    with _netlink() as netlink:
        for family in _families(settings):
            present = list(_present(netlink, family))
            absent += [str(rule) for rule in _wanted(settings, family) if rule not in present]
            with suppress(StopIteration):
                next(iter(netlink.get_routes(family=family, table=settings.route_table, type=_LOCAL)))
                continue
            absent.append(f"local default dev lo table {settings.route_table}")
    return absent


def wrong(settings: NodeSettings) -> bool:
    """Whether repair() would have anything to do. Raises KernelError."""
    if missing(settings):
        return True
    with _netlink() as netlink:
        for family in _families(settings):
            among = [rule for rule in _present(netlink, family) if _among_ours(rule, settings)]
            if _surplus(among, list(_wanted(settings, family))) or any(_foreign_routes(netlink, settings, family)):
                return True
    return False


def repair(settings: NodeSettings) -> list[str]:
    """Our rules and routes are there and nothing of others' is among them; returns what was not so, as `ip` would show it.

    The table and the preferences are ours since the start found them free: what others put there would take marked packets elsewhere.
    Raises KernelError.
    """
    found: list[str] = []
    with _netlink() as netlink:
        for family in _families(settings):
            found += _repair_route(netlink, settings, family) + _repair_rules(netlink, settings, family)
    return found


def _repair_route(netlink: IPRoute, settings: NodeSettings, family: int) -> list[str]:
    found, there = [], False
    for message in netlink.get_routes(family=family, table=settings.route_table):
        target = message.get_attr("RTA_DST")
        if message.get_attr("RTA_TABLE") != settings.route_table:
            continue
        if not target and message["type"] == _LOCAL:
            there = True
            continue
        cidr = f"{target}/{message['dst_len']}" if target else "default"
        metric = message.get_attr("RTA_PRIORITY")
        netlink.route(
            "del",
            family=family,
            dst=cidr,
            type=message["type"],
            table=settings.route_table,
            scope=message["scope"],
            **({"priority": metric} if metric else {}),
        )
        found.append(f"a route of others to {cidr} in table {settings.route_table}")
    if not there:
        netlink.route("replace", **_route(settings, family))
        found.append(f"local default dev lo table {settings.route_table} was missing")
    return found


def _repair_rules(netlink: IPRoute, settings: NodeSettings, family: int) -> list[str]:
    wanted, found = list(_wanted(settings, family)), []
    for _ in range(
        _MOST_FOREIGN_RULES
    ):  # to the kernel, one of ours may be what is to be deleted: look again each time
        surplus = _surplus([r for r in _present(netlink, family) if _among_ours(r, settings)], wanted)
        if not surplus:
            break
        netlink.rule("del", **{key: value for key, value in _attributes(surplus[0]).items() if key != "FRA_PROTOCOL"})
        found.append(f"{surplus[0]} is not ours")
    present = list(_present(netlink, family))
    missing = [rule for rule in wanted if rule not in present]
    for rule in missing:
        netlink.rule("add", **_attributes(rule))
    return found + [f"{rule} was missing" for rule in missing]


def _among_ours(rule: Rule, settings: NodeSettings) -> bool:
    prefs = range(settings.rule_pref, settings.rule_pref + 3)
    return rule.pref in prefs or (rule.action == _TO_TABLE and rule.table == settings.route_table)


def bridges() -> list[str]:
    """The names of this network namespace's bridges. Raises KernelError."""
    with _netlink() as netlink:
        return sorted(link.get_attr("IFLA_IFNAME") for link in netlink.get_links(kind="bridge"))


def refuse_ipv6_scope(settings: NodeSettings) -> None:
    """Raises KernelError where IPv6 is in scope but this machine has none: its pods would not be covered as asked."""
    if settings.ipv6 and ipv6_available():
        return
    for index, cidr in enumerate(settings.scope):
        if ":" in cidr:
            raise KernelError(
                f"settings.scope[{index}]: {cidr} is IPv6, which is off here; leave it out, or enable IPv6 "
                "(boot without ipv6.disable=1; sysctl net.ipv6.conf.all.disable_ipv6=0)"
            )


def _families(settings: NodeSettings) -> list[int]:
    return [socket.AF_INET, socket.AF_INET6] if settings.ipv6 and ipv6_available() else [socket.AF_INET]


def _wanted(settings: NodeSettings, family: int) -> Iterator[Rule]:
    """The first rule is for src_valid_mark=1, under which the kernel looks a packet's source up with the packet's own mark, from lo
    and with the ends swapped: where both ends are pods, the second would call that source local and the packet a martian. It spares
    what a server on this node answers a pod's address that is ours: such an answer comes from lo, but not from the scope."""
    pref, marks = settings.rule_pref, settings.marks
    for cidr in _scope(settings, family):
        yield Rule(family, pref, _GOTO, source=cidr, interface="lo", goto=pref + 2)
        yield Rule(
            family, pref + 1, _TO_TABLE, source=cidr, mark=marks.intercept, mask=marks.mask, table=settings.route_table
        )
        yield Rule(
            family, pref + 1, _TO_TABLE, target=cidr, mark=marks.reply, mask=marks.mask, table=settings.route_table
        )
    yield Rule(family, pref + 2, _NOP)


def _scope(settings: NodeSettings, family: int) -> list[str]:
    """The CIDRs of family as the kernel shows them: "" for every address."""
    networks = (ipaddress.ip_network(cidr) for cidr in settings.scope)
    own = (network for network in networks if network.version == (6 if family == socket.AF_INET6 else 4))
    return list(dict.fromkeys(str(network) if network.prefixlen else "" for network in own))


def _route(settings: NodeSettings, family: int) -> dict[str, Any]:
    return {
        "family": family,
        "dst": "default",
        "type": "local",
        "oif": 1,
        "table": settings.route_table,
        "proto": _KERNEL,
        "scope": 254 if family == socket.AF_INET else 0,
    }  # oif 1: lo has index 1 in every namespace


def _foreign_routes(netlink: IPRoute, settings: NodeSettings, family: int) -> Iterator[str]:
    """Destinations of the routes in our table that are not ours: marked packets would follow them."""
    for message in netlink.get_routes(family=family, table=settings.route_table):
        target = message.get_attr("RTA_DST")
        if message.get_attr("RTA_TABLE") == settings.route_table and (target or message["type"] != _LOCAL):
            yield f"{target}/{message['dst_len']}" if target else "everywhere"


def _present(netlink: IPRoute, family: int) -> Iterator[Rule]:
    for message in netlink.get_rules(family=family):
        source, target = message.get_attr("FRA_SRC"), message.get_attr("FRA_DST")
        yield Rule(
            family,
            message.get_attr("FRA_PRIORITY") or 0,
            message["action"],
            source=f"{source}/{message['src_len']}" if source else "",
            target=f"{target}/{message['dst_len']}" if target else "",
            interface=message.get_attr("FRA_IIFNAME") or "",
            mark=message.get_attr("FRA_FWMARK") or 0,
            mask=message.get_attr("FRA_FWMASK") or 0,
            table=(message.get_attr("FRA_TABLE") or 0) if message["action"] == _TO_TABLE else 0,
            goto=message.get_attr("FRA_GOTO") or 0,
        )


def _attributes(rule: Rule) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "family": rule.family,
        "priority": rule.pref,
        "action": rule.action,
        "FRA_PROTOCOL": _KERNEL,
        "table": rule.table,
    }
    for name, length, cidr in (("FRA_SRC", "src_len", rule.source), ("FRA_DST", "dst_len", rule.target)):
        if cidr:
            address, _, bits = cidr.partition("/")
            attributes |= {name: address, length: int(bits)}
    if rule.interface:
        attributes["FRA_IIFNAME"] = rule.interface
    if rule.mask:
        attributes |= {"FRA_FWMARK": rule.mark, "FRA_FWMASK": rule.mask}
    if rule.goto:
        attributes["FRA_GOTO"] = rule.goto
    return attributes


def _ours(rule: Rule, settings: NodeSettings) -> bool:
    """Whether rule has the shape of ours, whatever scope it was made for: an earlier run may have had another."""
    marks, pref = settings.marks, settings.rule_pref
    return (
        (rule.pref, rule.action, rule.interface, rule.goto) == (pref, _GOTO, "lo", pref + 2)
        or (
            (rule.pref, rule.action, rule.table, rule.mask) == (pref + 1, _TO_TABLE, settings.route_table, marks.mask)
            and rule.mark in (marks.intercept, marks.reply)
        )
        or (rule.pref, rule.action) == (pref + 2, _NOP)
    )


def _surplus(present: list[Rule], wanted: list[Rule]) -> list[Rule]:
    """Those of present that are stale or there twice."""
    left = list(wanted)
    surplus = []
    for rule in present:
        if rule in left:
            left.remove(rule)
        else:
            surplus.append(rule)
    return surplus


def _collision(rule: Rule, settings: NodeSettings) -> Iterator[str]:
    prefs = range(settings.rule_pref, settings.rule_pref + 3)
    if rule.pref in prefs:
        yield f"settings.rule_pref: `{rule}` already has {rule.pref}, and {prefs[0]} to {prefs[-1]} are needed; choose another"
    elif rule.action == _TO_TABLE and rule.table == settings.route_table:
        yield f"settings.route_table: `{rule}` already uses {rule.table}; choose another"
    elif (rule.mark, rule.mask) == (settings.marks.egress, settings.marks.mask):
        return  # somebody sends what we dial through a VPN: that is what the mark is for
    elif rule.mask != _WHOLE and rule.mask & settings.marks.mask:
        yield (
            f"settings.marks.mask: `{rule}` uses bits {rule.mask & settings.marks.mask:#x} of our mark {settings.marks.mask:#x}; "
            "choose two bits that nobody uses"
        )


class _netlink:  # noqa: N801 - reads as a verb in `with`
    """An IPRoute whose errors leave as KernelError."""

    def __enter__(self) -> IPRoute:
        try:
            self._netlink = IPRoute()
        except OSError as err:
            raise KernelError(
                f"netlink: {err}; the process needs a kernel with CONFIG_NETLINK and permission for AF_NETLINK"
            ) from err
        return self._netlink

    def __exit__(self, kind: object, value: BaseException | None, trace: object) -> None:
        self._netlink.close()
        if isinstance(value, NetlinkError):
            denied = value.code == errno.EPERM
            cure = (
                "give the process the capability NET_ADMIN"
                if denied
                else "see `ip rule`, `ip route show table all`, `dmesg`"
            )
            raise KernelError(f"netlink: {value.args[-1]}; {cure}") from value
