from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid_proxy.sniff.names import NotAName
from pellucid_proxy.sniff.tls_hello import MAX_HELLO, Hello, client_hello

from . import hellos
from .hellos import alpn, extension, handshake, record, records, server_name

NAME = server_name(b"example.com")
EXAMPLE = Hello("example.com", (), False)


def padded(size: int) -> bytes:
    """A handshake message of that many bytes."""
    return handshake(NAME, extension(hellos.PADDING, bytes(size - len(handshake(NAME)) - 4)))


VALID = {
    "one record": (record(handshake(NAME)), EXAMPLE),
    "case and trailing dot": (hellos.hello(b"EXAMPLE.com."), EXAMPLE),
    "no extensions": (record(handshake(rest=b"")), Hello(NotAName.ABSENT, (), False)),
    "an empty list of extensions": (record(handshake()), Hello(NotAName.ABSENT, (), False)),
    "an IPv4 address": (hellos.hello(b"192.0.2.7"), Hello(NotAName.ADDRESS, (), False)),
    "an IPv6 address": (hellos.hello(b"2001:db8::7"), Hello(NotAName.ADDRESS, (), False)),
    "raw UTF-8": (hellos.hello("bücher.example".encode()), Hello(NotAName.INVALID, (), False)),
    "a NUL": (hellos.hello(b"example.com\0.evil.example"), Hello(NotAName.INVALID, (), False)),
    "ALPN": (hellos.hello(b"example.com", alpn(b"h2", b"http/1.1")), Hello("example.com", ("h2", "http/1.1"), False)),
    "other ALPN": (hellos.hello(b"example.com", alpn(b"h3", b"\xff")), Hello("example.com", ("h3", "\xff"), False)),
    "ALPN with GREASE": (hellos.hello(b"example.com", alpn(b"\x1a\x1a", b"h2")), Hello("example.com", ("h2",), False)),
    "ECH": (record(handshake(extension(hellos.ECH, b"\0rest"), NAME)), Hello("example.com", (), True)),
    "ECH and no name": (record(handshake(extension(hellos.ECH, b""))), Hello(NotAName.ABSENT, (), True)),
    "GREASE extensions": (record(handshake(extension(hellos.GREASE, b""), NAME, extension(0xFAFA, b"\0"))), EXAMPLE),
    "GREASE ciphers": (record(handshake(NAME, ciphers=b"\x0a\x0a\x13\x01")), EXAMPLE),
    "no session id": (record(handshake(NAME, session_id=b"")), EXAMPLE),
    "several compression methods": (record(handshake(NAME, compression=b"\1\0")), EXAMPLE),
    "record version 3.0": (record(handshake(NAME), b"\x03\x00"), EXAMPLE),
    "record version 3.3": (record(handshake(NAME), b"\x03\x03"), EXAMPLE),
    "record version 3.4": (record(handshake(NAME), b"\x03\x04"), EXAMPLE),
    "hello version 3.0": (record(handshake(NAME, version=b"\x03\x00")), EXAMPLE),
    "hello version 3.1": (record(handshake(NAME, version=b"\x03\x01")), EXAMPLE),
    "two records": (records(handshake(NAME), [20]), EXAMPLE),
    "a record with the type only": (records(handshake(NAME), [1]), EXAMPLE),
    "a record within the name": (records(handshake(NAME), [len(handshake(NAME)) - 4]), EXAMPLE),
    "records of one byte": (records(handshake(NAME), [1] * 200), EXAMPLE),
    "early data after it": (record(handshake(NAME)) + record(b"\1", kind=20) + record(b"x", kind=23), EXAMPLE),
    "the longest": (record(padded(MAX_HELLO)), EXAMPLE),
    "the longest in two records": (records(padded(MAX_HELLO), [9000]), EXAMPLE),
}


@pytest.mark.parametrize(("data", "value"), VALID.values(), ids=VALID)
def test_reads_a_hello(data: bytes, value: Hello) -> None:
    assert client_hello(data) == value


BROKEN = {
    "another record type": record(handshake(NAME), kind=23),
    "another major version": record(handshake(NAME), b"\x02\x03"),
    "an empty record": record(b""),
    "an empty record in the middle": record(handshake(NAME)[:9]) + record(b"") + record(handshake(NAME)[9:]),
    "a record too long": b"\x16\x03\x01\x40\x01" + padded(MAX_HELLO + 1),
    "a record of the longest length": b"\x16\x03\x01\xff\xff",
    "a ServerHello": record(handshake(NAME, kind=2)),
    "a ServerHello in two records": records(handshake(NAME, kind=2), [1]),
    "longer than 16 KiB": records(padded(MAX_HELLO + 1), [9000]),
    "the longest length": record(b"\1\xff\xff\xff"),
    "bytes after it in its record": record(handshake(NAME) + b"\0"),
    "bytes after it in its last record": record(handshake(NAME)[:9]) + record(handshake(NAME)[9:] + b"\0"),
    "a second message in its record": record(handshake(NAME) + handshake(NAME)),
    "an alert in between": record(handshake(NAME)[:9]) + record(b"\1\0", kind=21) + record(handshake(NAME)[9:]),
    "a change of cipher in between": record(handshake(NAME)[:9]) + record(b"\1", kind=20) + record(handshake(NAME)[9:]),
    "an empty message": record(b"\1\0\0\0"),
    "a version of its own": record(handshake(NAME, version=b"\x04\x00")),
    "a session id of 33 bytes": record(handshake(NAME, session_id=bytes(33))),
    "no ciphers": record(handshake(NAME, ciphers=b"")),
    "half a cipher": record(handshake(NAME, ciphers=b"\x13\x01\x13")),
    "no compression method": record(handshake(NAME, compression=b"")),
    "one byte of extensions": record(handshake(rest=b"\0")),
    "extensions shorter than they say": record(handshake(rest=b"\0\x05" + b"\0\x17\0\0")),
    "extensions longer than they say": record(handshake(rest=b"\0\x04" + b"\0\x17\0\0\0")),
    "an extension past the end": record(handshake(b"\0\x17\0\1")),
    "an extension without a length": record(handshake(b"\0\x17\0")),
    "two server_name extensions": record(handshake(NAME, NAME)),
    "two names": record(handshake(server_name(b"example.com", b"evil.example"))),
    "the same name twice": record(handshake(server_name(b"example.com", b"example.com"))),
    "a name of another type": record(handshake(server_name(b"example.com", kind=1))),
    "an empty server_name": record(handshake(extension(0, b""))),
    "an empty list of names": record(handshake(extension(0, b"\0\0"))),
    "an empty name": record(handshake(server_name(b""))),
    "a name longer than its list": record(handshake(extension(0, b"\0\6\0\0\4abc"))),
    "a list shorter than its extension": record(handshake(extension(0, b"\0\6\0\0\3abcd"))),
    "a list longer than its extension": record(handshake(extension(0, b"\0\7\0\0\3abc"))),
    "two ALPN extensions": record(handshake(alpn(b"h2"), alpn(b"h2"))),
    "an empty list of protocols": record(handshake(alpn())),
    "an empty protocol": record(handshake(alpn(b"h2", b""))),
    "a protocol past the end": record(handshake(extension(hellos.ALPN, b"\0\3\3h2"))),
    "a list of protocols past the end": record(handshake(extension(hellos.ALPN, b"\0\4\2h2"))),
    "half a list of protocols": record(handshake(extension(hellos.ALPN, b"\0"))),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_refuses_what_can_never_become_a_hello(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        client_hello(data)


@pytest.mark.parametrize("data", [data for data, _ in VALID.values() if len(data) < 2000])
def test_says_nothing_before_the_last_byte_and_the_same_after(data: bytes) -> None:
    whole = client_hello(data)
    answers = [client_hello(data[:cut]) for cut in range(len(data) + 1)]
    first = next(at for at, answer in enumerate(answers) if answer is not None)
    assert answers == [None] * first + [whole] * (len(data) + 1 - first)
    assert client_hello(data + b"more") == whole


@pytest.mark.parametrize("data", [data for data in BROKEN.values() if len(data) < 2000])
def test_never_reads_a_prefix_of_a_broken_hello(data: bytes) -> None:
    refused = False
    for cut in range(len(data) + 1):
        try:
            assert client_hello(data[:cut]) is None
            assert not refused
        except ValueError:
            refused = True
    assert refused


@pytest.mark.parametrize("oldest", [False, True])
@pytest.mark.parametrize("protocols", [(), ("h2", "http/1.1"), ("postgresql",)])
@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("Example.com", "example.com"),
        ("example.com.", "example.com"),
        ("bücher.example", "xn--bcher-kva.example"),
        (None, NotAName.ABSENT),
        ("192.0.2.1", NotAName.ABSENT),  # OpenSSL sends no SNI for an address
    ],
)
def test_reads_what_openssl_sends(
    asked: str | None, name: str | NotAName, protocols: tuple[str, ...], oldest: bool
) -> None:
    data = hellos.openssl_hello(asked, protocols, oldest)
    assert client_hello(data) == Hello(name, protocols, False)
    assert client_hello(data[:-1]) is None


@given(st.lists(st.integers(1, 60), max_size=40), st.lists(st.integers(0, 400), max_size=6))
def test_how_it_is_cut_into_records_and_segments_does_not_matter(sizes: list[int], cuts: list[int]) -> None:
    message = handshake(NAME, alpn(b"h2"), extension(hellos.ECH, b"x"))
    data = records(message, sizes)
    assert client_hello(data) == Hello("example.com", ("h2",), True)
    for cut in cuts:
        assert client_hello(data[:cut]) is None or cut >= len(data)


@given(st.binary(max_size=200))
def test_anything_has_one_of_three_outcomes(tail: bytes) -> None:
    for data in (tail, b"\x16\x03\x01" + tail, record(handshake(rest=tail)), record(handshake(extension(0, tail)))):
        try:
            found = client_hello(data)
        except ValueError:
            continue
        assert found is None or isinstance(found, Hello)
