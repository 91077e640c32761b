"""The two ends of a connection under test: a server that says whom it sees, and a stand-in for the proxy."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from pellucid_cli.lab.topology import Namespace
from pellucid_proxy.settings import Marks, NodeSettings

IP_TRANSPARENT, IPV6_TRANSPARENT, IP_BIND_ADDRESS_NO_PORT = 19, 75, 24
PATIENCE_S = 5.0


class Threads:
    """Sockets served by threads of a namespace, until the end of a `with`."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()

    def keep(self, opened: socket.socket) -> socket.socket:
        with self._lock:
            self._sockets.append(opened)
        return opened

    def drop(self, *opened: socket.socket) -> None:
        with self._lock:
            self._sockets = [each for each in self._sockets if each not in opened]
        for each in opened:
            each.close()

    def start(self, function: Callable[..., None], *args: object) -> threading.Thread:
        thread = threading.Thread(target=self._quietly, args=(function, *args), daemon=True)
        with self._lock:
            self._threads = [each for each in self._threads if each.is_alive()]
            thread.start()
            self._threads.append(thread)
        return thread

    def close(self) -> None:
        with self._lock:
            sockets, threads = self._sockets[:], self._threads[:]
        for opened in sockets:
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits in accept or recv
        for thread in threads:
            thread.join(PATIENCE_S)
        for opened in sockets:
            opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @staticmethod
    def _quietly(function: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(OSError):  # the other end went away, or close() did
            function(*args)


class Peer(Threads):
    """A TCP server on every address of a namespace: it says `<namespace> <address it sees>` in a line, then echoes.

    seen: the client addresses of all connections, in order.
    """

    def __init__(self, namespace: Namespace, port: int) -> None:
        super().__init__()
        self.name = namespace.name
        self.seen: list[str] = []
        for address in ("0.0.0.0", "::"):
            self.start(self._accept, self.keep(namespace.listen(address, port)))

    def _accept(self, listener: socket.socket) -> None:
        while True:
            connection, peer = listener.accept()
            self.keep(connection)
            self.seen.append(peer[0])
            self.start(self._echo, connection, peer[0])

    def _echo(self, connection: socket.socket, client: str) -> None:
        try:
            connection.sendall(f"{self.name} {client}\n".encode())
            while data := connection.recv(65536):
                connection.sendall(data)
        finally:
            self.drop(connection)


class StandIn(Threads):
    """What the proxy does, at its simplest: takes what TPROXY hands over, dials where it was going, relays.

    source: "Pod" or "Node", what servers see. taken: (client address, destination address, destination port) of every connection.
    dial False: connections are only accepted. mark: what upstream sockets carry, by default the egress mark.
    """

    def __init__(self, node: Namespace, settings: NodeSettings, *, source: str = "Pod", dial: bool = True) -> None:
        super().__init__()
        self.source = source
        self.settings = settings
        self.taken: list[tuple[str, str, int]] = []
        self._dial = dial
        self._clients: list[socket.socket] = []
        for address in ("127.0.0.1", "::1"):
            listener = self.keep(transparent_listener(node, address, settings.listen_port))
            self.start(node.call, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            client, peer = listener.accept()
            self.keep(client)
            self._clients.append(client)
            target = client.getsockname()
            self.taken.append((peer[0], target[0], target[1]))
            if self._dial:
                self.start(self._relay, client, peer[0], target[:2])  # threads start in their parent's namespace

    def vanish(self) -> None:
        """Close every accepted connection at once, with a reset, and nothing else."""
        for client in self._clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()

    def _relay(self, client: socket.socket, source: str, target: tuple[str, int]) -> None:
        spoofed = source if self.source == "Pod" else None
        upstream = self.keep(spoofing_socket(client.family, spoofed, self.settings.marks.egress))
        try:
            upstream.connect(target)
        except OSError:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, as the server's
            self.drop(client, upstream)
            return
        for each in (client, upstream):
            each.settimeout(None)  # before two threads share it
        other_way = self.start(_pump, client, upstream)
        self._quietly(_pump, upstream, client)
        other_way.join()
        self.drop(client, upstream)


def transparent_listener(node: Namespace, address: str, port: int) -> socket.socket:
    """A listener of node that TPROXY may hand connections to."""
    listener = node.open_socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, Marks().intercept)  # as the product's
    _set_transparent(listener)
    listener.bind((address, port))
    listener.listen(4096)
    return listener


def spoofing_socket(family: int, source: str | None, mark: int) -> socket.socket:
    """A socket of the calling thread's namespace that carries mark and, if source is given, that address as its own."""
    opened = socket.socket(family, socket.SOCK_STREAM)
    opened.settimeout(PATIENCE_S)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    if source is not None:
        _set_transparent(opened)
        opened.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        opened.bind((source, 0))
    return opened


def ask(
    pod: Namespace, address: str, port: int, *, payload: bytes = b"x" * 200_000, timeout_s: float = PATIENCE_S
) -> str:
    """The line with which a Peer greets pod, after payload came back whole. Raises OSError."""
    with pod.connect(address, port, timeout_s=timeout_s) as connection:
        return converse(connection, payload)


def converse(connection: socket.socket, payload: bytes = b"x" * 1000) -> str:
    """The greeting of the Peer at the other end, after payload came back whole. Raises OSError."""
    writer = threading.Thread(target=Threads._quietly, args=(connection.sendall, payload))
    writer.start()
    data = b""
    while b"\n" not in data or len(data) < data.index(b"\n") + 1 + len(payload):
        more = connection.recv(65536)
        if not more:
            raise ConnectionError(f"end of stream after {len(data)} bytes")
        data += more
    writer.join()
    greeting, _, echo = data.partition(b"\n")
    assert echo == payload
    return greeting.decode()


def echo(connection: socket.socket, payload: bytes = b"still there?") -> bool:
    """Whether a greeted Peer, at the other end, still echoes."""
    connection.sendall(payload)
    data = b""
    while len(data) < len(payload):
        more = connection.recv(65536)
        if not more:
            return False
        data += more
    return data == payload


def ping(host: Namespace, address: str, timeout_s: float = PATIENCE_S) -> bool:
    """Whether address answers an ICMP echo request of host within timeout_s. Raises OSError for a refusal by ICMP."""
    v6 = ":" in address
    family, protocol = (socket.AF_INET6, socket.IPPROTO_ICMPV6) if v6 else (socket.AF_INET, socket.IPPROTO_ICMP)
    with host.open_socket(family, socket.SOCK_RAW, protocol) as opened:
        opened.connect((address, 0))
        body = struct.pack("!HH", 0x1234, 1)
        kind, checksum = (128, 0) if v6 else (8, 0xFFFF - (0x0800 + 0x1234 + 1))  # the kernel fills in ICMPv6's
        opened.send(struct.pack("!BBH", kind, 0, checksum) + body)
        while readable(opened, timeout_s):
            data = opened.recv(1500)
            if data[0 if v6 else 20] == (129 if v6 else 0):
                return True
    return False


def _set_transparent(opened: socket.socket) -> None:
    if opened.family == socket.AF_INET6:
        opened.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
    else:
        opened.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    while data := source.recv(65536):
        sink.sendall(data)
    sink.shutdown(socket.SHUT_WR)


def readable(opened: socket.socket, timeout_s: float) -> bool:
    """Whether opened has something to read, an end or an error included, within timeout_s."""
    with selectors.DefaultSelector() as selector:
        selector.register(opened, selectors.EVENT_READ)
        return bool(selector.select(timeout_s))
