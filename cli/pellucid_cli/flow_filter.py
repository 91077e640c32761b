"""Which flow records are wanted: every filter given must hold, within one filter any of its values."""

from __future__ import annotations

import datetime as dt
import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

VERDICTS = ("Allow", "Block", "Route", "None")
_DURATION = re.compile(r"([0-9]+)(s|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Flow = Mapping[str, Any]


@dataclass(frozen=True)
class FlowFilter:
    """Empty and None: not asked for. pods: namespace/name, or a name of any namespace. policies: likewise. names: as a rule's domains are
    written. networks: of the destination. ports: first and last, inclusive. since: flows that ended at or after it."""

    verdicts: frozenset[str] = frozenset()
    pods: frozenset[str] = frozenset()
    namespaces: frozenset[str] = frozenset()
    policies: frozenset[str] = frozenset()
    rules: frozenset[str] = frozenset()
    names: tuple[tuple[str, bool], ...] = ()
    networks: tuple[Network, ...] = ()
    ports: tuple[tuple[int, int], ...] = ()
    since: dt.datetime | None = None

    def wants(self, flow: Flow) -> bool:
        """Raises KeyError or TypeError for what is no flow record."""
        source, destination = flow["source"], flow["destination"]
        return (
            (not self.verdicts or flow["verdict"] in self.verdicts)
            and (not self.pods or _named(source["namespace"], source["pod"], self.pods))
            and (not self.namespaces or source["namespace"] in self.namespaces)
            and self._wants_rule(flow["policy"])
            and (not self.names or _asks_for(destination["name"], self.names))
            and (not self.networks or _within(destination["address"], self.networks))
            and (not self.ports or any(first <= destination["port"] <= last for first, last in self.ports))
            and (self.since is None or ended(flow) >= self.since)
        )

    def _wants_rule(self, policy: Mapping[str, str] | None) -> bool:
        if not self.policies and not self.rules:
            return True
        if policy is None:
            return False
        return (not self.policies or _named(policy["namespace"], policy["name"], self.policies)) and (
            not self.rules or policy["rule"] in self.rules
        )


def ended(flow: Flow) -> dt.datetime:
    """When the flow was over."""
    return dt.datetime.fromisoformat(flow["time"]) + dt.timedelta(seconds=flow["durationSeconds"])


def since(text: str, now: dt.datetime) -> dt.datetime:
    """The time that 90s, 5m, 2h, 1d before now, or an RFC 3339 time, stands for. Raises ValueError."""
    found = _DURATION.fullmatch(text)
    if found:
        return now - dt.timedelta(seconds=int(found[1]) * _SECONDS[found[2]])
    time = dt.datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError("it has no time zone")
    return time


def port_range(text: str) -> tuple[int, int]:
    """443, or 8000-8999. Raises ValueError."""
    first, _, last = text.partition("-")
    low, high = int(first), int(last or first)
    if not 0 <= low <= high <= 65535:
        raise ValueError(f"{text} is no port or range of ports (0-65535)")
    return low, high


def _named(namespace: str, name: str, wanted: Iterable[str]) -> bool:
    return name in wanted or f"{namespace}/{name}" in wanted


def _asks_for(name: str | None, patterns: Iterable[tuple[str, bool]]) -> bool:
    return name is not None and any(
        name.endswith(f".{domain}") if wildcard else name == domain for domain, wildcard in patterns
    )


def _within(text: str, networks: Iterable[Network]) -> bool:
    address = ipaddress.ip_address(text)
    return any(address in network for network in networks)
