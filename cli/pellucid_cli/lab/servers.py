"""Servers that write down what reached them: the only witness that counts for what a proxy let pass.

They run as threads of this process, on sockets opened inside a namespace. HTTP, TLS and SMTP, as much as it takes to be
talked to by ordinary clients.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from .topology import Namespace

ANONYMOUS = "AECDH-AES256-SHA:@SECLEVEL=0"
"""TLS with a key exchange that needs no certificate: the lab makes no keys and trusts nobody. Never for anything real."""

PATIENCE_S = 10.0  # of a server for a silent client


@dataclass
class Arrival:
    """One connection as its server saw it. name: SNI, or the Host of the last request; requests: targets, or mail commands,
    in order; received: bytes of the client after decryption; at: time.monotonic() of its acceptance.
    ended: the connection is over and nothing here changes any more."""

    server: str
    protocol: str
    source: str
    dialled: str
    port: int
    name: str | None = None
    requests: list[str] = field(default_factory=list)
    received: int = 0
    at: float = field(default_factory=time.monotonic)
    ended: bool = False


class Journal:
    """Arrivals of any number of servers, in the order of their acceptance. Safe to use from several threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._arrivals: list[Arrival] = []

    def open(self, arrival: Arrival) -> None:
        """A connection was accepted."""
        with self._changed:
            self._arrivals.append(arrival)
            self._changed.notify_all()

    def close(self, arrival: Arrival) -> None:
        """It has ended."""
        with self._changed:
            arrival.ended = True
            self._changed.notify_all()

    def arrivals(self, since: int = 0) -> list[Arrival]:
        """A copy of the list from index since on."""
        with self._changed:
            return self._arrivals[since:]

    def __len__(self) -> int:
        with self._changed:
            return len(self._arrivals)

    def wait(self, holds: Callable[[list[Arrival]], bool], timeout_s: float, since: int = 0) -> bool:
        """True as soon as holds(arrivals from since on); False after timeout_s."""
        with self._changed:
            return self._changed.wait_for(lambda: holds(self._arrivals[since:]), timeout_s)

    def wait_ended(self, timeout_s: float, since: int = 0, count: int = 0) -> bool:
        """True as soon as at least count connections from index since on have come and all that came have ended."""
        return self.wait(lambda seen: len(seen) >= count and all(each.ended for each in seen), timeout_s, since)


Talk = Callable[[socket.socket, Arrival], None]
"""Speaks with one client until it goes; may raise OSError. The caller closes the socket."""


class RecordingServer:
    """Listens on ports of namespace, on each of its addresses (or those given); a context manager.

    ports: port to talk(); journal: where arrivals go.
    """

    def __init__(
        self, namespace: Namespace, ports: Mapping[int, Talk], journal: Journal, addresses: Iterable[str] | None = None
    ) -> None:
        self.name = namespace.name
        self._journal = journal
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._listeners: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        for address in namespace.addresses if addresses is None else addresses:
            for port, talk in ports.items():
                listener = namespace.listen(address, port)
                self._listeners.append(listener)
                self._start(self._accept, listener, talk)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """No socket and no thread of the server is left; live connections are reset or cut."""
        with self._lock:
            self._closed = True
            opened = [*self._open, *self._listeners]
        for each in opened:
            _shutdown(each)
        for thread in self._threads:
            thread.join()
        for listener in self._listeners:
            listener.close()

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name=f"server {self.name}", daemon=True)
        with self._lock:
            self._threads = [each for each in self._threads if each.is_alive() or each.ident is None]
            self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket, talk: Talk) -> None:
        while True:
            try:
                client, peer = listener.accept()
            except OSError:  # shut down by close()
                return
            address, port = listener.getsockname()[:2]
            arrival = Arrival(self.name, talk.__name__.removeprefix("speak_"), peer[0], address, port)
            self._journal.open(arrival)
            self._start(self._serve, client, talk, arrival)

    def _serve(self, client: socket.socket, talk: Talk, arrival: Arrival) -> None:
        client.settimeout(PATIENCE_S)
        with self._lock:
            self._open.add(client)
            closed = self._closed
        try:
            if not closed:
                talk(client, arrival)
        except OSError:  # the client went; TLS errors are OSErrors, too
            pass
        finally:
            with self._lock:
                self._open.discard(client)
            client.close()
            self._journal.close(arrival)


def _shutdown(each: socket.socket) -> None:
    try:
        each.shutdown(socket.SHUT_RDWR)
    except OSError:  # not connected any more
        pass


def speak_http(client: socket.socket, arrival: Arrival) -> None:
    """Answers every request of a connection, pipelined ones too, with 200 and a line that says who heard what from whom.

    GET /bytes/N is answered with N bytes. Request bodies are not read: send none."""
    pending = b""
    while True:
        while b"\r\n\r\n" not in pending:
            more = client.recv(65536)
            if not more:
                return
            arrival.received += len(more)
            pending += more
        head, _, pending = pending.partition(b"\r\n\r\n")
        target, host, last = _read_head(head.decode("latin-1"))
        arrival.name = host
        arrival.requests.append(target)
        body = f"{arrival.server} heard {host} from {arrival.source}\n".encode()
        if target.startswith("/bytes/"):
            body = bytes(int(target.removeprefix("/bytes/")))
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        if last:
            return


def _read_head(head: str) -> tuple[str, str | None, bool]:
    """Target, Host and whether the client wants no more than this answer."""
    request, *lines = head.split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return request.split(" ")[1], headers.get("host"), headers.get("connection", "").lower() == "close"


def speak_https(client: socket.socket, arrival: Arrival) -> None:
    """HTTP in TLS 1.2 without certificates; the arrival's name is the SNI, or None without one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # 1.3 knows no anonymous key exchange
    context.set_ciphers(ANONYMOUS)
    asked: list[str | None] = []
    context.sni_callback = lambda _socket, name, _context: asked.append(name)
    try:
        with context.wrap_socket(client, server_side=True) as secure:
            speak_http(secure, arrival)
    finally:
        arrival.name = asked[0] if asked else None


def speak_smtp(client: socket.socket, arrival: Arrival) -> None:
    """Speaks first, as a mail server does; takes commands until QUIT."""
    client.sendall(f"220 {arrival.server} ESMTP\r\n".encode())
    with client.makefile("rb") as lines:
        for line in lines:
            arrival.received += len(line)
            command = line.decode("latin-1").strip()
            arrival.requests.append(command)
            if command.upper() == "QUIT":
                client.sendall(b"221 bye\r\n")
                return
            client.sendall(f"250 {arrival.server} heard {command} from {arrival.source}\r\n".encode())
