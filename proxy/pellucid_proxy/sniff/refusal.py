"""What a refused client is told, in the protocol that it began."""

from __future__ import annotations

import http

from pellucid_proxy.sniff.first_bytes import HTTP1, TLS

ACCESS_DENIED = b"\x15\x03\x03\x00\x02\x02\x31"
"""A fatal access_denied alert (49) in a plaintext record, as any version takes it before the ServerHello. RFC 8446 §6.2."""

_PHRASES = {status.value: status.phrase for status in http.HTTPStatus}


def refusal(protocol: str, status: int, body: str) -> bytes | None:
    """The bytes that refuse a flow of that protocol (Sniffed.protocol), after which the connection is to be closed.

    None where nothing can be said, which leaves a reset. status (400-599) and body are for HTTP/1; body is plain text.
    """
    if protocol == TLS:
        return ACCESS_DENIED
    if protocol == HTTP1:
        return _response(status, body)
    return None


def _response(status: int, body: str) -> bytes:
    """A whole HTTP/1.1 response that no browser takes for a page and no cache keeps."""
    content = body.encode("utf-8", "replace")
    head = (
        f"HTTP/1.1 {status} {_PHRASES.get(status, 'Refused')}\r\n"
        "Content-Type: text/plain; charset=utf-8\r\n"
        "X-Content-Type-Options: nosniff\r\n"
        "Cache-Control: no-store\r\n"
        f"Content-Length: {len(content)}\r\n"
        "Connection: close\r\n"
        "\r\n"
    )
    return head.encode("ascii") + content
