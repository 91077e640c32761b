"""The engine on loopback, stepped by the test itself: no thread, no sleep, and every wait has an end."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pellucid_proxy.engine import relay
from pellucid_proxy.engine.share import Share
from pellucid_proxy.settings import Marks, NodeSettings

WAIT, DIAL, RACE, REFUSE, HOLD = relay.steps
LOCALHOST = b"\x7f\0\0\1"
PATIENCE_S = 10.0


def settings(**changes: Any) -> NodeSettings:
    """Settings without a mark: setting one needs rights."""
    return NodeSettings(scope=(), marks=Marks(egress=0), **changes)


@dataclass
class Script:
    """A session that answers as told, and notes what it was told. A step may be a function of the bytes so far."""

    target: tuple[bytes, int] | None = None
    on_opened: int = WAIT
    on_received: int | Callable[[bytes], int] = DIAL
    on_silent: int = WAIT
    on_server: int = DIAL
    on_late: int = REFUSE
    on_expired: int = WAIT
    on_review: int | Exception = 0
    answer: bytes | None = None
    spoof: bool = False
    redial: bool = False
    handshake: Any = None
    guard: Any = None
    held: bytes = b""
    opaque: bool = False
    unknown: bool = False
    is_known: bool = False
    share: Share = field(default_factory=Share)
    heard: list[Any] = field(default_factory=list)

    def opened(self) -> int:
        self.heard.append("opened")
        return self.on_opened

    def received(self, data: bytes) -> int:
        self.heard.append(data)
        return self.on_received(data) if callable(self.on_received) else self.on_received

    def silent(self) -> int:
        self.heard.append("silent")
        return self.on_silent

    def server_spoke(self) -> int:
        self.heard.append("server_spoke")
        return self.on_server

    def gave_up(self) -> int:
        self.heard.append("gave_up")
        return self.on_late

    def review(self) -> int:
        self.heard.append("review")
        if isinstance(self.on_review, Exception):
            raise self.on_review
        return self.on_review

    def reply(self) -> bytes | None:
        return self.answer

    def known(self) -> bool:
        return self.is_known

    def found(self) -> None:
        self.heard.append("found")
        self.unknown = False

    def expired(self) -> int:
        self.heard.append("expired")
        self.unknown = False
        return self.on_expired


@dataclass(frozen=True)
class Ended:
    why: int
    connected: bool
    answered: bool
    up: int
    down: int


class Bench:
    """An engine with one listener and one origin, and what its worker heard."""

    def __init__(
        self, script: Callable[[], Any], *, roomy_pipes: int = 256, most_pipes: int = 65536, **changes: Any
    ) -> None:
        self.script = script
        self.sessions: list[Any] = []
        self.ended: list[Ended] = []
        self.failures = 0
        self.ticks = 0
        self._stack = contextlib.ExitStack()
        self._epoll = self._stack.enter_context(contextlib.closing(select.epoll()))
        self.engine = relay.Engine(self._epoll.fileno(), False, self, settings(**changes), roomy_pipes, most_pipes)
        self.listener = self.listen()
        self.origin = self.listen()
        self.target = (LOCALHOST, self.origin.getsockname()[1])
        self.engine.listen([self.listener.fileno()])

    # What the engine calls

    def session(self, source: bytes, destination: bytes, port: int) -> Any:
        script = self.script()
        if script is None:
            raise RuntimeError("no session")
        if script.target is None:
            script.target = self.target
        self.sessions.append(script)
        assert source == destination == LOCALHOST
        assert port == self.listener.getsockname()[1]
        return script

    def closed(
        self,
        session: Any,
        source_port: int,
        why: int,
        opened: int,
        connected: int,
        answered: int,
        now: int,
        up: int,
        down: int,
    ) -> None:
        assert session in self.sessions
        assert opened <= now
        assert source_port > 0
        self.ended.append(Ended(why, connected > 0, answered > 0, up, down))

    def failed(self) -> None:
        self.failures += 1

    def lagged(self, nanoseconds: int) -> None: ...

    def tick(self) -> None:
        self.ticks += 1

    # What a test calls

    def listen(self) -> socket.socket:
        sock = self._stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=128))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as the product's: accepted sockets inherit it
        sock.setblocking(False)
        return sock

    def connect(self) -> socket.socket:
        sock = self._stack.enter_context(socket.create_connection(self.listener.getsockname()))
        sock.setblocking(False)
        return sock

    def accept(self) -> socket.socket:
        """The connection that arrived at the origin."""
        sock, _ = self.until(lambda: _attempt(self.origin.accept))
        self._stack.enter_context(sock)
        sock.setblocking(False)
        return sock

    def nothing_arrives(self) -> bool:
        """Whether the origin's queue is empty after every event at hand was handled."""
        self.settle()
        return _attempt(self.origin.accept) is None

    def settle(self) -> None:
        while self.engine.poll(20) > 0:
            pass

    def until(self, attempt: Callable[[], Any]) -> Any:
        """Step the engine until attempt returns something true, and return it."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := attempt()):
            assert time.monotonic() < deadline, f"nothing happened; ended: {self.ended}"
            self.engine.poll(5)
        return found

    def read(self, sock: socket.socket, count: int) -> bytes:
        """Exactly count bytes."""
        data = bytearray()

        def enough() -> bool:
            data.extend(_attempt(lambda: sock.recv(count - len(data))) or b"")
            return len(data) == count

        self.until(enough)
        return bytes(data)

    def ends(self, sock: socket.socket) -> str:
        """How the stream ends, after whatever it still holds: "end" or "reset"."""

        def attempt() -> str | None:
            try:
                return None if sock.recv(65536) else "end"
            except BlockingIOError:
                return None
            except ConnectionResetError:
                return "reset"

        return str(self.until(attempt))

    def close(self) -> None:
        self._stack.close()


def reset(sock: socket.socket) -> None:
    """Close with a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def _attempt(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except BlockingIOError:
        return None


@contextlib.contextmanager
def bench(script: Callable[[], Any] = Script, **changes: Any) -> Iterator[Bench]:
    made = Bench(script, **changes)
    try:
        yield made
    finally:
        made.close()
