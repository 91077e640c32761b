"""The techniques as values. A file with an unknown field, or without one that it needs, is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import yaml

HERE = Path(__file__).resolve().parent

WAYS = {
    "sni": "the name in a ClientHello: missing, doubled, disguised, encrypted",
    "hello": "a ClientHello that is split, oversized, odd or broken",
    "host": "the Host of a request: missing, doubled, disguised, at odds with its target",
    "framing": "requests that two servers would cut apart differently",
    "later": "a forbidden request after an allowed one, on one connection",
    "silence": "waiting to be let through without a name, and then saying one",
    "protocol": "other protocols, tunnels and proxies, where a name is asked for",
    "embedded": "an address within an address, or one that only the node may reach",
    "segments": "TCP segments that open, or pretend to continue, a connection in an odd way",
    "fragments": "IP fragments, options and extension headers",
    "protocols": "protocols beside TCP",
    "identity": "somebody else's address, or somebody else's mark",
    "node": "the node and the proxy itself",
}
"""What kind of way around a policy it is."""

Way = Literal[
    "sni", "hello", "host", "framing", "later", "silence", "protocol",
    "embedded", "segments", "fragments", "protocols", "identity", "node",
]  # fmt: skip
Text = str  # a character is a byte: YAML's "\xff" is 0xff


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A mapping of a technique's file."""


class Hello(Strict, frozen=True, kw_only=True):
    """A ClientHello. names: of one server_name extension, none: no such extension. kind: their name type. again: names of a second
    such extension. extensions: further ones, type to content. sizes: bytes of the handshake message in each record but the last.
    pad: bytes of a padding extension. cut: bytes left out at the end. segment: bytes of each TCP segment, 0: all in one."""

    names: tuple[Text, ...] = ()
    kind: int = 0
    again: tuple[Text, ...] = ()
    extensions: dict[int, Text] = {}
    sizes: tuple[int, ...] = ()
    version: Text = "\x03\x01"
    pad: int = 0
    cut: int = 0
    segment: int = 0


class Tcp(Strict, frozen=True):
    """flags: letters of FSRPAUEC. options: a multiple of four bytes."""

    flags: str
    to: int
    data: Text = ""
    options: Text = ""
    source: int = 4660


class Udp(Strict, frozen=True):
    to: int
    data: Text = "ESCAPED"


class Icmp(Strict, frozen=True):
    type: int
    code: int = 0
    data: Text = "\0\x01\0\x01ESCAPED"


class Packet(Strict, frozen=True, kw_only=True):
    """One IP packet. source: own, the pod or host of that name, or an address. to: likewise. Exactly one of tcp, udp, icmp and payload.

    headers: of IPv6, before the payload, each as type and content. options: of IPv4. fragments: where it is cut, in bytes of its payload,
    multiples of 8. order: in which the fragments are sent, from 0; some may be left out. times: how often, each with the next source port.
    tagged: with a VLAN tag of that id."""

    version: int
    source: str = "own"
    to: str | None = None
    protocol: int | None = None
    tcp: Tcp | None = None
    udp: Udp | None = None
    icmp: Icmp | None = None
    payload: Text | None = None
    headers: tuple[tuple[int, Text], ...] = ()
    options: Text = ""
    fragments: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    times: int = 1
    tagged: int | None = None


class Step(Strict, frozen=True):
    """Exactly one of: send, as one segment; trickle, a segment a byte; urgent, the last byte out of band; hello; wait, for bytes of the
    server (answer) or for the server to have accepted (accepted); end, of the client's stream; packet."""

    send: Text | None = None
    trickle: Text | None = None
    urgent: Text | None = None
    hello: Hello | None = None
    wait: Literal["answer", "accepted"] | None = None
    end: bool | None = None
    packet: Packet | None = None


class Client(Strict, frozen=True):
    """The client's socket. mark: SO_MARK. source_port: its own; used_before: it had a connection to the allowed server just now."""

    mark: int = 0
    source_port: int = 0
    used_before: bool = False
    fast_open: bool = False


class Server(Strict, frozen=True):
    """What the victim says: first, when it accepts; answer, after the first bytes that come."""

    first: Text = ""
    answer: Text = ""


class Expect(Strict, frozen=True):
    """ends: how the client's connection ends. verdict, reason: of the flow record; None: the kernel decides, there is no record.
    passes: bytes that may reach the server, or a beginning of them; of packets none may, ever."""

    ends: Literal[
        "reset", "closed", "alert", "forbidden", "misdirected", "unreachable", "silence", "nothing", "response"
    ]
    verdict: Literal["Block", "Allow"] | None = None
    reason: str | None = None
    passes: Text = ""


class Technique(Strict, frozen=True, kw_only=True):
    """policy: a file of policies, and the attacker's pod. to: the victim, a host's name or an address that it has. port: None, one of
    its own. unguarded: arrives, or why it would not get anywhere without the proxy either. known: None, or why it passes as yet."""

    title: str
    way: Way
    source: str
    policy: str
    why: str
    steps: tuple[Step, ...]
    expect: Expect
    to: str = "forbidden"
    port: int | None = None
    versions: tuple[Literal[4, 6], ...] = (4, 6)
    client: Client = Client()
    server: Server = Server()
    unguarded: str = "arrives"
    known: str | None = None

    @property
    def packets(self) -> tuple[Packet, ...]:
        """Of a technique that is made of packets instead of a connection."""
        return tuple(step.packet for step in self.steps if step.packet is not None)


def techniques() -> dict[str, Technique]:
    """All of them by name. Raises ValueError naming the file and the field."""
    return {path.stem: _read(path) for path in sorted((HERE / "techniques").glob("*.yaml"))}


def policies() -> dict[str, str]:
    """The policies' text by name."""
    return {path.stem: path.read_text() for path in sorted((HERE / "policies").glob("*.yaml"))}


def raw(text: Text) -> bytes:
    """The bytes that a text of a file stands for."""
    return text.encode("latin-1")


def _read(path: Path) -> Technique:
    try:
        read = msgspec.convert(yaml.safe_load(path.read_text()), Technique, strict=True)
        for step in read.steps:
            if sum(value is not None for value in msgspec.structs.astuple(step)) != 1:
                raise ValueError("steps: each has exactly one field")
        if read.packets and len(read.packets) != len(read.steps):
            raise ValueError("steps: packets and a connection do not mix")
    except (msgspec.ValidationError, yaml.YAMLError, ValueError) as err:
        raise ValueError(f"{path.relative_to(HERE.parent.parent)}: {err}") from err
    return read
