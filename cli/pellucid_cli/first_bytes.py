"""What a client sends first, made by what clients use: a ClientHello by OpenSSL, a request as HTTP/1.1 writes it."""

from __future__ import annotations

import ssl
from urllib.parse import urlsplit

from pellucid_policy.domains import canonical

METHOD_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ-")


def hello(name: str) -> bytes:
    """The ClientHello for name. Raises ValueError, saying why, for what is no name."""
    try:
        asked = canonical(name)
    except ValueError as err:
        raise ValueError(f"{name or 'the name'} {err}") from err
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    sent = ssl.MemoryBIO()
    try:
        context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname=asked).do_handshake()
    except ssl.SSLWantReadError:
        pass  # for the server's answer
    return sent.read()


def request_bytes(text: str) -> bytes:
    """The first bytes of METHOD URL: a request in HTTP/1.1, or a ClientHello where the URL is of https. Raises ValueError."""
    method, _, url = text.strip().partition(" ")
    parts = urlsplit(url.strip())
    if (
        not method
        or not METHOD_CHARACTERS.issuperset(method)
        or parts.scheme not in ("http", "https")
        or not parts.hostname
    ):
        raise ValueError(f"{text!r} is no request; write it as 'GET http://example.com/path'")
    if parts.scheme == "https":
        return hello(parts.hostname)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not (target.isascii() and target.isprintable() and " " not in target):
        raise ValueError(f"{target!r} cannot stand in a request; escape it as %XX")
    return f"{method} {target} HTTP/1.1\r\nHost: {parts.netloc.rpartition('@')[2]}\r\n\r\n".encode("latin-1")
