"""What is known of a flow when it is decided."""

from __future__ import annotations

import enum

import msgspec

TCP, UDP, ICMP, ICMPV6, SCTP = 6, 17, 1, 58, 132
"""Protocol numbers (IANA) that a rule can name; ICMP stands for both families in a rule."""


class Unnamed(enum.Enum):
    """Why a flow has no name. Unknown yet and known to be absent are different facts."""

    UNKNOWN = "Unknown"  # the bytes that would carry it have not come
    ABSENT = "Absent"  # it will never come


UNKNOWN = Unnamed.UNKNOWN
ABSENT = Unnamed.ABSENT


class Facts(msgspec.Struct, frozen=True, gc=False):
    """One flow as far as it is known.

    address: destination, packed, 4 or 16 bytes; never an IPv4-mapped IPv6 address.
    port: destination port, 0 where the protocol has none.
    name: the domain the client asked for (SNI or Host), as an A-label in lower case without trailing dot, or why there is none.
    encrypted: the ClientHello carries encrypted_client_hello, so that name is only the outer one.
    mismatch: the names of the flow disagree, or its first bytes claim a protocol and break it: no name in them can be trusted.
    """

    address: bytes
    port: int
    protocol: int = TCP
    name: str | Unnamed = UNKNOWN
    encrypted: bool = False
    mismatch: bool = False
