"""The head of an HTTP/1 request, read strictly (RFC 9112): what two servers might read differently is refused."""

from __future__ import annotations

import re

import msgspec

from pellucid_proxy.sniff.names import ABSENT, INVALID, NotAName, domain

MAX_HEAD = 16384
"""Bytes of the longest request head, its empty line included; nginx, Apache and Node stop at 8 to 32 KiB."""

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
# No space before the colon, no folding, no control bytes (§5.1, §5.2).
FIELD = TOKEN + rb"++:[\t\x20-\x7e\x80-\xff]*+\r\n"
HEAD = re.compile(
    rb"(" + TOKEN + rb"{1,32}+) ([^\x00-\x20\x7f]++) HTTP/1\.([01])\r\n"  # the target may be raw UTF-8: clients send it
    rb"((?:" + FIELD + rb")*+)\r\n"
)
ABSOLUTE = re.compile(rb"[A-Za-z][A-Za-z0-9+.\-]*+://([^/?#]*+)")
AUTHORITY = re.compile(rb"(\[[0-9A-Fa-f:.]++\]|[^\x00-\x20\x7f\[\]:@/?#\\]*+)(?::([0-9]{0,5}))?")


class RequestHead(msgspec.Struct, frozen=True, gc=False):
    """One request head.

    name: the domain it asks for (§3.3: the authority of an absolute or CONNECT target, else Host), or why there is none.
    mismatch: target and Host name different hosts (ports are not compared), or what stands there can be no host.
    minor: of HTTP/1.minor, 0 or 1. length: bytes of the head, its empty line included.
    fields_at: where its first field line begins; the last one ends at length - 2.
    """

    method: bytes
    name: str | NotAName
    mismatch: bool
    minor: int
    length: int
    fields_at: int


def request_head(data: bytes, limit: int = MAX_HEAD) -> RequestHead | None:
    """Read the HTTP/1 request head at the start of data, of at most limit bytes.

    Returns it, or None if more bytes are needed. Raises ValueError if it can never become one that is safe to believe:
    a bare CR or LF, folding, whitespace around a field's name, control bytes, two Hosts, an authority with userinfo.
    A missing Host is no error here: the name is then ABSENT.
    """
    end = data.find(b"\r\n\r\n", 0, limit)
    if end < 0:
        if len(data) >= limit:
            raise ValueError(f"no end of the request head within {limit} bytes")
        if _has_bare_line_end(data):
            raise ValueError("a bare CR or LF in the request head")
        return None
    length = end + 4
    head = HEAD.fullmatch(data, 0, length)
    if head is None:
        raise ValueError("not a well-formed HTTP/1 request head")
    method, target = head.group(1, 2)
    fields_at = head.start(4)
    name, mismatch = _name(method, target, _host(data[fields_at - 2 : length - 2]))
    return RequestHead(method, name, mismatch, data[fields_at - 3] - 48, length, fields_at)


def field_lines(data: bytes, head: RequestHead) -> list[tuple[bytes, bytes]]:
    """The fields of a head that was read from data: names in lower case, values without the space around them."""
    block = data[head.fields_at : head.length - 4]
    lines = [line.partition(b":") for line in block.split(b"\r\n")] if block else []
    return [(name.lower(), value.strip(b" \t")) for name, _, value in lines]


def _has_bare_line_end(data: bytes) -> bool:
    """A CR at the very end may yet be followed by its LF."""
    pairs = data.count(b"\r\n")
    return data.count(b"\n") != pairs or data.count(b"\r") - data.endswith(b"\r") != pairs


def _host(lines: bytes) -> bytes | None:
    """The value of the one Host field; None if there is none. Every line begins after CR LF."""
    folded = lines.lower()
    at = folded.find(b"\r\nhost:")
    if at < 0:
        return None
    if folded.find(b"\r\nhost:", at + 7) >= 0:
        raise ValueError("two Host fields")
    at += 7
    end = lines.find(b"\r\n", at)
    return (lines[at:end] if end >= 0 else lines[at:]).strip(b" \t")


def _name(method: bytes, target: bytes, host: bytes | None) -> tuple[str | NotAName, bool]:
    """The name asked for, and whether target and Host disagree or cannot be names. RFC 9112 §3.2."""
    asked: bytes | None = None
    if method == b"CONNECT":
        asked = _authority(target)
        if not asked:
            raise ValueError("CONNECT without the host to connect to")
    elif not (target.startswith(b"/") or target == b"*"):
        absolute = ABSOLUTE.match(target)
        if absolute is None:
            raise ValueError("a request target of no known form")
        asked = _authority(absolute.group(1))
        if not asked:
            raise ValueError("an absolute request target without a host")
    said = None if host is None else _authority(host)
    if asked is None:
        name = ABSENT if said is None else domain(said)
        return name, name is INVALID
    name = domain(asked)
    if said is None:
        return name, name is INVALID
    same = domain(said) == name if isinstance(name, str) else said.lower() == asked.lower()
    return name, not same or name is INVALID


def _authority(value: bytes) -> bytes:
    """The host of host[:port]. ValueError for userinfo, a bad port, brackets around anything but an address."""
    parts = AUTHORITY.fullmatch(value)
    if parts is None or int(parts.group(2) or 0) > 65535:
        raise ValueError("not a host with an optional port")
    return parts.group(1).strip(b"[]")
