"""What must hold of the parsers whatever comes. A target takes one input, raises if something does not hold, and says where it led.

Where it led is a short text: an input that leads somewhere new is worth keeping.
"""

from __future__ import annotations

import re
import ssl
import sys
from collections.abc import Callable

import httptools

from fuzz import decisions, messages
from fuzz.claims import cuts, hold, three_outcomes
from pellucid_proxy.session.http_guard import Refusal, RequestGuard
from pellucid_proxy.sniff.first_bytes import PROTOCOLS, give_up, sniff
from pellucid_proxy.sniff.http_head import field_lines, request_head
from pellucid_proxy.sniff.names import ABSENT, NotAName, domain
from pellucid_proxy.sniff.tls_hello import client_hello

SAFE_NAME = re.compile(r"(?!.*\.\.)[a-z0-9_-][a-z0-9_.-]{0,252}(?<!\.)")
WEBSOCKET = b"GET / HTTP/1.1\r\nHost: a.example\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n"
PIPELINED = b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"


def name_is_safe(name: object) -> str:
    if isinstance(name, str):
        hold(SAFE_NAME.fullmatch(name) is not None, name)
        hold(domain(name.encode()) == name, name)
        return "name"
    hold(name is None or isinstance(name, NotAName), name)
    return str(name)


def names(data: bytes) -> str:
    return name_is_safe(domain(data))


def tls_hello(data: bytes) -> str:
    """OpenSSL, where it comes to ask for the name, read the same one."""
    kind, hello = three_outcomes(client_hello, data)
    theirs = openssl_names(data)
    if kind == "value":
        name = hello.name  # type: ignore[attr-defined]
        if theirs:
            read = ABSENT if theirs[0] is None else domain(theirs[0].encode())
            hold(name == read or (isinstance(name, NotAName) and name is not ABSENT), name, theirs)
        return f"{name_is_safe(name)} {hello.encrypted} {len(hello.alpn)} {len(theirs)}"  # type: ignore[attr-defined]
    hold(kind == "never" or not theirs, theirs)
    return f"{kind} {hello} {len(theirs)}"


def openssl_names(data: bytes) -> list[str | None]:
    """The names that OpenSSL asks for when data comes; none if it does not get so far."""
    asked: list[str | None] = []
    _server.sni_callback = lambda _socket, name, _context: asked.append(name)
    incoming = ssl.MemoryBIO()
    incoming.write(data)
    hook, sys.unraisablehook = (
        sys.unraisablehook,
        lambda _what: None,
    )  # a name that is not ASCII raises where nobody hears it
    try:
        _server.wrap_bio(incoming, ssl.MemoryBIO(), server_side=True).do_handshake()
    except ssl.SSLError:
        pass
    finally:
        sys.unraisablehook = hook
    return asked


def _anonymous_server() -> ssl.SSLContext:
    """One that needs no certificate; what it would answer does not matter."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ALL:@SECLEVEL=0")
    return context


_server = _anonymous_server()


class Fields:
    """What llhttp reads in a head."""

    def __init__(self) -> None:
        self.read: list[tuple[bytes, bytes]] = []
        self.complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.read.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        self.complete = True


def http_head(data: bytes) -> str:
    """llhttp, where it takes the head at all, reads the same fields in it."""
    kind, why = three_outcomes(request_head, data)
    if kind != "value":
        return f"{kind} {why}"
    head = request_head(data)
    assert head is not None
    fields = field_lines(data, head)
    hold(sum(name == b"host" for name, _ in fields) <= 1, fields)
    theirs = Fields()
    try:
        httptools.HttpRequestParser(theirs).feed_data(data[: head.length])
    except httptools.HttpParserUpgrade:
        pass
    except httptools.HttpParserError:
        return f"{name_is_safe(head.name)} {head.mismatch} alone"
    hold(theirs.complete and theirs.read == fields, theirs.read, fields)
    return f"{name_is_safe(head.name)} {head.mismatch} {head.minor} {min(len(fields), 4)}"


def first_bytes(data: bytes) -> str:
    whole = sniff(data)
    answered = False
    for cut in cuts(data):
        part = sniff(data[:cut])
        hold(part == whole if part is not None else not answered, cut, part, whole)
        answered = part is not None
    for found in (whole, give_up(data)):
        if found is not None:
            hold(found.protocol in PROTOCOLS, found)
            name_is_safe(found.name)
    return "more" if whole is None else f"{whole.protocol} {whole.name is None} {whole.mismatch} {whole.encrypted}"


def allow(name: str | None, mismatch: bool) -> bool:
    return name != "evil.example" and not mismatch


def fed(data: bytes, places: list[int]) -> tuple[bytes, Refusal | None, RequestGuard]:
    guard = RequestGuard(allow)
    passed = b""
    start = 0
    for end in [*places, len(data)]:
        passed += guard.feed(data[start:end])[0]
        start = end
    return passed, guard.refused, guard


def http_guard(data: bytes) -> str:
    """What passes is a prefix of what came, and does not depend on how it came."""
    passed, refused, guard = fed(data, [])
    hold(data.startswith(passed), passed)
    again = fed(data, cuts(data))
    hold(again[:2] == (passed, refused), again[:2], (passed, refused))
    hold(again[2].requests == guard.requests)
    hold(guard.feed(b"")[0] == b"")
    return f"{refused} {min(guard.requests, 4)} {guard.awaiting_response} {len(passed) == len(data)}"


def http_upgrade(data: bytes) -> str:
    """A server's answer to an Upgrade leads to the same end however it is cut, and nothing held is lost or doubled."""
    ends = []
    for places in ([], cuts(data)):
        guard = RequestGuard(allow)
        passed = guard.feed(WEBSOCKET + PIPELINED)[0]
        start = 0
        for end in [*places, len(data)]:
            passed += guard.on_response(data[start:end])[0]
            start = end
        hold((WEBSOCKET + PIPELINED).startswith(passed), passed)
        hold(guard.awaiting_response == (passed == WEBSOCKET), passed)
        ends.append((passed, guard.opaque, guard.refused))
    hold(ends[0] == ends[1], ends)
    return f"{len(ends[0][0])} {ends[0][1:]}"


TARGETS: dict[str, Callable[[bytes], str]] = {
    "names": names,
    "tls_hello": tls_hello,
    "http_head": http_head,
    "first_bytes": first_bytes,
    "http_guard": http_guard,
    "http_upgrade": http_upgrade,
    **decisions.TARGETS,
    **messages.TARGETS,
}
