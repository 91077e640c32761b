from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid_proxy.sniff.http_head import MAX_HEAD, RequestHead, field_lines, request_head
from pellucid_proxy.sniff.names import NotAName


def get(*fields: bytes, target: bytes = b"/", version: bytes = b"HTTP/1.1", method: bytes = b"GET") -> bytes:
    line = method + b" " + target + b" " + version
    return b"".join(part + b"\r\n" for part in (line, *fields, b""))


def host(value: bytes, target: bytes = b"/", method: bytes = b"GET") -> bytes:
    return get(b"Host: " + value, target=target, method=method)


def of_size(size: int) -> bytes:
    bare = get(b"Host: example.com", b"X: ")
    return get(b"Host: example.com", b"X: " + b"x" * (size - len(bare)))


NAMED = {
    "plain": (host(b"example.com"), "example.com"),
    "case and trailing dot": (get(b"hOST: EXAMPLE.com."), "example.com"),
    "a port": (host(b"example.com:8080"), "example.com"),
    "an empty port": (host(b"example.com:"), "example.com"),
    "space and tab around": (get(b"Host:\t example.com \t"), "example.com"),
    "no space": (get(b"Host:example.com"), "example.com"),
    "not the first field": (get(b"Accept: */*", b"Host: example.com", b"X-Host: evil.example"), "example.com"),
    "HTTP/1.0": (get(b"Host: example.com", version=b"HTTP/1.0"), "example.com"),
    "absolute form": (host(b"example.com", b"http://EXAMPLE.com/a"), "example.com"),
    "absolute form, ports differ": (host(b"example.com:80", b"http://example.com?q"), "example.com"),
    "absolute form, no Host": (get(target=b"http://example.com#f"), "example.com"),
    "CONNECT": (host(b"example.com:443", b"example.com:443", b"CONNECT"), "example.com"),
    "CONNECT without Host": (get(target=b"example.com:443", method=b"CONNECT"), "example.com"),
    "asterisk form": (host(b"example.com", b"*", b"OPTIONS"), "example.com"),
    "a target that looks like an authority": (host(b"example.com", b"//evil.example/"), "example.com"),
    "an unknown method": (host(b"example.com", method=b"FROB-1"), "example.com"),
    "raw UTF-8 in the target": (host(b"example.com", "/é".encode()), "example.com"),
    "the longest": (of_size(MAX_HEAD), "example.com"),
}


@pytest.mark.parametrize(("data", "name"), NAMED.values(), ids=NAMED)
def test_reads_the_name(data: bytes, name: str) -> None:
    head = request_head(data)
    assert head is not None
    assert (head.name, head.mismatch, head.length) == (name, False, len(data))


UNNAMED = {
    "no Host": (get(), NotAName.ABSENT),
    "no Host in HTTP/1.0": (get(version=b"HTTP/1.0"), NotAName.ABSENT),
    "an empty Host": (host(b""), NotAName.ABSENT),
    "an IPv4 address": (host(b"192.0.2.1:80"), NotAName.ADDRESS),
    "an IPv6 address": (host(b"[2001:db8::1]:80"), NotAName.ADDRESS),
    "an address in both places": (host(b"[2001:DB8::1]", b"http://[2001:db8::1]:80/"), NotAName.ADDRESS),
}


@pytest.mark.parametrize(("data", "why"), UNNAMED.values(), ids=UNNAMED)
def test_says_why_there_is_no_name(data: bytes, why: NotAName) -> None:
    head = request_head(data)
    assert head is not None
    assert (head.name, head.mismatch) == (why, False)


MISMATCHED = {
    "absolute form against Host": host(b"example.com", b"http://evil.example/"),
    "absolute form against an empty Host": host(b"", b"http://evil.example/"),
    "absolute form against an address": host(b"192.0.2.1", b"http://evil.example/"),
    "an address against another": host(b"192.0.2.1", b"http://192.0.2.2/"),
    "an address against a name": host(b"example.com", b"http://192.0.2.2/"),
    "CONNECT against Host": host(b"example.com", b"evil.example:443", b"CONNECT"),
    "raw UTF-8": host("bücher.example".encode()),
    "percent encoding": host(b"%65xample.com"),
    "two dots": host(b"example..com"),
    "a list": host(b"example.com,evil.example"),
    "UTF-8 in the absolute form": get(target="http://bücher.example/".encode()),
}


@pytest.mark.parametrize("data", MISMATCHED.values(), ids=MISMATCHED)
def test_reports_names_that_disagree_or_are_none(data: bytes) -> None:
    head = request_head(data)
    assert head is not None
    assert head.mismatch


BROKEN = {
    "two Hosts": get(b"Host: example.com", b"Host: evil.example"),
    "the same Host twice": get(b"Host: example.com", b"HOST: example.com"),
    "space before the colon": get(b"Host : example.com"),
    "a folded Host": get(b"Host:", b" example.com"),
    "a folded field": get(b"Host: example.com", b"X: a", b"\tb"),
    "space before the first field": get(b" X: a", b"Host: example.com"),
    "a field without a colon": get(b"Host: example.com", b"X"),
    "a field without a name": get(b"Host: example.com", b": x"),
    "a NUL": get(b"Host: example.com", b"X: \0"),
    "a NUL in the Host": host(b"example.com\0"),
    "a vertical tab": get(b"Host: example.com", b"X: \x0b"),
    "DEL": get(b"Host: example.com", b"X: \x7f"),
    "non-ASCII in a field's name": get(b"Host: example.com", b"X\xe9: a"),
    "a bare LF": host(b"example.com\nHost: evil.example"),
    "only LFs": host(b"example.com").replace(b"\r", b"") + b"\r\n\r\n",
    "a bare CR": host(b"example.com\rHost: evil.example"),
    "CR CR LF": host(b"example.com\r"),
    "an empty line first": b"\r\n" + host(b"example.com"),
    "space first": b" " + host(b"example.com"),
    "two spaces": host(b"example.com", b" /"),
    "a tab for a space": host(b"example.com").replace(b"GET ", b"GET\t"),
    "a space in the target": host(b"example.com", b"/a b"),
    "a space after the version": get(b"Host: example.com", version=b"HTTP/1.1 "),
    "a method that is no token": host(b"example.com", method=b"G(T"),
    "a very long method": host(b"example.com", method=b"G" * 33),
    "no version": get(b"Host: example.com", version=b""),
    "HTTP/0.9": get(b"Host: example.com", version=b"HTTP/0.9"),
    "HTTP/1.2": get(b"Host: example.com", version=b"HTTP/1.2"),
    "HTTP/2.0": get(b"Host: example.com", version=b"HTTP/2.0"),
    "HTTP/1.10": get(b"Host: example.com", version=b"HTTP/1.10"),
    "http/1.1": get(b"Host: example.com", version=b"http/1.1"),
    "a target of no form": host(b"example.com", b"index.html"),
    "a scheme with one slash": host(b"example.com", b"http:/evil.example/"),
    "an absolute form without authority": host(b"example.com", b"http:///a"),
    "userinfo in the absolute form": host(b"example.com", b"http://example.com@evil.example/"),
    "a backslash in the absolute form": host(b"example.com", b"http://example.com\\@evil.example/"),
    "userinfo in the Host": host(b"user@example.com"),
    "a path in the Host": host(b"example.com/evil"),
    "space in the Host": host(b"example.com evil.example"),
    "a port that is none": host(b"example.com:http"),
    "a port too high": host(b"example.com:65536"),
    "two ports": host(b"example.com:80:80"),
    "an IPv6 address without brackets": host(b"2001:db8::1"),
    "an open bracket": host(b"[2001:db8::1"),
    "a name in brackets": host(b"[example.com]"),
    "CONNECT to a path": host(b"example.com", b"/", b"CONNECT"),
    "CONNECT to nothing": host(b"", b":443", b"CONNECT"),
    "too long": of_size(MAX_HEAD + 1),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_refuses_what_servers_might_read_differently(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        request_head(data)


@pytest.mark.parametrize("data", [data for data, _ in (NAMED | UNNAMED).values()] + list(MISMATCHED.values()))
def test_says_nothing_before_the_last_byte_and_the_same_after(data: bytes) -> None:
    step = 1 if len(data) < 2000 else 257
    assert not any(request_head(data[:cut]) for cut in range(0, len(data), step))
    assert request_head(data + b"\n\0GET / HTTP/1.1\r\n\r\n") == request_head(data) is not None


@pytest.mark.parametrize("data", [data for data in BROKEN.values() if len(data) < 2000])
def test_never_reads_a_prefix_of_a_broken_head(data: bytes) -> None:
    refused = False
    for cut in range(len(data) + 1):
        try:
            assert request_head(data[:cut]) is None
            assert not refused
        except ValueError:
            refused = True
    assert refused


def test_a_bare_line_feed_is_refused_as_soon_as_it_comes() -> None:
    with pytest.raises(ValueError, match="bare"):
        request_head(b"GET / HTTP/1.1\n")


def test_fields_come_in_order_folded_and_without_the_space_around() -> None:
    data = get(b"Host: example.com", b"X-A:\t1 ", b"x-a:2:3", b"Empty:")
    head = request_head(data)
    assert head is not None
    assert field_lines(data, head) == [
        (b"host", b"example.com"), (b"x-a", b"1"), (b"x-a", b"2:3"), (b"empty", b""),
    ]  # fmt: skip
    bare = request_head(get())
    assert bare is not None
    assert field_lines(get(), bare) == []


@given(st.binary(max_size=120), st.sampled_from([b"", b"GET ", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: "]))
def test_anything_has_one_of_three_outcomes(tail: bytes, before: bytes) -> None:
    for data in (before + tail, before + tail + b"\r\n\r\n"):
        try:
            found = request_head(data)
        except ValueError:
            continue
        assert found is None or isinstance(found, RequestHead)
