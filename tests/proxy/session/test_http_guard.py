from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid_proxy.session.http_guard import Refusal, RequestGuard
from tests.smuggling import techniques

HOST = b"Host: example.com"
GET = b"GET / HTTP/1.1\r\nHost: example.com\r\n\r\n"
EVIL = b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: example.com\r\nContent-Length: 5\r\n\r\nhello"
CHUNKS = (
    b"POST / HTTP/1.1\r\nHost: example.com\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\n00A\r\n0123456789\r\n0\r\nX-Sum: 1\r\n\r\n"
)
WEBSOCKET = b"GET / HTTP/1.1\r\nHost: example.com\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"


def request(*fields: bytes, line: bytes = b"POST / HTTP/1.1", body: bytes = b"") -> bytes:
    return b"\r\n".join((line, HOST, *fields, b"", body))


def chunked(body: bytes) -> bytes:
    return request(b"Transfer-Encoding: chunked", body=body)


def guard(**limits: int) -> RequestGuard:
    return RequestGuard(lambda name, mismatch: name != "evil.example" and not mismatch, **limits)


def feed(data: bytes, cuts: list[int] | None = None) -> tuple[bytes, Refusal | None, RequestGuard]:
    """All that passes when data comes cut at these places."""
    checked = guard()
    passed = b""
    places = [0, *sorted({cut % (len(data) + 1) for cut in cuts or ()}), len(data)]
    for start, end in pairwise(places):
        passed += checked.feed(data[start:end])[0]
    return passed, checked.refused, checked


VALID = {
    "a request": GET,
    "one with a body": POST,
    "one in chunks": CHUNKS,
    "one in no chunks": chunked(b"0\r\n\r\n"),
    "an empty body": request(b"Content-Length: 0"),
    "HTTP/1.0": request(line=b"GET / HTTP/1.0"),
    "HTTP/1.0 kept alive": request(b"Connection: keep-alive", line=b"GET / HTTP/1.0") + GET,
    "the last": GET + request(b"Connection: x, Close"),
    "continue": request(b"Expect: 100-continue", b"Content-Length: 2", body=b"hi") + GET,
    "a body that looks like a request": request(b"Content-Length: %d" % len(EVIL), body=EVIL),
    "a chunk that looks like a request": chunked(b"%x\r\n%s\r\n0\r\n\r\n" % (len(EVIL), EVIL)),
    "a method that llhttp does not know": request(b"Content-Length: 2", line=b"FROB / HTTP/1.1", body=b"hi") + GET,
    "raw UTF-8 in the target": request(b"Content-Length: 2", line="PUT /é HTTP/1.1".encode(), body=b"hi") + GET,
    "the like in absolute form": b"GET http://example.com/a HTTP/1.1\r\nHost: example.com\r\n\r\n" + GET,
    "coding in odd case": chunked(b"0\r\n\r\n").replace(b"chunked", b"\t Chunked "),
    "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "many": (GET + POST + CHUNKS) * 4,
}


@pytest.mark.parametrize("data", VALID.values(), ids=VALID)
def test_passes_every_byte_of_what_is_allowed_however_it_is_cut(data: bytes) -> None:
    assert feed(data)[:2] == (data, None)
    for cut in range(len(data)):
        assert feed(data, [cut])[:2] == (data, None)
    assert feed(data, list(range(len(data))))[:2] == (data, None)


@given(st.lists(st.sampled_from([GET, POST, CHUNKS, VALID["continue"]]), max_size=8), st.lists(st.integers(0)))
def test_a_pipelined_stream_passes_unchanged(requests: list[bytes], cuts: list[int]) -> None:
    data = b"".join(requests)
    passed, refused, checked = feed(data, cuts)
    assert (passed, refused) == (data, None)
    assert checked.requests == sum(2 if one == VALID["continue"] else 1 for one in requests)


@given(
    st.lists(st.sampled_from([GET, POST, CHUNKS]), max_size=6),
    st.sampled_from(
        [EVIL, EVIL.replace(b"GET /", b"GET http://example.com/"), POST.replace(b"example.com", b"evil.example")]
    ),
    st.lists(st.integers(0)),
)
def test_a_denied_host_passes_exactly_what_came_before_it(before: list[bytes], denied: bytes, cuts: list[int]) -> None:
    data = b"".join(before)
    passed, refused, checked = feed(data + denied + GET, cuts)
    assert (passed, refused) == (data, Refusal.DENIED)
    assert checked.requests == len(before)
    assert checked.feed(GET) == (b"", Refusal.DENIED)


def test_asks_once_for_each_request_in_order_before_any_byte_of_it() -> None:
    asked: list[tuple[str | None, bool]] = []

    def allow(name: str | None, mismatch: bool) -> bool:
        asked.append((name, mismatch))
        return True

    seen = RequestGuard(allow)
    passed = b""
    data = GET + POST.replace(b"example.com", b"[2001:db8::1]") + EVIL.replace(b" /", b" http://example.com/")
    for at in range(len(data)):
        before = len(asked)
        step = seen.feed(data[at : at + 1])[0]
        assert len(asked) == before or step.startswith((b"GET", b"POST"))
        passed += step
    assert asked == [("example.com", False), (None, False), ("example.com", True)]
    assert passed == data


LENGTH, CHUNKED = b"Content-Length: 5", b"Transfer-Encoding: chunked"
# What follows a valid request: nothing of it passes (b""), or no more than is given here.
SMUGGLED = {name: (each.sent, each.refusal, each.passed) for name, each in techniques().items()}


@pytest.mark.parametrize(("data", "why", "passes"), SMUGGLED.values(), ids=SMUGGLED)
@pytest.mark.parametrize("before", [GET, GET + POST + CHUNKS], ids=["second", "fourth"])
def test_passes_nothing_that_servers_might_read_as_another_request(
    before: bytes, data: bytes, why: Refusal, passes: bytes
) -> None:
    assert feed(before + data)[:2] == (before + passes, why)
    for cut in range(len(before), len(before + data), 1 if len(data) < 2000 else 509):
        passed, refused, _ = feed(before + data, [cut])
        assert (passed, refused) == (before + passes, why)


def test_what_follows_an_upgrade_is_held_until_the_server_has_switched() -> None:
    checked = guard()
    assert checked.feed(WEBSOCKET + b"\x81\x01") == (WEBSOCKET, None)
    assert checked.awaiting_response
    assert checked.feed(b"x") == (b"", None)
    for byte in SWITCHING[:11]:
        assert checked.on_response(bytes([byte])) == (b"", None)
        assert checked.awaiting_response
    assert checked.on_response(SWITCHING[11:]) == (b"\x81\x01x", None)
    assert checked.opaque
    assert not checked.awaiting_response
    assert checked.feed(b"\0 anything") == (b"\0 anything", None)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 426 Upgrade\r\n", b"ICY 200 OK\r\n", b"\0" * 12])
def test_an_upgrade_that_is_not_answered_by_101_leaves_it_http(answer: bytes) -> None:
    checked = guard()
    checked.feed(WEBSOCKET + GET + EVIL)
    assert checked.on_response(answer) == (GET, Refusal.DENIED)
    assert not checked.opaque


def test_interim_answers_come_before_the_one_that_counts() -> None:
    checked = guard()
    checked.feed(WEBSOCKET)
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    for at in range(len(interim)):
        assert checked.on_response(interim[at : at + 1]) == (b"", None)
        assert checked.awaiting_response
    assert checked.on_response(SWITCHING) == (b"", None)
    assert checked.opaque


def test_an_interim_answer_without_end_is_no_switch() -> None:
    checked = guard()
    checked.feed(WEBSOCKET + GET)
    checked.on_response(b"HTTP/1.1 100 Continue\r\nX: ")
    assert checked.on_response(b"x" * 16384) == (GET, None)
    assert not checked.opaque


@pytest.mark.parametrize("framing", [POST, CHUNKS])
@pytest.mark.parametrize("early", [False, True])
def test_an_upgrade_may_have_a_body_that_ends_before_the_switch(framing: bytes, early: bool) -> None:
    data = framing.replace(HOST, HOST + b"\r\nUpgrade: a/1, websocket\r\nConnection: upgrade")
    checked = guard()
    half = len(data) - 4
    assert checked.feed(data[:half])[0]
    if early:
        assert checked.on_response(SWITCHING) == (b"", None)
        assert not checked.opaque
        assert checked.feed(data[half:] + b"raw")[0].endswith(b"raw")
    else:
        checked.feed(data[half:] + b"raw")
        assert checked.on_response(SWITCHING) == (b"raw", None)
    assert checked.opaque


def test_an_upgrade_answered_before_its_body_is_over_leaves_it_http() -> None:
    data = POST.replace(HOST, HOST + b"\r\nUpgrade: websocket\r\nConnection: upgrade")
    checked = guard()
    checked.feed(data[:-1])
    assert checked.on_response(b"HTTP/1.1 200 OK\r\n\r\n") == (b"", None)
    assert checked.feed(data[-1:] + GET + EVIL) == (data[-1:] + GET, Refusal.DENIED)


def test_an_upgrade_to_http_2_must_not_be_taken() -> None:
    checked = guard()
    data = WEBSOCKET.replace(b"websocket", b"h2c").replace(b"Upgrade\r", b"Upgrade, HTTP2-Settings\r")
    assert checked.feed(data + b"PRI") == (data, None)
    assert checked.on_response(b"HTTP/1.1 101 Switching Protocols\r\n\r\n") == (b"", Refusal.UPGRADE)
    assert checked.feed(b"PRI") == (b"", Refusal.UPGRADE)
    declined = guard()
    declined.feed(data)
    assert declined.on_response(b"HTTP/1.1 200 OK\r\n\r\n") == (b"", None)
    assert declined.feed(GET) == (GET, None)


def test_what_is_held_after_an_upgrade_is_bounded() -> None:
    checked = guard(max_held_bytes=100)
    assert checked.feed(WEBSOCKET + bytes(100)) == (WEBSOCKET, None)
    assert checked.feed(b"\0") == (b"", Refusal.HELD_TOO_MUCH)
    assert checked.on_response(SWITCHING) == (b"", Refusal.HELD_TOO_MUCH)


def test_an_upgrade_of_a_denied_host_is_denied() -> None:
    checked = guard()
    assert checked.feed(WEBSOCKET.replace(b"example.com", b"evil.example")) == (b"", Refusal.DENIED)
    assert not checked.awaiting_response


def test_the_limit_of_a_head_is_a_setting() -> None:
    assert guard(max_head_bytes=len(GET)).feed(GET) == (GET, None)
    assert guard(max_head_bytes=len(GET) - 1).feed(GET) == (b"", Refusal.TOO_LARGE)


def test_a_refusal_has_a_status() -> None:
    assert {refusal: refusal.status for refusal in Refusal} == dict.fromkeys(Refusal, 400) | {
        Refusal.DENIED: 403, Refusal.TOO_LARGE: 431, Refusal.CONNECT: 405,
    }  # fmt: skip


PIECES = [
    GET, POST, CHUNKS, EVIL, WEBSOCKET, b"\r\n", b"\n", b"0\r\n\r\n", b"5\r\n", b"5;a\r\n", b"hello", b"Host: evil.example\r\n",
    b"POST / HTTP/1.1\r\n", HOST + b"\r\n", LENGTH + b"\r\n", CHUNKED + b"\r\n", b"X: y\r\n",
]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=8), max_size=10), st.lists(st.integers(0)))
def test_what_passes_is_a_prefix_and_does_not_depend_on_the_cuts(pieces: list[bytes], cuts: list[int]) -> None:
    data = b"".join(pieces)
    passed, refused, _ = feed(data)
    assert data.startswith(passed)
    assert feed(data, cuts)[:2] == (passed, refused)
