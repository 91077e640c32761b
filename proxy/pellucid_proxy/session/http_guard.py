"""Every request of a plain HTTP connection is asked about, not only the first.

Rule 1. No byte of a request is passed before its whole head was read and allowed.
Rule 2. Two parsers must agree where each request ends: the framing here, and llhttp. Otherwise, or where a server might read
        another end (two lengths, bare LF, extensions, odd codings), nothing more is passed.
Rule 3. What is passed is what came, byte for byte; all that was passed is a prefix of all that came.
Rule 4. What is held is bounded: a head, a chunk's frame, trailers, and after an Upgrade max_held_bytes.
Rule 5. An Upgrade is for the first request alone. What follows it is held until the server has said whether it switches: 101
        makes the connection opaque, anything else leaves it HTTP. HTTP/2 in clear (h2c) is a connection of many names that
        nobody here could check: the server's 101 to it is refused.

RFC 9112 §2.2, §3.2, §6, §7; RFC 9110 §7.8.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable

import httptools

from pellucid_proxy.sniff.first_bytes import METHODS
from pellucid_proxy.sniff.http_head import FIELD, MAX_HEAD, RequestHead, field_lines, request_head

MAX_TRAILERS = 4096
MAX_HELD = 65536

_LENGTH = re.compile(rb"[0-9]{1,15}")
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,15}")  # no extensions: RFC 9112 §7.1.1 lets a recipient give up on them
_CHUNK_SIZE_BEGUN = re.compile(rb"[0-9A-Fa-f]{0,15}\r?")
_TRAILER_LINES = re.compile(rb"(?:" + FIELD + rb")*+\r\n")
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})")
_STATUS_BYTES = 12

_HEAD, _BODY, _CHUNK_HEAD, _CHUNK, _CHUNK_END, _TRAILERS, _WAITING, _CLOSED, _OPAQUE = range(9)

_FRAMING = frozenset((b"content-length", b"transfer-encoding", b"host", b"connection", b"upgrade"))
_HTTP_AGAIN = frozenset((b"h2c", b"h2", b"http"))


class Refusal(enum.StrEnum):
    """Why nothing more is passed. Bounded: it is a label of metrics."""

    DENIED = "Denied"  # allow said no
    MALFORMED = "Malformed"  # not a request head, chunk or trailer as RFC 9112 has it
    TOO_LARGE = "TooLarge"  # the head, the trailers
    AMBIGUOUS_LENGTH = "AmbiguousLength"  # two servers may read different lengths
    PARSERS_DISAGREE = "ParsersDisagree"  # llhttp reads another end, or an error
    CONNECT = "Connect"  # a tunnel, whose names nobody would check
    UPGRADE = "Upgrade"  # after the first request, or to HTTP/2
    HELD_TOO_MUCH = "HeldTooMuch"  # the client went on without waiting for the answer to its Upgrade
    AFTER_CLOSE = "AfterClose"  # bytes after a request that ends the connection

    @property
    def status(self) -> int:
        """The HTTP status that says so, where a response can be sent: before any request was passed."""
        return _STATUSES.get(self, 400)


_STATUSES = {Refusal.DENIED: 403, Refusal.TOO_LARGE: 431, Refusal.CONNECT: 405}


class _RefusedError(Exception):
    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal


class _Listener:
    """Counts the messages that llhttp saw end. No reference back to the guard: a cycle would need the garbage collector."""

    __slots__ = ("ended",)

    def __init__(self) -> None:
        self.ended = 0

    def on_message_complete(self) -> None:
        self.ended += 1


class RequestGuard:
    """Checks what the client sends on one plain HTTP connection, from its first byte on.

    Hand every byte of the client to feed and pass on what it returns. While awaiting_response, also hand every byte of the
    server to on_response before it goes to the client. Once opaque, neither is needed any more. When refused is set, nothing
    more is passed: close, after a response if requests is 0 (else it would be taken for the answer to an earlier request).

    allow(name, mismatch) is called once for each request, in order, with its domain or None; mismatch as in Sniffed.
    requests counts those that were allowed. An end of stream needs no call: a request cut short stays held.
    """

    __slots__ = (
        "_allow", "_closes", "_held", "_left", "_listener", "_max_head", "_max_held", "_offers_http", "_parser", "_response",
        "_state", "_switched", "awaiting_response", "opaque", "refused", "requests",
    )  # fmt: skip

    def __init__(
        self, allow: Callable[[str | None, bool], bool], max_head_bytes: int = MAX_HEAD, max_held_bytes: int = MAX_HELD
    ) -> None:
        self.opaque = False
        self.awaiting_response = False  # an Upgrade was passed, the server has not answered it
        self.refused: Refusal | None = None
        self.requests = 0
        self._allow = allow
        self._max_head = max_head_bytes
        self._max_held = max_held_bytes
        self._held = b""  # came, not yet passed
        self._response = b""  # of the server, while awaiting_response
        self._offers_http = False
        self._closes = False  # the request being read is the connection's last
        self._switched = False  # the server said 101 before the body was over
        self._left = 0  # bytes of the body or chunk still to come
        self._state = _HEAD
        self._listener = _Listener()
        self._parser = httptools.HttpRequestParser(self._listener)

    def feed(self, data: bytes) -> tuple[bytes, Refusal | None]:
        """The bytes that may go to the server now, and why the rest never will (None: it may, later)."""
        if self.opaque:
            return data, None
        if self.refused is not None:
            return b"", self.refused
        buffer = self._held + data if self._held else data
        at, before = 0, -1
        try:
            while before < at < len(buffer):
                before = at
                at = self._STEPS[self._state](self, buffer, at)
        except _RefusedError as error:
            self.refused = error.refusal
            self._held = b""
            self.awaiting_response = False
        else:
            self._held = buffer[at:]
        return buffer[:at], self.refused

    def on_response(self, data: bytes) -> tuple[bytes, Refusal | None]:
        """Bytes of the server, in order, while awaiting_response. Returns what feed does: what was held may now go.

        With a refusal, data must not go to the client either.
        """
        if not self.awaiting_response:
            return b"", self.refused
        self._response += data
        status = self._final_status()
        if status is None:
            if len(self._response) < MAX_HEAD:
                return b"", None
            status = 0  # no interim response is as long
        self.awaiting_response = False
        self._response = b""
        if status != 101:
            if self._state == _WAITING:
                self._end_request()
            return self.feed(b"")
        if self._offers_http:
            self.refused = Refusal.UPGRADE
            self._held = b""
            return b"", self.refused
        if self._state != _WAITING:
            self._switched = True  # at the end of the request's body
            return b"", None
        self._switch()
        held, self._held = self._held, b""
        return held, None

    # Steps: the buffer and where to go on; the place reached, or the same if more bytes are needed.

    def _read_head(self, buffer: bytes, at: int) -> int:
        end = buffer.find(b"\r\n\r\n", at, at + self._max_head)
        data = buffer[at : end + 4] if end >= 0 else buffer[at : at + self._max_head]
        try:
            head = request_head(data, self._max_head)
        except ValueError as error:
            raise _RefusedError(Refusal.MALFORMED if len(data) < self._max_head else Refusal.TOO_LARGE) from error
        if head is None:
            return at
        if head.method == b"CONNECT":
            raise _RefusedError(Refusal.CONNECT)
        fields = field_lines(data, head)
        length = _body_length(head, fields)
        offers = _tokens(fields, b"upgrade")
        if offers and self.requests:
            raise _RefusedError(Refusal.UPGRADE)
        self._compare(_plain(data, head, fields, bool(offers)), length == 0)
        if not self._allow(head.name if isinstance(head.name, str) else None, head.mismatch):
            raise _RefusedError(Refusal.DENIED)
        self.requests += 1
        self.awaiting_response = bool(offers)
        self._offers_http = any(offer.partition(b"/")[0] in _HTTP_AGAIN for offer in offers)
        options = _tokens(fields, b"connection")
        self._closes = b"close" in options or (head.minor == 0 and b"keep-alive" not in options)
        if length == 0:
            self._end_request()
        else:
            self._left = length
            self._state = _CHUNK_HEAD if length < 0 else _BODY
        return at + head.length

    def _read_body(self, buffer: bytes, at: int) -> int:
        end = self._take(buffer, at)
        self._compare(buffer[at:end], self._left == 0)
        if self._left == 0:
            self._end_request()
        return end

    def _read_chunk_head(self, buffer: bytes, at: int) -> int:
        end = buffer.find(b"\r\n", at, at + 17)
        if end < 0:
            if not _CHUNK_SIZE_BEGUN.fullmatch(buffer, at):
                raise _RefusedError(Refusal.MALFORMED)
            return at
        if not _CHUNK_SIZE.fullmatch(buffer, at, end):
            raise _RefusedError(Refusal.MALFORMED)
        self._compare(buffer[at : end + 2], False)
        self._left = int(buffer[at:end], 16)
        self._state = _CHUNK if self._left else _TRAILERS
        return end + 2

    def _read_chunk(self, buffer: bytes, at: int) -> int:
        end = self._take(buffer, at)
        self._compare(buffer[at:end], False)
        if self._left == 0:
            self._state = _CHUNK_END
        return end

    def _read_chunk_end(self, buffer: bytes, at: int) -> int:
        found = buffer[at : at + 2]
        if found != b"\r\n":
            if found == b"\r":
                return at
            raise _RefusedError(Refusal.MALFORMED)
        self._compare(found, False)
        self._state = _CHUNK_HEAD
        return at + 2

    def _read_trailers(self, buffer: bytes, at: int) -> int:
        trailers = b"\r\n"
        if not buffer.startswith(trailers, at):
            end = buffer.find(b"\r\n\r\n", at, at + MAX_TRAILERS)
            if end < 0:
                if len(buffer) - at >= MAX_TRAILERS:
                    raise _RefusedError(Refusal.TOO_LARGE)
                return at
            trailers = buffer[at : end + 4]
        if not _TRAILER_LINES.fullmatch(trailers):
            raise _RefusedError(Refusal.MALFORMED)
        names = {line.partition(b":")[0].lower().replace(b"_", b"-") for line in trailers.split(b"\r\n")}
        if names & _FRAMING:  # a server may merge them into the head, RFC 9110 §6.5.1
            raise _RefusedError(Refusal.AMBIGUOUS_LENGTH)
        self._compare(trailers, True)
        self._end_request()
        return at + len(trailers)

    def _hold(self, buffer: bytes, at: int) -> int:
        if len(buffer) - at > self._max_held:
            raise _RefusedError(Refusal.HELD_TOO_MUCH)
        return at

    def _refuse_more(self, buffer: bytes, at: int) -> int:
        raise _RefusedError(Refusal.AFTER_CLOSE)

    def _pass_rest(self, buffer: bytes, at: int) -> int:
        return len(buffer)

    # By state. No bound method is kept in the object: that would make it a cycle.
    _STEPS = (
        _read_head,
        _read_body,
        _read_chunk_head,
        _read_chunk,
        _read_chunk_end,
        _read_trailers,
        _hold,
        _refuse_more,
        _pass_rest,
    )

    # What the steps share

    def _take(self, buffer: bytes, at: int) -> int:
        end = min(len(buffer), at + self._left)
        self._left -= end - at
        return end

    def _compare(self, data: bytes, ends: bool) -> None:
        """Refuse unless llhttp, too, says that the message ends with these bytes, or that it does not."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            raise _RefusedError(Refusal.PARSERS_DISAGREE) from error
        if self._listener.ended != ends:
            raise _RefusedError(Refusal.PARSERS_DISAGREE)
        self._listener.ended = 0

    def _end_request(self) -> None:
        if self.awaiting_response:
            self._state = _WAITING
        elif self._switched:
            self._switch()
        else:
            self._state = _CLOSED if self._closes else _HEAD

    def _final_status(self) -> int | None:
        """The status of the server's answer after interim ones; 0 if that is no HTTP; None if more bytes are needed."""
        while len(self._response) >= _STATUS_BYTES:
            match = _STATUS.match(self._response)
            if match is None:
                return 0
            status = int(match.group(1))
            if status >= 200 or status == 101:
                return status
            end = self._response.find(b"\r\n\r\n")
            if end < 0:
                return None
            self._response = self._response[end + 4 :]
        return None

    def _switch(self) -> None:
        self.opaque = True
        self._state = _OPAQUE


def _body_length(head: RequestHead, fields: list[tuple[bytes, bytes]]) -> int:
    """Bytes of the body, -1 for chunks. Only what every server reads the same: RFC 9112 §6.1, §6.3."""
    lengths: list[bytes] = []
    codings: list[bytes] = []
    for name, value in fields:
        if name == b"content-length":
            lengths.append(value)
        elif name == b"transfer-encoding":
            codings.append(value.lower())
        elif b"_" in name and name.replace(b"_", b"-") in _FRAMING:  # the same to a server that speaks CGI
            raise _RefusedError(Refusal.AMBIGUOUS_LENGTH)
    if codings:
        if codings != [b"chunked"] or lengths or head.minor == 0:
            raise _RefusedError(Refusal.AMBIGUOUS_LENGTH)
        return -1
    if not lengths:
        return 0
    if len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]):
        raise _RefusedError(Refusal.AMBIGUOUS_LENGTH)
    return int(lengths[0])


def _tokens(fields: list[tuple[bytes, bytes]], wanted: bytes) -> list[bytes]:
    """The members of a list-valued field, in lower case."""
    values = b",".join([value for name, value in fields if name == wanted]).lower()
    return [token.strip(b" \t") for token in values.split(b",") if token.strip(b" \t")]


def _plain(data: bytes, head: RequestHead, fields: list[tuple[bytes, bytes]], upgrades: bool) -> bytes:
    """The head as llhttp is asked about it: where the request ends.

    It knows a fixed list of methods, refuses UTF-8 in the target, and lets a body go with an Upgrade: none of its business.
    """
    known = head.method in METHODS and data[: head.fields_at].isascii()
    if known and not upgrades:
        return data
    line = data[: head.fields_at] if known else b"POST / HTTP/1.%d\r\n" % head.minor
    kept = [b"%s: %s\r\n" % field for field in fields if field[0] != b"upgrade"]
    return line + b"".join(kept) + b"\r\n"
