"""The one entry of the data path: which protocol begins here, and for whom.

Whatever says it is TLS or HTTP and then breaks it is a mismatch, for a server may be more forgiving than this parser. So
an HTTP request is known by its method, or else by its first line: some servers take any method, and skip empty lines.
"""

from __future__ import annotations

import re

import cython
import msgspec

from pellucid_proxy.sniff.http_head import TOKEN, request_head
from pellucid_proxy.sniff.names import INVALID
from pellucid_proxy.sniff.tls_hello import MAX_HELLO, client_hello

MAX_FIRST_BYTES = MAX_HELLO + 5
"""More is never looked at: sniff has decided by then."""

TLS = "TLS"
HTTP1 = "HTTP/1"
HTTP2 = "HTTP/2"
SSLV2 = "SSLv2"
POSTGRES_SSL = "PostgresSSLRequest"
POSTGRES_GSS = "PostgresGSSENCRequest"
POSTGRES = "Postgres"
SSH = "SSH"
SMTP = "SMTP"
IMAP = "IMAP"
POP3 = "POP3"
FTP = "FTP"
UNKNOWN_PROTOCOL = "Unknown"

PROTOCOLS = (
    TLS, HTTP1, HTTP2, SSLV2, POSTGRES_SSL, POSTGRES_GSS, POSTGRES, SSH, SMTP, IMAP, POP3, FTP, UNKNOWN_PROTOCOL,
)  # fmt: skip
"""Every value of Sniffed.protocol: it is a label of metrics."""


class Sniffed(msgspec.Struct, frozen=True, gc=False):
    """What the first bytes say.

    protocol: one of PROTOCOLS. name: the domain asked for (SNI or Host), as an A-label in lower case without trailing
    dot; None if there is none and more bytes bring none. encrypted: the hello carries encrypted_client_hello.
    mismatch: names disagree, or the bytes claim a protocol and break it: no name in them can be trusted.
    alpn: what TLS offers, in the client's order.
    """

    protocol: str
    name: str | None = None
    encrypted: bool = False
    mismatch: bool = False
    alpn: tuple[str, ...] = ()


UNKNOWN = Sniffed(UNKNOWN_PROTOCOL)
BROKEN_TLS = Sniffed(TLS, mismatch=True)
BROKEN_HTTP = Sniffed(HTTP1, mismatch=True)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # RFC 9113 §3.4

_KNOWN = Sniffed(HTTP2), Sniffed(SSLV2), Sniffed(POSTGRES_SSL), Sniffed(POSTGRES_GSS), Sniffed(POSTGRES)
_HTTP2, _SSLV2, _POSTGRES_SSL, _POSTGRES_GSS, _POSTGRES = _KNOWN

METHODS = (
    b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"CONNECT", b"OPTIONS", b"TRACE", b"PATCH",
    b"PROPFIND", b"PROPPATCH", b"MKCOL", b"COPY", b"MOVE", b"LOCK", b"UNLOCK", b"SEARCH", b"REPORT",
)  # fmt: skip
_REQUEST = re.compile(b"(?:" + b"|".join(METHODS) + b") ")
# The beginning of a line that may become a request line: empty lines and space that servers skip, a method, any text.
_LINE = re.compile(rb"[\r\n\t ]*+" + TOKEN + rb"{0,32}+(?:[\t ][^\x00-\x08\x0a-\x1f\x7f]*+)?\r?")
_REQUEST_LINE = re.compile(rb"[\t ]HTTP/[0-9.]*[\t ]*\r?$", re.IGNORECASE)
_SSH_LINE = re.compile(rb"SSH-[12]\.")
_IMAP_LINE = re.compile(rb"[A-Z0-9.]+ +(?:CAPABILITY|STARTTLS|LOGIN|AUTHENTICATE|NOOP|ID)\b", re.IGNORECASE)
_WORDS = {
    b"EHLO": Sniffed(SMTP), b"HELO": Sniffed(SMTP), b"LHLO": Sniffed(SMTP),
    b"CAPA": Sniffed(POP3), b"STLS": Sniffed(POP3), b"APOP": Sniffed(POP3),
    b"USER": Sniffed(FTP), b"AUTH": Sniffed(FTP), b"FEAT": Sniffed(FTP),  # POP3 has USER and AUTH too
}  # fmt: skip
_SSH, _IMAP = Sniffed(SSH), Sniffed(IMAP)


def sniff(data: bytes) -> Sniffed | None:
    """What the first bytes of a client say. Never raises.

    None: the bytes are a proper prefix of something known, of less than MAX_FIRST_BYTES. Once it says something, more
    bytes do not change it. When no more bytes come in time, ask give_up.
    """
    if not data:
        return None
    if len(data) > MAX_FIRST_BYTES:
        data = data[:MAX_FIRST_BYTES]
    first: cython.int = data[0]
    if first == 0x16:
        found = _tls(data)
    elif first == 0:
        found = _postgres(data)
    elif first >= 0x80:
        found = _sslv2(data)
    else:
        found = _text(data)
    if found is None and len(data) >= MAX_FIRST_BYTES:
        return give_up(data)
    return found


def give_up(data: bytes) -> Sniffed:
    """What to believe of bytes that sniff still has no answer for when their time is over. Never raises.

    The beginning of a hello or of a request is a mismatch: whoever stops in the middle of one may send the rest later.
    """
    if data.startswith(b"\x16"):
        return BROKEN_TLS if data[1:2] in (b"", b"\x03") else UNKNOWN
    if data[:1] >= b"\x80" or not data.strip(b"\x00"):
        return UNKNOWN
    word = data.lstrip(b"\r\n\t ")
    if not word or len(word) < len(data) or b" " in word or b"\t" in word:
        return BROKEN_HTTP
    return BROKEN_HTTP if any(method.startswith(word) for method in METHODS) else UNKNOWN


@cython.cfunc
def _tls(data: bytes):
    if len(data) < 2:
        return None
    if data[1] != 3:
        return UNKNOWN
    try:
        hello = client_hello(data)
    except ValueError:
        return BROKEN_TLS
    if hello is None:
        return None
    name = hello.name
    if isinstance(name, str):
        return Sniffed(TLS, name, hello.encrypted, False, hello.alpn)
    return Sniffed(TLS, None, hello.encrypted, name is INVALID, hello.alpn)


@cython.cfunc
def _http(data: bytes):
    try:
        head = request_head(data)
    except ValueError:
        return BROKEN_HTTP
    if head is None:
        return None
    name = head.name
    return Sniffed(HTTP1, name if isinstance(name, str) else None, False, head.mismatch)


@cython.cfunc
def _text(data: bytes):
    """Protocols of lines. HTTP first, by method or by how the first line ends."""
    if _REQUEST.match(data):
        return _http(data)
    if data.startswith(PREFACE):
        return _HTTP2
    if PREFACE.startswith(data):
        return None
    start = len(data) - len(data.lstrip(b"\r\n\t "))
    end = data.find(b"\n", start)
    if end < 0:
        return None if _LINE.fullmatch(data) else UNKNOWN
    if not _LINE.fullmatch(data, 0, end):
        return UNKNOWN
    line = data[start:end]
    if _REQUEST_LINE.search(line):
        return _http(data)
    if _SSH_LINE.match(line):
        return _SSH
    if _IMAP_LINE.match(line):
        return _IMAP
    return _WORDS.get(line.split(None, 1)[0].upper(), UNKNOWN)


@cython.cfunc
def _sslv2(data: bytes):
    """A hello of SSL 2.0, or of newer clients in its form (RFC 5246 §E.2): length 2, type 1, version 2."""
    if (len(data) > 2 and data[2] != 1) or (len(data) > 3 and data[3] not in (0, 3)):
        return UNKNOWN
    if len(data) < 5:
        return None
    return _SSLV2 if data[3] == 3 or data[4] == 2 else UNKNOWN


@cython.cfunc
def _postgres(data: bytes):
    """PostgreSQL's first messages: length 4, then a version or a request code (protocol §55.7)."""
    head = data[:8]
    if head == b"\0\0\0\x08\x04\xd2\x16\x2f":
        return _POSTGRES_SSL
    if head == b"\0\0\0\x08\x04\xd2\x16\x30":
        return _POSTGRES_GSS
    if head == b"\0\0\0\x10\x04\xd2\x16\x2e":  # CancelRequest
        return _POSTGRES
    if head[:2] not in (b"\0", b"\0\0") or head[2:3] > b"\x27":  # a startup message has at most 10,000 bytes
        return UNKNOWN
    if len(head) == 8:
        return _POSTGRES if head[4:7] == b"\0\x03\0" and head[2:4] >= b"\0\x08" else UNKNOWN
    if b"\0\x03\0".startswith(head[4:7]) or b"\x04\xd2\x16".startswith(head[4:7]):
        return None
    return UNKNOWN
