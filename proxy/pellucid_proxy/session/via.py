"""The handshake with an upstream proxy, without I/O: HTTP CONNECT (RFC 9110 §9.3.6) and SOCKS5 without authentication (RFC 1928)."""

from __future__ import annotations

import ipaddress
import struct
from typing import Protocol

MAX_HEAD = 16384
"""Bytes of an answer to CONNECT; more is refused."""


class Handshake(Protocol):
    """greeting() is sent once connected; feed() takes what the proxy sends.

    feed returns (bytes to send, None) until the way is open, then (b"", what came behind the handshake).
    Raises ValueError if the proxy refuses or talks nonsense.
    """

    def greeting(self) -> bytes: ...

    def feed(self, data: bytes) -> tuple[bytes, bytes | None]: ...


def handshake(protocol: str, host: str, port: int) -> Handshake:
    """The handshake that asks for host (an A-label, or an IP address as text) and port. protocol: HTTPConnect or SOCKS5."""
    if protocol == "HTTPConnect":
        return HTTPConnect(host, port)
    if protocol == "SOCKS5":
        return SOCKS5(host, port)
    raise ValueError(f"{protocol} is no protocol of an upstream proxy (HTTPConnect, SOCKS5)")


class HTTPConnect:
    def __init__(self, host: str, port: int) -> None:
        self._authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._answer = b""

    def greeting(self) -> bytes:
        return f"CONNECT {self._authority} HTTP/1.1\r\nHost: {self._authority}\r\n\r\n".encode("ascii")

    def feed(self, data: bytes) -> tuple[bytes, bytes | None]:
        self._answer += data
        end = self._answer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._answer) > MAX_HEAD:
                raise ValueError("the upstream proxy's answer has no end")
            return b"", None
        status = self._answer.split(b"\r\n", 1)[0].split(b" ")
        if not status[0].startswith(b"HTTP/1.") or len(status) < 2 or len(status[1]) != 3 or not status[1].isdigit():
            raise ValueError("the upstream proxy does not answer in HTTP/1")
        if not status[1].startswith(b"2"):
            raise ValueError(f"the upstream proxy answers {status[1].decode('ascii')}")
        return b"", self._answer[end + 4 :]


class SOCKS5:
    def __init__(self, host: str, port: int) -> None:
        self._request = b"\x05\x01\x00" + _socks_address(host) + struct.pack("!H", port)
        self._answer = b""
        self._greeted = False

    def greeting(self) -> bytes:
        return b"\x05\x01\x00"  # version 5, one method: no authentication

    def feed(self, data: bytes) -> tuple[bytes, bytes | None]:
        self._answer += data
        if not self._greeted:
            if len(self._answer) < 2:
                return b"", None
            if self._answer[:2] != b"\x05\x00":
                raise ValueError("the upstream proxy wants authentication or is no SOCKS5 proxy")
            self._greeted = True
            self._answer = self._answer[2:]
            return self._request, None
        answer = self._answer
        if len(answer) < 5:
            return b"", None
        if answer[0] != 5 or answer[1] != 0:
            raise ValueError(f"the upstream proxy refuses (SOCKS5 reply {answer[1]})")
        lengths = {1: 4, 3: 1 + answer[4], 4: 16}
        if answer[3] not in lengths:
            raise ValueError(f"the upstream proxy answers with address type {answer[3]}")
        size = 4 + lengths[answer[3]] + 2
        return b"", answer[size:] if len(answer) >= size else None


def _socks_address(host: str) -> bytes:
    try:
        packed = ipaddress.ip_address(host).packed
    except ValueError:
        name = host.encode("ascii")
        return b"\x03" + bytes([len(name)]) + name
    return (b"\x01" if len(packed) == 4 else b"\x04") + packed
