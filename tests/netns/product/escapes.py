"""Attackers who do what a technique of tests/escapes says, and the victims' ears, which alone say what got through."""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from pellucid_cli.lab.topology import Namespace
from tests.escapes.corpus import Packet, Server, Step, Technique, raw
from tests.escapes.wire import TOKEN, datagrams, hello

from ..peers import readable
from ..world import eventually

PATIENCE_S = 8.0  # longer than the proxy waits for first bytes
FENCE, FENCE_PORT = b"FENCE", 9
ETH_P_ALL, ETH_P_IP, ETH_P_IPV6, ETH_P_8021Q = 3, 0x0800, 0x86DD, 0x8100
RESET = struct.pack("ii", 1, 0)


class Ears:
    """Listens on ports of host, in both families, and keeps what comes, by port and the client's address. A context manager.

    servers: what to say on a port; a port without an entry says nothing."""

    def __init__(self, host: Namespace, ports: Mapping[int, Server]) -> None:
        self._servers = ports
        self._heard: dict[tuple[int, str], bytes] = {}
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._wake, waker = socket.socketpair()
        self._selector.register(waker, selectors.EVENT_READ)
        self._waker = waker
        listeners = host.call(lambda: [_listener(version, port) for port in ports for version in (4, 6)])
        for listener in listeners:
            self._selector.register(listener, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._listen, name=f"ears of {host.name}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._wake.send(b"x")
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]  # all of them are sockets
        self._selector.close()
        self._wake.close()

    def heard(self, port: int, client: str) -> bytes | None:
        """All bytes that came to port from client, None if it never connected."""
        with self._lock:
            return self._heard.get((port, client))

    def _listen(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._waker:
                    return
                with contextlib.suppress(OSError):
                    if key.data is None:
                        self._accept(key.fileobj)  # type: ignore[arg-type]
                    else:
                        self._read(key.fileobj, key.data)  # type: ignore[arg-type]

    def _accept(self, listener: socket.socket) -> None:
        client, peer = listener.accept()
        place = (listener.getsockname()[1], peer[0])
        with self._lock:
            self._heard.setdefault(place, b"")
        self._selector.register(client, selectors.EVENT_READ, place)
        client.sendall(raw(self._servers[place[0]].first))

    def _read(self, client: socket.socket, place: tuple[int, str]) -> None:
        try:
            data = client.recv(65536)
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(client)
            client.close()
            return
        with self._lock:
            begun = self._heard[place]
            self._heard[place] = begun + data
        if not begun:
            client.sendall(raw(self._servers[place[0]].answer))


def _listener(version: int, port: int) -> socket.socket:
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if version == 6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.bind(("", port))
    listener.listen(64)
    return listener


@dataclass(frozen=True)
class Attack:
    """A technique that is a connection: from pod to address and port. spare: a server that the pod may reach, on port 80."""

    technique: Technique
    pod: Namespace
    address: str
    port: int
    spare: str

    def run(self, ears: Ears, client: str) -> str:
        """How it ended for the attacker; client: its address as ears see it."""
        try:
            with self._open() as connection:
                for step in self._connect(connection):
                    if step.wait == "accepted":
                        eventually(lambda: ears.heard(self.port, client) is not None)
                    else:
                        self._do(connection, step)
                return _end(connection)
        except (ConnectionResetError, ConnectionRefusedError, BrokenPipeError):
            return "reset"
        except TimeoutError:
            return "silence"
        except OSError:
            return "unreachable"

    def run_unguarded(self, ears: Ears, client: str) -> bytes | None:
        """What arrives of it where nothing forbids it."""
        with contextlib.suppress(OSError), self._open() as connection:
            for step in self._connect(connection):
                if step.wait == "accepted":
                    eventually(lambda: ears.heard(self.port, client) is not None)
                else:
                    self._do(connection, step)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
        return ears.heard(self.port, client)

    def _open(self) -> socket.socket:
        if self.technique.client.used_before:
            with self._socket() as before:
                before.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                before.connect((self.spare, 80))
        return self._socket()

    def _socket(self) -> socket.socket:
        spec = self.technique.client
        connection = self.pod.open_socket(socket.AF_INET6 if ":" in self.address else socket.AF_INET)
        connection.settimeout(PATIENCE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if spec.mark:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, spec.mark)
        if spec.source_port:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if connection.family == socket.AF_INET6:
                connection.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            connection.bind(("", spec.source_port))
        return connection

    def _connect(self, connection: socket.socket) -> tuple[Step, ...]:
        """Connects, and returns the steps that are left to do."""
        steps = self.technique.steps
        if self.technique.client.fast_open:
            connection.settimeout(None)  # else it ends with EINPROGRESS where there is no cookie yet
            connection.sendto(raw(steps[0].send or ""), socket.MSG_FASTOPEN, (self.address, self.port))
            connection.settimeout(PATIENCE_S)
            return steps[1:]
        connection.connect((self.address, self.port))
        return steps

    @staticmethod
    def _do(connection: socket.socket, step: Step) -> None:
        if step.wait == "answer":
            connection.recv(65536)
        elif step.end:
            connection.shutdown(socket.SHUT_WR)
        elif step.urgent is not None:
            connection.send(raw(step.urgent), socket.MSG_OOB)
        else:
            for segment in segments(step):
                connection.sendall(segment)


def segments(step: Step) -> Iterator[bytes]:
    """The bytes of a step that is sent, as they are written to the socket."""
    data, size = sent(step), 0
    if step.trickle is not None:
        size = 1
    elif step.hello is not None:
        size = step.hello.segment
    size = size or len(data)
    for at in range(0, len(data), size or 1):
        yield data[at : at + size]


def sent(step: Step) -> bytes:
    """The bytes of a step that stand in the stream; the urgent one stands beside it."""
    if step.hello is not None:
        return hello(step.hello)
    if step.urgent is not None:
        return raw(step.urgent)[:-1]
    return raw(step.send or step.trickle or "")


def _end(connection: socket.socket) -> str:
    """How a connection ends that the attacker leaves open."""
    said = b""
    while data := connection.recv(65536):
        said += data
    if said.startswith(b"\x15\x03"):
        return "alert"
    return {b"HTTP/1.1 421": "misdirected", b"HTTP/1.1 403": "forbidden", b"HTTP/1.1 40": "response"}.get(
        said[:12] if said[9:12] in (b"421", b"403") else said[:11], "closed"
    )


@dataclass
class Wire:
    """A pod's interface, to put any frame on, and a victim's, to see what arrives. A context manager."""

    node: Namespace
    pod: Namespace
    victim: Namespace
    hosts: Mapping[str, Namespace]
    _open: list[socket.socket] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._frames = self._socket(self.pod)
        self._tap = self._socket(self.victim)
        self._ethernet = _mac(self.node, self.pod.interface) + _mac(self.pod, "eth0")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self._open:
            each.close()

    def arrived(self, packet: Packet) -> int:
        """How many frames with the token reach the victim after packet was sent. What comes in behind it, by the same way, says when."""
        source = self._address(packet.source, packet.version, self.pod)
        to = self._address(packet.to or self.victim.name, packet.version, self.victim)
        count = 0
        for nth in range(packet.times):
            for datagram in datagrams(packet, source, to, nth):
                self._frames.send(self._frame(packet, datagram))
            while readable(self._tap, 0):  # a flood must not fill the buffer of those who count it
                count += TOKEN in self._receive()
        with self.pod.open_socket(socket.AF_INET, socket.SOCK_DGRAM) as fence:
            fence.connect((self.victim.ipv4, FENCE_PORT))
            fence.send(FENCE)
        try:
            while FENCE not in (frame := self._receive()):
                count += TOKEN in frame
        except TimeoutError as err:
            raise TimeoutError(f"no fence of {self.pod.name} behind {packet}") from err
        return count

    def _receive(self) -> bytes:
        frame, (_, _, kind, *_) = self._tap.recvfrom(65536)
        return b"" if kind == socket.PACKET_OUTGOING else frame

    def _frame(self, packet: Packet, datagram: bytes) -> bytes:
        kind = struct.pack("!H", ETH_P_IPV6 if packet.version == 6 else ETH_P_IP)
        tag = b"" if packet.tagged is None else struct.pack("!HH", ETH_P_8021Q, packet.tagged)
        return self._ethernet + tag + kind + datagram

    def _address(self, who: str, version: int, own: Namespace) -> str:
        host = own if who == "own" else self.hosts.get(who)
        if host is None:
            return who
        return host.ipv6 if version == 6 else host.ipv4

    def _socket(self, host: Namespace) -> socket.socket:
        opened = host.open_socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        opened.bind(("eth0", ETH_P_ALL))
        opened.settimeout(PATIENCE_S)
        self._open.append(opened)
        return opened


def _mac(host: Namespace, interface: str) -> bytes:
    (said,) = json.loads(host.run(["ip", "-j", "link", "show", interface]).stdout)
    return bytes.fromhex(said["address"].replace(":", ""))
