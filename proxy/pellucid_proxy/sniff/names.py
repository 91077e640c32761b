"""Host names as they stand in first bytes, made fit to be compared with a policy's domains."""

from __future__ import annotations

import enum
from functools import lru_cache

MAX_NAME = 253
MAX_LABEL = 63


class NotAName(enum.Enum):
    """Why first bytes have no domain name."""

    ABSENT = "Absent"  # there is none
    ADDRESS = "Address"  # an IP address literal stands in its place
    INVALID = "Invalid"  # something that no domain name can be stands in its place


# A member looked up in its enum costs a microsecond in Python 3.11.
ABSENT, ADDRESS, INVALID = NotAName.ABSENT, NotAName.ADDRESS, NotAName.INVALID

CACHED = 4096
"""Names whose answer is kept: clients ask for the same ones again and again."""


def _letters() -> bytes:
    table = bytearray(b"!" * 256)
    for legal in b"abcdefghijklmnopqrstuvwxyz0123456789-_.":
        table[legal] = legal
        table[bytes([legal]).upper()[0]] = legal
    return bytes(table)


# To lower case, and to "!" for what no host name contains. The underscore is in use, whatever RFC 1123 says.
LETTERS = _letters()
ADDRESS_BYTES = b"0123456789abcdefABCDEF:."


@lru_cache(CACHED)
def domain(raw: bytes) -> str | NotAName:
    """The domain name in lower case without its trailing dot, or why raw is none. Never raises.

    Non-ASCII is INVALID: U-labels have no place in SNI (RFC 6066 §3) or Host. A name whose last label is a number is an
    address, for that is what clients take it for (127.1, 0x7f000001; WHATWG URL, "ends in a number"). Equal names are one object as long as
    they are asked for.
    """
    if not raw:
        return ABSENT
    name = raw.translate(LETTERS)
    if b"!" in name:
        return ADDRESS if b":" in raw and not raw.translate(None, ADDRESS_BYTES) else INVALID
    if name.endswith(b"."):
        name = name[:-1]
    if not name or len(name) > MAX_NAME or name.startswith(b".") or name.endswith(b".") or b".." in name:
        return INVALID
    if len(name) > MAX_LABEL and max(map(len, name.split(b"."))) > MAX_LABEL:
        return INVALID
    last = name[name.rfind(b".") + 1 :]
    if last[:1].isdigit() and _is_number(last):
        return ADDRESS
    return name.decode("ascii")


def _is_number(label: bytes) -> bool:
    return label.isdigit() or (label.startswith(b"0x") and not label[2:].translate(None, b"0123456789abcdef"))
