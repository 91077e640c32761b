"""Netlink messages as bytes: headers, attributes, one request and its answers. For what pyroute2 is too slow or does not know."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

NETLINK_NETFILTER = 12  # linux/netlink.h
ERROR, DONE = 2, 3
REQUEST, ACK, DUMP, CREATE = 0x1, 0x4, 0x300, 0x400
NESTED = 0x8000
_KIND = 0x3FFF  # of an attribute's type; the two bits above are flags
_ADD_MEMBERSHIP, _SOL_NETLINK = 1, 270
_RCVBUFFORCE = 33
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_ATTRIBUTE = struct.Struct("=HH")
_BUFFER = 1 << 18
_TIMEOUT_S = 5.0


class Message(NamedTuple):
    """port: of whose request caused it, 0 for the kernel itself."""

    kind: int
    port: int
    body: memoryview


def messages(data: bytes) -> Iterator[Message]:
    """What one datagram holds."""
    view, at = memoryview(data), 0
    while at + _HEADER.size <= len(view):
        length, kind, _, _, port = _HEADER.unpack_from(view, at)
        if length < _HEADER.size:
            return
        yield Message(kind, port, view[at + _HEADER.size : at + length])
        at += (length + 3) & ~3


def attributes(body: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(type, value) of the attributes that body is made of."""
    at = 0
    while at + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _KIND, body[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3


def message(kind: int, flags: int, body: bytes, sequence: int = 0) -> bytes:
    """One message as it is sent."""
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, sequence, 0) + body


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def nested(kind: int, *inner: bytes) -> bytes:
    """An attribute that is made of attributes."""
    return attribute(kind | NESTED, b"".join(inner))


def opened(protocol: int, groups: tuple[int, ...] = (), *, buffer: int = 0) -> socket.socket:
    """A socket that hears of groups (numbers, not bits), with a receive buffer of that many bytes where the kernel grants it.

    The caller closes it. Raises OSError."""
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    try:
        made.settimeout(_TIMEOUT_S)
        made.bind((0, 0))
        if buffer:
            try:
                made.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, buffer)
            except PermissionError:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        for group in groups:
            made.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
    except BaseException:
        made.close()
        raise
    return made


def asked(netlink: socket.socket, request: bytes) -> Iterator[Message]:
    """What answers request, up to the acknowledgement or the end of the dump. Raises OSError."""
    netlink.send(request)
    while True:
        for answer in messages(netlink.recv(_BUFFER)):
            if answer.kind == DONE:
                return
            if answer.kind == ERROR:
                (code,) = struct.unpack_from("=i", answer.body)
                if code == 0:
                    return
                raise OSError(-code, f"{errno.errorcode.get(-code, 'unknown')}: {os.strerror(-code)}")
            yield answer


def text(value: memoryview) -> str:
    """A string attribute."""
    return bytes(value).rstrip(b"\0").decode("utf-8", "replace")
