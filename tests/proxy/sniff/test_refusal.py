from __future__ import annotations

import http.client
import io
import ssl

import pytest

from pellucid_proxy.sniff.first_bytes import PROTOCOLS
from pellucid_proxy.sniff.refusal import refusal


class Received:
    """A socket that has received something."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self.data)


@pytest.mark.parametrize(
    ("status", "body"), [(403, "not from here"), (421, ""), (599, "ünïcode\r\n\r\n"), (403, "\ud800")]
)
def test_http_gets_a_whole_response_that_ends_the_connection(status: int, body: str) -> None:
    data = refusal("HTTP/1", status, body)
    assert data is not None
    response = http.client.HTTPResponse(Received(data))  # type: ignore[arg-type]
    response.begin()
    assert response.status == status
    assert response.getheader("Connection") == "close"
    assert response.getheader("Content-Type") == "text/plain; charset=utf-8"
    assert response.read() == body.encode("utf-8", "replace")
    assert response.will_close


def test_tls_gets_an_alert_that_openssl_understands() -> None:
    data = refusal("TLS", 403, "not seen")
    assert data is not None
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="example.com")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    incoming.write(data)
    with pytest.raises(ssl.SSLError, match=r"(?i)access.denied"):
        client.do_handshake()


@pytest.mark.parametrize("protocol", [name for name in PROTOCOLS if name not in {"TLS", "HTTP/1"}])
def test_nothing_can_be_said_in_other_protocols(protocol: str) -> None:
    assert refusal(protocol, 403, "no") is None
