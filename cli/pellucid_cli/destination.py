"""Where a flow goes, as people write it: 192.0.2.10:443, [2001:db8::1]:53/udp, example.com:443, 192.0.2.10/icmp."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132, "icmp": 1}
ICMPV6 = 58

if TYPE_CHECKING:
    _Base = click.ParamType["Destination"]
else:  # generic only from click 8.4 on
    _Base = click.ParamType


@dataclass(frozen=True)
class Destination:
    """address or name, the other is None. port: 0 for ICMP. protocol: IANA number; of ICMP that of the address's IP version."""

    address: str | None
    name: str | None
    port: int
    protocol: int


def place(address: str | None, port: int, protocol: str) -> str:
    """As a Destination is written; protocol: TCP, UDP … An unknown address is a question mark."""
    host = "?" if address is None else f"[{address}]" if ":" in address else address
    if protocol == "ICMP":
        return f"{address or '?'}/icmp"
    return f"{host}:{port}" + ("" if protocol == "TCP" else f"/{protocol.lower()}")


class DestinationType(_Base):
    """Gives a Destination."""

    name = "DESTINATION"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Destination:
        if isinstance(value, Destination):
            return value
        try:
            return _read(value)
        except ValueError as err:
            cure = "write it as 192.0.2.10:443, [2001:db8::1]:53/udp, example.com:443 or 192.0.2.10/icmp"
            self.fail(f"{value}: {err}. Cure: {cure}.", param, ctx)


DESTINATION = DestinationType()


def _read(text: str) -> Destination:
    place_, _, protocol = text.partition("/")
    protocol = protocol or "tcp"
    if protocol not in PROTOCOLS:
        raise ValueError(f"{protocol} is none of {', '.join(PROTOCOLS)}")
    if protocol == "icmp":
        address = str(ipaddress.ip_address(place_.removeprefix("[").removesuffix("]")))
        return Destination(address, None, 0, ICMPV6 if ":" in address else PROTOCOLS["icmp"])
    host, colon, port = place_.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise ValueError("it has no port from 1 to 65535")
    bracketed = host.startswith("[") and host.endswith("]")
    inner = host[1:-1] if bracketed else host
    try:
        address = str(ipaddress.ip_address(inner))
    except ValueError:
        if bracketed or ":" in inner:
            raise ValueError(f"{inner} is no address") from None
        return Destination(None, _name(inner), int(port), PROTOCOLS[protocol])
    if ":" in address and not bracketed:
        raise ValueError("an IPv6 address stands in brackets")
    return Destination(address, None, int(port), PROTOCOLS[protocol])


def _name(text: str) -> str:
    from pellucid_policy.domains import canonical

    try:
        return canonical(text)
    except ValueError as err:
        raise ValueError(f"the name {err}") from err
