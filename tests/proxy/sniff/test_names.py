from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid_proxy.sniff.names import NotAName, domain

LONGEST = b".".join([b"a" * 63, b"b" * 63, b"c" * 63, b"d" * 61])


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (b"example.com", "example.com"),
        (b"EXAMPLE.com.", "example.com"),
        (b"a", "a"),
        (b"localhost", "localhost"),
        (b"xn--bcher-kva.example", "xn--bcher-kva.example"),
        (b"_dmarc.Example.com", "_dmarc.example.com"),
        (b"-odd-.example", "-odd-.example"),
        (b"1.example", "1.example"),
        (b"example.3com", "example.3com"),
        (b"example.0xyz", "example.0xyz"),
        (b"a" * 63, "a" * 63),
        (LONGEST, LONGEST.decode()),
        (LONGEST + b".", LONGEST.decode()),
    ],
)
def test_a_domain_is_folded_and_loses_one_trailing_dot(raw: bytes, name: str) -> None:
    assert domain(raw) == name


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", NotAName.ABSENT),
        (b"192.0.2.1", NotAName.ADDRESS),
        (b"192.0.2.1.", NotAName.ADDRESS),
        (b"127.1", NotAName.ADDRESS),
        (b"2130706433", NotAName.ADDRESS),
        (b"0x7f000001", NotAName.ADDRESS),
        (b"1.2.0X3", NotAName.ADDRESS),
        (b"example.0x", NotAName.ADDRESS),
        (b"2001:db8::1", NotAName.ADDRESS),
        (b"::ffff:192.0.2.1", NotAName.ADDRESS),
        (b".", NotAName.INVALID),
        (b"example.com..", NotAName.INVALID),
        (b".example.com", NotAName.INVALID),
        (b"a..b", NotAName.INVALID),
        (b"*.example.com", NotAName.INVALID),
        (b"example.com\0", NotAName.INVALID),
        (b"example.com\0.evil.example", NotAName.INVALID),
        (b"example .com", NotAName.INVALID),
        (b"example.com/", NotAName.INVALID),
        (b"example!com", NotAName.INVALID),
        (b"%65xample.com", NotAName.INVALID),
        (b"example.com:443", NotAName.INVALID),
        ("bücher.example".encode(), NotAName.INVALID),
        ("example。com".encode(), NotAName.INVALID),
        (b"a" * 64, NotAName.INVALID),
        (b"x." + b"a" * 64, NotAName.INVALID),
        (LONGEST + b"d", NotAName.INVALID),
    ],
)
def test_what_is_no_domain_says_why(raw: bytes, why: NotAName) -> None:
    assert domain(raw) is why


@given(st.binary(max_size=300))
def test_a_name_is_safe_whatever_it_was_made_from(raw: bytes) -> None:
    name = domain(raw)
    if isinstance(name, str):
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_.")
        assert 0 < len(name) <= 253
        assert all(0 < len(label) <= 63 for label in name.split("."))
        assert domain(name.encode()) == name
