"""Handshakes with upstream proxies, fed whole and cut at every byte."""

from __future__ import annotations

import pytest

from pellucid_proxy.session.via import MAX_HEAD, handshake


def talk(protocol: str, host: str, answer: bytes, cut: int) -> tuple[bytes, bytes | None]:
    """All that was sent after the greeting, and what came behind the handshake (None: not done), for an answer in two pieces."""
    way = handshake(protocol, host, 443)
    way.greeting()
    sent, rest = b"", None
    for piece in (answer[:cut], answer[cut:]):
        if rest is None:
            more, rest = way.feed(piece)
            sent += more
        else:
            rest += piece
    return sent, rest


CONNECTED = b"HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\n"


@pytest.mark.parametrize("cut", range(len(CONNECTED) + 3))
def test_connect_is_done_at_the_end_of_the_head_and_the_rest_is_the_server_s(cut: int) -> None:
    assert talk("HTTPConnect", "example.com", CONNECTED + b"220", cut) == (b"", b"220")


@pytest.mark.parametrize(
    ("host", "authority"),
    [("example.com", "example.com:443"), ("192.0.2.1", "192.0.2.1:443"), ("2001:db8::1", "[2001:db8::1]:443")],
)
def test_connect_names_the_authority(host: str, authority: str) -> None:
    greeting = handshake("HTTPConnect", host, 443).greeting().decode()
    assert greeting == f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 403 Forbidden\r\n\r\n",
        b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n",
        b"HTTP/1.1 2000 Long\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"x" * (MAX_HEAD + 1),
    ],
)
def test_connect_refused_or_nonsense_is_an_error(answer: bytes) -> None:
    way = handshake("HTTPConnect", "example.com", 443)
    with pytest.raises(ValueError, match="upstream proxy"):
        way.feed(answer)


SOCKS_OPEN = {
    "ipv4": b"\x05\x00" + b"\x05\x00\x00\x01\xc0\x00\x02\x01\x04\x38",
    "name": b"\x05\x00" + b"\x05\x00\x00\x03\x04host\x04\x38",
    "ipv6": b"\x05\x00" + b"\x05\x00\x00\x04" + bytes(16) + b"\x04\x38",
}


@pytest.mark.parametrize("kind", SOCKS_OPEN)
def test_socks_is_done_at_the_end_of_its_reply(kind: str) -> None:
    """A client of SOCKS5 sends its request only when the method is chosen, so its pieces come after that."""
    whole = SOCKS_OPEN[kind]
    for cut in range(2, len(whole) + 1):
        way = handshake("SOCKS5", "example.com", 443)
        assert way.greeting() == b"\x05\x01\x00"
        request, rest = way.feed(whole[:2])
        assert (request, rest) == (b"\x05\x01\x00\x03\x0bexample.com\x01\xbb", None)
        _, rest = way.feed(whole[2:cut])
        if rest is None:
            _, rest = way.feed(whole[cut:] + b"220")
            assert rest == b"220"
        else:
            assert (cut, rest) == (len(whole), b"")


@pytest.mark.parametrize(
    ("host", "sent"),
    [
        ("192.0.2.1", b"\x05\x01\x00\x01\xc0\x00\x02\x01\x01\xbb"),
        ("::1", b"\x05\x01\x00\x04" + bytes(15) + b"\x01\x01\xbb"),
    ],
)
def test_socks_sends_addresses_as_such(host: str, sent: bytes) -> None:
    way = handshake("SOCKS5", host, 443)
    assert way.feed(b"\x05\x00") == (sent, None)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (b"\x05\xff", b""),
        (b"\x05\x02", b""),
        (b"HT", b""),
        (b"\x05\x00", b"\x05\x02\x00\x01\x00"),
        (b"\x05\x00", b"\x04\x00\x00\x01\x00"),
        (b"\x05\x00", b"\x05\x00\x00\x09\x00"),
    ],
)
def test_socks_refused_or_nonsense_is_an_error(first: bytes, second: bytes) -> None:
    way = handshake("SOCKS5", "example.com", 443)
    answers = [first, second] if second else [first]
    for answer in answers[:-1]:
        way.feed(answer)
    with pytest.raises(ValueError, match="upstream proxy"):
        way.feed(answers[-1])


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(ValueError, match="SOCKS4 is no protocol of an upstream proxy"):
        handshake("SOCKS4", "example.com", 443)
