"""Argument types and defaults that several commands share."""

from __future__ import annotations

import ipaddress
import os
import sys
from typing import TYPE_CHECKING

import click


def default_state() -> str:
    """The folder where a running instance is looked for: /run/pellucid for root, else pellucid in XDG_RUNTIME_DIR (or in /tmp,
    with the user's id)."""
    if os.geteuid() == 0:
        return "/run/pellucid"
    return os.path.join(os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/user-{os.geteuid()}", "pellucid")


state_option = click.option(
    "--state",
    metavar="DIR",
    default=default_state,
    show_default="/run/pellucid, or pellucid in $XDG_RUNTIME_DIR",
    envvar="PELLUCID_STATE",
    show_envvar=True,
    help="Folder of the running instance: lock, status socket, last good policy.",
)

output_option = click.option(
    "-o",
    "--output",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="What standard output gets.",
)
auto_output_option = click.option(
    "-o",
    "--output",
    type=click.Choice(["auto", "text", "json"]),
    default="auto",
    show_default=True,
    help="auto: text for people on a terminal, JSON in a pipe.",
)


def wants_json(output: str) -> bool:
    """Whether the choice made by one of the options above means JSON here."""
    return output == "json" or (output == "auto" and not sys.stdout.isatty())


if TYPE_CHECKING:
    _Text = click.ParamType[str]
else:  # generic only from click 8.4 on
    _Text = click.ParamType


class Network(_Text):
    """A CIDR, or an address, which then stands for itself alone. Gives the canonical text."""

    name = "CIDR"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return str(ipaddress.ip_network(value))
        except ValueError as err:
            cure = "write it as 10.244.0.0/16 or fd00:244::/56"
            if "host bits" in str(err):
                cure = f"did you mean {ipaddress.ip_network(value, strict=False)}?"
            self.fail(f"{value} is not a network ({err}). Cure: {cure}", param, ctx)


class AddressPort(_Text):
    """ADDRESS:PORT with an IP address, IPv6 in brackets; port 0 lets the kernel choose. Gives the text as it came."""

    name = "ADDR:PORT"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        address, colon, port = value.rpartition(":")
        try:
            if not colon:
                raise ValueError("it has no port")
            bracketed = address.startswith("[") and address.endswith("]")
            if ipaddress.ip_address(address[1:-1] if bracketed else address).version == 6 and not bracketed:
                raise ValueError("an IPv6 address stands in brackets")
            if not (port.isascii() and port.isdigit() and int(port) <= 65535):
                raise ValueError(f"{port or 'nothing'} is not a port (0-65535)")
        except ValueError as err:
            self.fail(f"{value}: {err}. Cure: write it as 127.0.0.1:9090 or [::1]:9090.", param, ctx)
        return value


NETWORK = Network()
ADDRESS_PORT = AddressPort()
