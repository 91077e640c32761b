"""ClientHellos made by hand, each part replaceable by a wrong one."""

from __future__ import annotations

import ssl
from collections.abc import Iterable

SERVER_NAME, ALPN, PADDING, SUPPORTED_VERSIONS, ECH, GREASE = 0, 16, 21, 43, 0xFE0D, 0x3A3A


def u8(value: bytes) -> bytes:
    return bytes([len(value)]) + value


def u16(value: bytes) -> bytes:
    return len(value).to_bytes(2, "big") + value


def extension(kind: int, value: bytes) -> bytes:
    return kind.to_bytes(2, "big") + u16(value)


def server_name(*names: bytes, kind: int = 0) -> bytes:
    return extension(SERVER_NAME, u16(b"".join(bytes([kind]) + u16(name) for name in names)))


def alpn(*protocols: bytes) -> bytes:
    return extension(ALPN, u16(b"".join(map(u8, protocols))))


def handshake(
    *extensions: bytes,
    version: bytes = b"\x03\x03",
    session_id: bytes = bytes(32),
    ciphers: bytes = b"\x13\x01\x13\x02",
    compression: bytes = b"\0",
    rest: bytes | None = None,
    kind: int = 1,
) -> bytes:
    """The handshake message; rest stands in the place of the extensions and their length."""
    body = version + bytes(range(32)) + u8(session_id) + u16(ciphers) + u8(compression)
    body += u16(b"".join(extensions)) if rest is None else rest
    return bytes([kind]) + len(body).to_bytes(3, "big") + body


def record(payload: bytes, version: bytes = b"\x03\x01", kind: int = 22) -> bytes:
    return bytes([kind]) + version + u16(payload)


def records(message: bytes, sizes: Iterable[int]) -> bytes:
    """The message cut into records of these sizes, and one with what is left."""
    out = b""
    for size in sizes:
        if message[:size]:
            out += record(message[:size])
        message = message[size:]
    return out + (record(message) if message else b"")


def hello(name: bytes = b"example.com", *more: bytes) -> bytes:
    return record(handshake(server_name(name), *more))


def openssl_hello(name: str | None, protocols: tuple[str, ...] = (), oldest: bool = False) -> bytes:
    """What Python's own ssl module sends first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    if oldest:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    if protocols:
        context.set_alpn_protocols(list(protocols))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname=name)
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise AssertionError("a handshake without a server")
