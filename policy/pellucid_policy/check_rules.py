"""The checks of one rule, and of the addresses and names in it."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import UNSET

from . import domains
from .model import (
    Block,
    Egress,
    Intercept,
    Match,
    PortEntry,
    Protocol,
    RequestAction,
    RequestRule,
    RouteSpec,
    Rule,
    RuleAction,
)
from .verdict import Response

Finding = tuple[str, str, str]
"""Path within the object, message, cure."""

_RULE_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 §5.6.2
_INTERFACE = re.compile(r"[^\s/:%]{1,15}")
_FIELD_OF = {RuleAction.BLOCK: "block", RuleAction.ROUTE: "route", RuleAction.INTERCEPT: "intercept"}


def rule(path: str, rule: Rule) -> Iterator[Finding]:
    """Yield what is wrong with a rule of a policy."""
    if rule.name is not UNSET and not _RULE_NAME.fullmatch(rule.name):
        yield f"{path}.name", f"{rule.name!r} is no name of a rule", "write at most 63 lower case letters, digits and -"
    yield from _match(f"{path}.match", rule.match)
    yield from _action(path, rule)
    if rule.block is not UNSET:
        yield from _block(f"{path}.block", rule.block)
    if rule.route is not UNSET:
        yield from _route(f"{path}.route", rule.route)
    if rule.intercept is not UNSET:
        yield from _intercept(f"{path}.intercept", rule.intercept)
    if rule.egress is not UNSET:
        yield from _egress(f"{path}.egress", rule.egress)


def exactly_one(path: str, fields: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield a finding unless exactly one of the fields is set."""
    given = [name for name, value in fields.items() if value is not UNSET]
    if len(given) != 1:
        said = " and ".join(given) + " are set together" if given else "is empty"
        yield path, said, f"write exactly one of {', '.join(fields)}"


def cidr(path: str, text: str) -> Iterator[Finding]:
    """Yield why text is no network: prefix length missing, host bits set, IPv4 written as IPv6."""
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        yield path, f"{text!r} is no network", "write ADDRESS/LENGTH, as 192.0.2.0/24 or 2001:db8::/32"
        return
    if "%" in text:
        yield path, f"{text!r} has a zone", "leave out % and what follows"
    elif isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped is not None:
        yield path, f"{text!r} is IPv4 written as IPv6", "write the IPv4 network"
    elif "/" not in text:
        yield path, f"{text!r} has no prefix length", f"write {network}"
    elif not text.rpartition("/")[2].isdigit():
        yield path, f"{text!r} has a mask for a prefix length", f"write {network}"
    elif ipaddress.ip_interface(text).ip != network.network_address:
        yield path, f"{text!r} has bits set beyond its prefix length", f"write {network}"


def address(path: str, text: str) -> Iterator[Finding]:
    """Yield why text is no address."""
    try:
        value = ipaddress.ip_address(text)
    except ValueError:
        yield path, f"{text!r} is no IP address", "names are not resolved here: write an address"
        return
    if isinstance(value, ipaddress.IPv6Address) and (value.ipv4_mapped is not None or value.scope_id is not None):
        yield path, f"{text!r} has a zone or is IPv4 written as IPv6", "write the plain address"


def domain(path: str, text: str) -> Iterator[Finding]:
    """Yield why text is no domain of a policy: NAME or *.NAME."""
    try:
        domains.pattern(text)
    except ValueError as err:
        why = str(err)
        cure = "write NAME or *.NAME"
        if "IP address" in why:
            cure = "write it as a cidr"
        elif text == "*":
            cure = "for every name leave destinations out"
        yield path, f"{text!r} {why}", cure


def _match(path: str, match: Match) -> Iterator[Finding]:
    ports = () if match.ports is UNSET else match.ports
    for at, entry in enumerate(ports):
        yield from _port(f"{path}.ports[{at}]", entry)
    no_tcp = bool(ports) and all(_protocol(entry) is not Protocol.TCP for entry in ports)
    for at, each in enumerate(() if match.destinations is UNSET else match.destinations):
        inner = f"{path}.destinations[{at}]"
        yield from exactly_one(inner, {"cidr": each.cidr, "domain": each.domain, "service": each.service})
        if each.cidr is not UNSET:
            yield from cidr(f"{inner}.cidr", each.cidr)
        if each.domain is not UNSET:
            yield from domain(f"{inner}.domain", each.domain)
            if no_tcp:
                yield (
                    f"{inner}.domain",
                    "names are read in TCP flows, and ports has none",
                    "add a TCP port, or write a cidr",
                )


def _protocol(entry: PortEntry) -> Protocol:
    return Protocol.TCP if entry.protocol is UNSET else entry.protocol


def _port(path: str, entry: PortEntry) -> Iterator[Finding]:
    if entry.port is UNSET and entry.protocol is UNSET:
        yield path, "has neither port nor protocol", "for all TCP ports write protocol: TCP"
    if entry.end_port is not UNSET:
        if entry.port is UNSET:
            yield f"{path}.endPort", "is set without port", "write port, the first of the range"
        elif entry.end_port < entry.port:
            yield f"{path}.endPort", f"{entry.end_port} is lower than port {entry.port}", "swap them"
    if _protocol(entry) is Protocol.ICMP and entry.port is not UNSET:
        yield f"{path}.port", "is set, but ICMP has no ports", "leave it out"


def _action(path: str, rule: Rule) -> Iterator[Finding]:
    for action, field in _FIELD_OF.items():
        given = getattr(rule, field) is not UNSET
        if given and rule.action is not action:
            yield (
                f"{path}.{field}",
                f"is set, but the action is {rule.action}",
                f"leave it out, or write action: {action}",
            )
        if not given and rule.action is action and action is not RuleAction.BLOCK:
            yield f"{path}.{field}", f"is missing: the action is {action}", f"write {field}: {{…}}"
    if rule.egress is not UNSET and rule.action in (RuleAction.BLOCK, RuleAction.PASS):
        yield f"{path}.egress", f"is set, but the action is {rule.action}", "leave it out"
    ports = () if rule.match.ports is UNSET else rule.match.ports
    if rule.action in (RuleAction.ROUTE, RuleAction.INTERCEPT) and ports:
        for at, entry in enumerate(ports):
            if _protocol(entry) is not Protocol.TCP:
                yield (
                    f"{path}.match.ports[{at}].protocol",
                    f"{_protocol(entry)} flows cannot take {rule.action}",
                    "write TCP",
                )


def _block(path: str, block: Block) -> Iterator[Finding]:
    for field, value in (("status", block.status), ("body", block.body)):
        if value is not UNSET and block.response is not Response.RESPOND:
            yield (
                f"{path}.{field}",
                f"is set, but the response is {block.response}",
                "leave it out, or write response: Respond",
            )


def _route(path: str, route: RouteSpec) -> Iterator[Finding]:
    if route.to is UNSET and route.via is UNSET:
        yield path, "is empty", "write to, via or both"
    if route.via is not UNSET:
        yield from address(f"{path}.via.address", route.via.address)
    if route.to is UNSET:
        return
    to = route.to
    yield from exactly_one(f"{path}.to", {"address": to.address, "service": to.service})
    if to.address is not UNSET:
        yield from address(f"{path}.to.address", to.address)
        if to.port is UNSET:
            yield f"{path}.to.port", "is missing", "write the port to connect to"
    elif to.port is not UNSET:
        yield f"{path}.to.port", "is set without address", "a service has its own port field"


def _egress(path: str, egress: Egress) -> Iterator[Finding]:
    if egress.route_table is UNSET and egress.interface is UNSET and egress.source_address is UNSET:
        yield path, "is empty", "write routeTable, interface or sourceAddress"
    if egress.interface is not UNSET and not _INTERFACE.fullmatch(egress.interface):
        yield f"{path}.interface", f"{egress.interface!r} is no name of an interface", ""


def _intercept(path: str, intercept: Intercept) -> Iterator[Finding]:
    names: dict[str, int] = {}
    for at, each in enumerate(intercept.requests):
        inner = f"{path}.requests[{at}]"
        if each.name is not UNSET and names.setdefault(each.name, at) != at:
            yield (
                f"{inner}.name",
                f"{each.name!r} is also the name of requests[{names[each.name]}]",
                "names are unique in a list",
            )
        yield from _request(inner, each)


def _request(path: str, rule: RequestRule) -> Iterator[Finding]:
    for method in () if rule.match.methods is UNSET else rule.match.methods:
        if not _TOKEN.fullmatch(method):
            yield f"{path}.match.methods", f"{method!r} is no HTTP method", ""
    if rule.match.path is not UNSET:
        target = rule.match.path
        yield from exactly_one(f"{path}.match.path", {"exact": target.exact, "prefix": target.prefix})
        for field, text in (("exact", target.exact), ("prefix", target.prefix)):
            if text is not UNSET and not text.startswith("/"):
                yield f"{path}.match.path.{field}", f"{text!r} does not begin with /", f"write /{text}"
    if rule.block is not UNSET:
        yield from _block(f"{path}.block", rule.block)
        if rule.action is not RequestAction.BLOCK:
            yield f"{path}.block", f"is set, but the action is {rule.action}", "leave it out, or write action: Block"
    yield from _changes(path, rule)


def _changes(path: str, rule: RequestRule) -> Iterator[Finding]:
    for side, change in (("request", rule.request), ("response", rule.response)):
        if change is UNSET:
            continue
        if rule.action is RequestAction.BLOCK:
            yield f"{path}.{side}", "is set, but the action is Block", "leave it out, or write action: Allow"
        headers = {} if change.set_headers is UNSET else change.set_headers
        for name in (*headers, *(() if change.remove_headers is UNSET else change.remove_headers)):
            if not _TOKEN.fullmatch(name):
                yield f"{path}.{side}", f"{name!r} is no header name", ""
        for name, value in headers.items():
            if any(char in value for char in "\r\n\0"):
                yield (
                    f"{path}.{side}.setHeaders",
                    f"the value of {name} has a line break or a NUL",
                    "RFC 9110 §5.5 forbids them",
                )
    if rule.request is not UNSET and rule.request.set_headers_from is not UNSET:
        for at, each in enumerate(rule.request.set_headers_from):
            if not _TOKEN.fullmatch(each.name):
                yield f"{path}.request.setHeadersFrom[{at}].name", f"{each.name!r} is no header name", ""
