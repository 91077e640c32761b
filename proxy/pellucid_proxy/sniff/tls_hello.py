"""The ClientHello at the start of a TLS connection (RFC 8446 §4.1.2 and §5.1, RFC 6066 §3, RFC 7301 §3.1).

Strict where a server and this parser might otherwise read different names: every length must fit exactly.
"""

from __future__ import annotations

import cython
import msgspec

from pellucid_proxy.sniff.names import ABSENT, NotAName, domain

MAX_HELLO = 16384
"""Bytes of the longest ClientHello that is read, its handshake header of 4 included."""

HANDSHAKE = cython.declare(cython.int, 22)
CLIENT_HELLO = cython.declare(cython.int, 1)
RECORD_HEADER = cython.declare(cython.int, 5)
HANDSHAKE_HEADER = cython.declare(cython.int, 4)
LIMIT = cython.declare(cython.int, MAX_HELLO)  # also the longest plaintext record, RFC 8446 §5.1
MAX_SESSION_ID = cython.declare(cython.int, 32)
SERVER_NAME = cython.declare(cython.int, 0)
ALPN = cython.declare(cython.int, 16)
ENCRYPTED_CLIENT_HELLO = cython.declare(cython.int, 0xFE0D)

# Nearly every hello has one of these lists, so that nothing needs to be taken apart.
USUAL_ALPN = {
    b"\x02h2\x08http/1.1": ("h2", "http/1.1"),
    b"\x08http/1.1": ("http/1.1",),
    b"\x02h2": ("h2",),
}


class Hello(msgspec.Struct, frozen=True, gc=False):
    """What a ClientHello asks for.

    name: the SNI as an A-label in lower case without trailing dot, or why there is none.
    alpn: protocols in the client's order, GREASE left out (RFC 8701); bytes read as Latin-1.
    encrypted: it carries encrypted_client_hello, real or GREASE (nobody can tell), so that name may be the outer one only.
    """

    name: str | NotAName
    alpn: tuple[str, ...]
    encrypted: bool


def client_hello(data: bytes) -> Hello | None:
    """Read the ClientHello at the start of data (TLS records, possibly partial; at most 16 KiB).

    Returns it, or None if more bytes are needed. Raises ValueError if it can never become one. What follows the last
    record of the hello (early data) is not looked at.
    """
    size: cython.Py_ssize_t = len(data)
    length: cython.Py_ssize_t
    if size > RECORD_HEADER + HANDSHAKE_HEADER:
        length = u16(data, 3)
        if u24(data, 6) + HANDSHAKE_HEADER == length:  # one record holds it all, as from nearly every client
            check_record(data, 0, size)
            if data[5] != CLIENT_HELLO:
                raise ValueError("TLS handshake does not begin with a ClientHello")
            if size < RECORD_HEADER + length:
                return None
            return read_hello(data, RECORD_HEADER + HANDSHAKE_HEADER, RECORD_HEADER + length)
    return reassemble(data)


@cython.cfunc
def reassemble(data: bytes):
    """The hello out of any number of records. ValueError as soon as the records so far cannot hold one."""
    size: cython.Py_ssize_t = len(data)
    at: cython.Py_ssize_t = 0
    length: cython.Py_ssize_t
    whole: cython.Py_ssize_t = LIMIT
    claimed: cython.Py_ssize_t = 0
    message = bytearray()
    while at < size:
        check_record(data, at, size)
        if at + RECORD_HEADER > size:
            return None
        length = u16(data, at + 3)
        at += RECORD_HEADER
        message += data[at : at + length]
        at += length
        claimed += length
        if message and message[0] != CLIENT_HELLO:
            raise ValueError("TLS handshake does not begin with a ClientHello")
        if len(message) >= HANDSHAKE_HEADER:
            whole = HANDSHAKE_HEADER + u24(bytes(message[:HANDSHAKE_HEADER]), 1)
            if whole > LIMIT:
                raise ValueError(f"ClientHello has {whole} bytes, more than {MAX_HELLO}")
            if claimed > whole:
                raise ValueError("bytes follow the ClientHello in its record")
            if len(message) == whole:
                return read_hello(bytes(message), HANDSHAKE_HEADER, whole)
    return None


@cython.cfunc
@cython.exceptval(-1)
def check_record(data: bytes, at: cython.Py_ssize_t, size: cython.Py_ssize_t) -> cython.int:
    """Raise ValueError unless the record header at that place, possibly partial, may begin or continue a hello.

    The minor version means nothing (RFC 8446 §5.1). An empty handshake record is forbidden there too.
    """
    length: cython.int
    if data[at] != HANDSHAKE:
        raise ValueError("another record than handshake before the end of the ClientHello")
    if at + 1 < size and data[at + 1] != 3:
        raise ValueError("not a TLS record version")
    if at + RECORD_HEADER <= size:
        length = u16(data, at + 3)
        if length == 0 or length > LIMIT:
            raise ValueError(f"TLS record of {length} bytes: 1 to 16384 are allowed")
    return 0


@cython.cfunc
def read_hello(data: bytes, at: cython.Py_ssize_t, end: cython.Py_ssize_t):
    """The hello whose body is data[at:end]."""
    kind: cython.int
    length: cython.Py_ssize_t
    named: cython.bint = False
    negotiates: cython.bint = False
    encrypted: cython.bint = False
    name = ABSENT
    alpn = ()

    at += 35  # version 2, random 32, length of the session id 1
    if at > end or data[at - 35] != 3:
        raise ValueError("ClientHello: no version and random of TLS")
    length = data[at - 1]
    at += length + 2  # session id, length of the cipher suites
    if length > MAX_SESSION_ID or at > end:
        raise ValueError("ClientHello: session id too long")
    length = u16(data, at - 2)
    at += length + 1  # cipher suites, length of the compression methods
    if length < 2 or length % 2 or at > end:
        raise ValueError("ClientHello: bad list of cipher suites")
    length = data[at - 1]
    at += length
    if length < 1 or at > end:
        raise ValueError("ClientHello: bad list of compression methods")
    if at == end:  # TLS 1.2 and older may have no extensions
        return Hello(name, alpn, False)
    at += 2
    if at > end or at + u16(data, at - 2) != end:
        raise ValueError("ClientHello: extensions do not end where it ends")

    while at < end:
        at += 4
        if at > end:
            raise ValueError("ClientHello: extension cut short")
        kind = u16(data, at - 4)
        length = u16(data, at - 2)
        if at + length > end:
            raise ValueError("ClientHello: extension longer than the hello")
        if kind == SERVER_NAME:
            if named:
                raise ValueError("ClientHello: two server_name extensions")
            named = True
            name = read_server_name(data, at, length)
        elif kind == ALPN:
            if negotiates:
                raise ValueError("ClientHello: two ALPN extensions")
            negotiates = True
            alpn = read_alpn(data, at, length)
        elif kind == ENCRYPTED_CLIENT_HELLO:
            encrypted = True
        at += length
    return Hello(name, alpn, encrypted)


@cython.cfunc
def read_server_name(data: bytes, at: cython.Py_ssize_t, length: cython.Py_ssize_t):
    """The one host_name of a server_name extension. RFC 6066 §3 knows no other type, and one name of a type."""
    if length < 6 or u16(data, at) != length - 2 or data[at + 2] != 0 or u16(data, at + 3) != length - 5:
        raise ValueError("ClientHello: server_name is not one host_name")
    return domain(data[at + 5 : at + length])


@cython.cfunc
def read_alpn(data: bytes, at: cython.Py_ssize_t, length: cython.Py_ssize_t):
    """The protocols of an ALPN extension."""
    end: cython.Py_ssize_t = at + length
    size: cython.Py_ssize_t
    if length < 4 or u16(data, at) != length - 2:
        raise ValueError("ClientHello: bad list of ALPN protocols")
    at += 2
    usual = USUAL_ALPN.get(data[at:end])
    if usual is not None:
        return usual
    protocols = []
    while at < end:
        size = data[at]
        at += 1
        if size == 0 or at + size > end:
            raise ValueError("ClientHello: bad list of ALPN protocols")
        protocol = data[at : at + size]
        if not (size == 2 and protocol[0] == protocol[1] and protocol[0] & 0x0F == 0x0A):
            protocols.append(protocol.decode("latin-1"))
        at += size
    return tuple(protocols)


@cython.cfunc
@cython.exceptval(-1)
def u16(data: bytes, at: cython.Py_ssize_t) -> cython.int:
    return data[at] << 8 | data[at + 1]


@cython.cfunc
@cython.exceptval(-1)
def u24(data: bytes, at: cython.Py_ssize_t) -> cython.int:
    return data[at] << 16 | data[at + 1] << 8 | data[at + 2]
