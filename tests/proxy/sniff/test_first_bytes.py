from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid_proxy.sniff.first_bytes import MAX_FIRST_BYTES, METHODS, PROTOCOLS, Sniffed, give_up, sniff

from . import hellos

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
UNKNOWN = Sniffed("Unknown")
BROKEN_TLS = Sniffed("TLS", mismatch=True)
BROKEN_HTTP = Sniffed("HTTP/1", mismatch=True)

ROWS = {
    "a TLS hello": (hellos.hello(b"EXAMPLE.com."), Sniffed("TLS", "example.com")),
    "a TLS hello of everything": (
        hellos.hello(b"example.com", hellos.alpn(b"h2"), hellos.extension(hellos.ECH, b"x")),
        Sniffed("TLS", "example.com", True, False, ("h2",)),
    ),
    "a TLS hello in pieces": (hellos.records(hellos.handshake(), [1] * 9), Sniffed("TLS")),
    "a TLS hello for an address": (hellos.hello(b"192.0.2.1"), Sniffed("TLS")),
    "a TLS hello for raw UTF-8": (hellos.hello("bücher.example".encode()), BROKEN_TLS),
    "a TLS hello with two names": (hellos.record(hellos.handshake(hellos.server_name(b"a", b"b"))), BROKEN_TLS),
    "a TLS record that is too long": (b"\x16\x03\x01\xff\xff", BROKEN_TLS),
    "another version's record": (b"\x16\x02", UNKNOWN),
    "a TLS alert": (b"\x15\x03\x01\0\2\2\x28", UNKNOWN),
    "HTTP": (b"GET / HTTP/1.1\r\nHost: Example.com\r\n\r\n", Sniffed("HTTP/1", "example.com")),
    "HTTP without Host": (b"GET / HTTP/1.0\r\n\r\n", Sniffed("HTTP/1")),
    "HTTP for an address": (b"GET / HTTP/1.1\r\nHost: 192.0.2.1:80\r\n\r\n", Sniffed("HTTP/1")),
    "HTTP with two Hosts": (b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", BROKEN_HTTP),
    "HTTP of two names": (
        b"GET http://evil.example/ HTTP/1.1\r\nHost: example.com\r\n\r\n",
        Sniffed("HTTP/1", "evil.example", mismatch=True),
    ),
    "HTTP with bare LF": (b"GET / HTTP/1.1\n", BROKEN_HTTP),
    "HTTP/0.9": (b"GET /\r\n\r\n", BROKEN_HTTP),
    "HTTP with a method of its own": (
        b"FROB / HTTP/1.1\r\nHost: example.com\r\n\r\n",
        Sniffed("HTTP/1", "example.com"),
    ),
    "HTTP in lower case": (b"get / HTTP/1.1\r\nHost: example.com\r\n\r\n", Sniffed("HTTP/1", "example.com")),
    "HTTP after empty lines": (b"\r\n\r\nGET / HTTP/1.1\r\nHost: example.com\r\n\r\n", BROKEN_HTTP),
    "HTTP after space": (b" GET / HTTP/1.1\r\nHost: example.com\r\n\r\n", BROKEN_HTTP),
    "HTTP with a tab": (b"GET\t/ HTTP/1.1\r\nHost: example.com\r\n\r\n", BROKEN_HTTP),
    "HTTP in odd case": (b"FROB / http/1.1 \r\nHost: example.com\r\n\r\n", BROKEN_HTTP),
    "an HTTP/2 method in HTTP/1": (b"PRI * HTTP/1.1\r\nHost: example.com\r\n\r\n", Sniffed("HTTP/1", "example.com")),
    "HTTP/2": (PREFACE, Sniffed("HTTP/2")),
    "a broken HTTP/2 preface": (PREFACE[:18] + b"XX\r\n\r\n", BROKEN_HTTP),
    "SSLv2": (b"\x80\x2e\x01\x00\x02", Sniffed("SSLv2")),
    "an SSLv2 hello of SSL 3.0": (b"\x80\x2e\x01\x03\x00", Sniffed("SSLv2")),
    "not quite SSLv2": (b"\x80\x2e\x01\x00\x03", UNKNOWN),
    "PostgreSQL for TLS": (bytes.fromhex("0000000804d2162f"), Sniffed("PostgresSSLRequest")),
    "PostgreSQL for GSS": (bytes.fromhex("0000000804d21630"), Sniffed("PostgresGSSENCRequest")),
    "PostgreSQL, cancel": (bytes.fromhex("0000001004d2162e"), Sniffed("Postgres")),
    "PostgreSQL 3.0": (bytes.fromhex("0000002900030000") + b"user\0me\0", Sniffed("Postgres")),
    "PostgreSQL 3.2": (bytes.fromhex("0000002900030002") + b"user\0me\0", Sniffed("Postgres")),
    "not PostgreSQL": (bytes.fromhex("0000002900040000"), UNKNOWN),
    "too long for PostgreSQL": (bytes.fromhex("00002800"), UNKNOWN),
    "too short for PostgreSQL": (bytes.fromhex("0000000700030000"), UNKNOWN),
    "SSH": (b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n", Sniffed("SSH")),
    "SMTP": (b"EHLO client.example\r\n", Sniffed("SMTP")),
    "SMTP in lower case": (b"helo client.example\r\n", Sniffed("SMTP")),
    "IMAP": (b"a001 STARTTLS\r\n", Sniffed("IMAP")),
    "POP3": (b"STLS\r\n", Sniffed("POP3")),
    "FTP": (b"AUTH TLS\r\n", Sniffed("FTP")),
    "another line": (b"PING\r\n", UNKNOWN),
    "another line of two words": (b"NICK someone\n", UNKNOWN),
    "an empty method": (b"\r\n\r\nxyz\n", UNKNOWN),
    "Redis": (b"*1\r\n$4\r\nPING\r\n", UNKNOWN),
    "JSON": (b"{", UNKNOWN),
    "binary": (b"\x01", UNKNOWN),
    "high binary": (b"\xfe\x01\x02", UNKNOWN),
    "a text that turns binary": (b"abc\x01", UNKNOWN),
    "a word too long for a method": (b"a" * 33, UNKNOWN),
    "SOCKS5": (b"\x05\x01\x00", UNKNOWN),
}


@pytest.mark.parametrize(("data", "value"), ROWS.values(), ids=ROWS)
def test_says_what_begins(data: bytes, value: Sniffed) -> None:
    assert sniff(data) == value
    assert value.protocol in PROTOCOLS


@pytest.mark.parametrize("data", [data for data, _ in ROWS.values()], ids=ROWS)
def test_waits_on_a_prefix_and_then_never_changes_its_mind(data: bytes) -> None:
    agree_on_prefixes(data)
    agree_on_prefixes(data + b"\r\n\r\nmore\0")


def agree_on_prefixes(data: bytes) -> None:
    """Every prefix says nothing, or what the whole says."""
    whole = sniff(data)
    said = False
    for cut in range(len(data) + 1):
        answer = sniff(data[:cut])
        assert answer is None or answer == whole
        assert not (said and answer is None)
        said = answer is not None


@pytest.mark.parametrize("name", ["example.com", None])
def test_what_openssl_sends_is_one_answer_at_its_last_byte(name: str | None) -> None:
    data = hellos.openssl_hello(name, ("h2", "http/1.1"))
    assert all(sniff(data[:cut]) is None for cut in range(len(data)))
    assert sniff(data) == Sniffed("TLS", name, alpn=("h2", "http/1.1"))


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"GET / HTTP/1.1\r\nX: " + b"x" * MAX_FIRST_BYTES, BROKEN_HTTP),
        (b"FROB /" + b"x" * MAX_FIRST_BYTES, BROKEN_HTTP),
        (b"\r\n" * MAX_FIRST_BYTES, BROKEN_HTTP),
        (hellos.records(hellos.handshake(hellos.extension(21, bytes(9000))), [1] * 9000), BROKEN_TLS),
    ],
    ids=["a head without end", "a line without end", "empty lines without end", "a hello in too many records"],
)
def test_decides_when_the_limit_is_reached(data: bytes, value: Sniffed) -> None:
    assert sniff(data) == value == sniff(data[:MAX_FIRST_BYTES])
    assert sniff(data[: MAX_FIRST_BYTES // 2]) is None


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"\x16", BROKEN_TLS),
        (hellos.hello()[:-1], BROKEN_TLS),
        (b"G", BROKEN_HTTP),
        (b"GET / HTTP/1.1\r\nHost: example.com\r\n", BROKEN_HTTP),
        (b"FROB /", BROKEN_HTTP),
        (b"\r\n", BROKEN_HTTP),
        (b"\r\nFR", BROKEN_HTTP),
        (b"ruok", UNKNOWN),
        (b"\x80", UNKNOWN),
        (b"\0\0", UNKNOWN),
        (bytes.fromhex("0000000804d2"), UNKNOWN),
        (b"", UNKNOWN),
    ],
)
def test_a_hello_or_request_that_stops_in_the_middle_is_a_mismatch(data: bytes, value: Sniffed) -> None:
    assert sniff(data) is None
    assert give_up(data) == value


BEGINNINGS = [
    b"",
    b"\x16\x03",
    b"\0\0\0",
    b"\x80",
    b"SSH-",
    b"\r\n",
    b"FROB / ",
    *[method + b" " for method in METHODS],
]


@given(
    st.sampled_from(BEGINNINGS), st.binary(max_size=80), st.sampled_from([b"", b"\n", b" HTTP/1.1\r\n", b"\r\n\r\n"])
)
def test_anything_gets_one_answer_however_it_is_cut(before: bytes, middle: bytes, after: bytes) -> None:
    agree_on_prefixes(before + middle + after + middle)


@given(st.text("GETPRI*/ HTTP.012\r\n\t:ostah", max_size=60))
def test_text_like_http_gets_one_answer_however_it_is_cut(text: str) -> None:
    agree_on_prefixes(text.encode())
    give_up(text.encode())


@given(st.binary(max_size=60))
def test_giving_up_never_raises(data: bytes) -> None:
    assert give_up(data).protocol in PROTOCOLS
