"""A new version takes the place of the one that runs, and nobody is refused meanwhile.

The supervisor that runs (predecessor) listens on NAME in the state folder; `pellucid run --takeover` (successor) connects. Both ends
accept only their own user or root. One packet of the SOCK_SEQPACKET connection is msgpack of one tagged struct:

    successor            predecessor
    TakeOver        →
                    ←    Offer, and its lock and listeners; an OfferedWorker for each worker, and its ends
    Yield           →
                    ←    Yielded: its agent has ended. Rules stay, its workers go on accepting by the policy in force
    Taken           →    the successor enforces: the predecessor's workers accept no more, and end with their last connection

Until Taken the predecessor owns the kernel's rules and takes up its work again, as after a crash of its agent, when the connection ends.
From Taken on they are the successor's. Both know the fields of each other's messages that their common protocol has; others are ignored.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from ..settings import NodeSettings
from .messages import UNREADABLE
from .notify import Manager
from .options import Refusal

NAME = "handover.sock"
PROTOCOLS = (1,)
"""What this version speaks, oldest first: its own and the one before it."""

PATIENCE_S = 20.0  # for each answer of the predecessor
MAX_PACKET = 65536
MAX_DESCRIPTORS = 8
MAX_WORKERS = 4096

T = TypeVar("T")


class TakeOver(msgspec.Struct, tag=True, frozen=True):
    """Successor to predecessor: I speak these protocols. version: for the log. run: the process that is the successor's run; 0: the other
    end of this connection. invocation: $INVOCATION_ID, if a service manager has started it."""

    protocols: tuple[int, ...]
    version: str
    run: int = 0
    invocation: str = ""


class Offer(msgspec.Struct, tag=True, frozen=True):
    """Predecessor to successor, with descriptors: the lock of the state folder, then the listeners.

    workers: how many OfferedWorker follow. manager: the service manager that knows the successor as the service's main process from
    Taken on; none where it has one of its own."""

    protocol: int
    version: str
    settings: NodeSettings
    workers: int
    manager: Manager = Manager()


class OfferedWorker(msgspec.Struct, tag=True, frozen=True):
    """Predecessor to successor, with descriptors: the agent's end of a worker's control socket, and of its flow pipe if has_flows."""

    has_flows: bool


class Denied(msgspec.Struct, tag=True, frozen=True):
    """Predecessor to successor: not now, or never."""

    why: str


class Yield(msgspec.Struct, tag=True, frozen=True):
    """Successor to predecessor: end your agent."""


class Yielded(msgspec.Struct, tag=True, frozen=True):
    """Predecessor to successor: it has ended."""


class Taken(msgspec.Struct, tag=True, frozen=True):
    """Successor to predecessor: I enforce; the rules are mine."""


ToPredecessor = TakeOver | Yield | Taken
ToSuccessor = Offer | OfferedWorker | Denied | Yielded

_to_predecessor = msgspec.msgpack.Decoder(ToPredecessor)
_to_successor = msgspec.msgpack.Decoder(ToSuccessor)


def common_protocol(theirs: Sequence[int]) -> int | None:
    """The newest protocol that both speak."""
    return max(set(PROTOCOLS) & set(theirs), default=None)


@dataclass(frozen=True, slots=True)
class InheritedWorker:
    """A worker that runs until its last connection ends. Descriptors: the agent's end of its channel, and of its flow pipe (-1: none)."""

    control: int
    flows: int


@dataclass(frozen=True, slots=True)
class Inheritance:
    """What a predecessor has handed over; its descriptors are the holder's. connection: says Taken, and breaks if the predecessor does."""

    connection: socket.socket
    settings: NodeSettings
    lock: int
    listeners: tuple[int, ...]
    workers: tuple[InheritedWorker, ...]
    manager: Manager

    def taken(self) -> None:
        """Tell the predecessor that its work is done."""
        with contextlib.suppress(ConnectionError):
            self.connection.send(msgspec.msgpack.encode(Taken()))


def take_over(state: str, version: str, run: int = 0) -> Inheritance | None:
    """Everything that the instance with this state folder has; its agent has ended then. None if no instance runs.

    Raises Refusal; then the instance goes on as before.
    """
    connection = _connected(os.path.join(state, NAME))
    if connection is None:
        return None
    received: list[int] = []
    try:
        refuse_strangers(connection)
        connection.settimeout(PATIENCE_S)
        connection.send(
            msgspec.msgpack.encode(
                TakeOver(PROTOCOLS, version, run, invocation() if "NOTIFY_SOCKET" in os.environ else "")
            )
        )
        inheritance = _inherit(connection, received)
        connection.send(msgspec.msgpack.encode(Yield()))
        _receive(connection, Yielded, received)
    except (OSError, *UNREADABLE, Refusal) as err:
        connection.close()
        for fd in received:
            os.close(fd)
        if isinstance(err, Refusal):
            raise
        raise Refusal(
            f"--takeover: the instance that runs with {state} does not answer as it should: {err}; it goes on. "
            "Cure: see its log, or stop it and start anew"
        ) from err
    connection.setblocking(False)
    return inheritance


def _connected(path: str) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        with short_path(path) as short:
            connection.connect(short)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except OSError as err:
        connection.close()
        raise Refusal(
            f"--takeover: {path}: {err.strerror}; the user who started the instance, or root, may take over"
        ) from err
    return connection


def _inherit(connection: socket.socket, received: list[int]) -> Inheritance:
    offer, descriptors = _receive(connection, Offer, received)
    if offer.protocol not in PROTOCOLS or not 0 <= offer.workers <= MAX_WORKERS or len(descriptors) < 2:
        raise Refusal(
            f"--takeover: version {offer.version} offers what this version does not know; stop it and start anew"
        )
    workers = []
    for _ in range(offer.workers):
        worker, ends = _receive(connection, OfferedWorker, received)
        if len(ends) != 1 + worker.has_flows:
            raise Refusal("--takeover: a worker was offered without its descriptors; stop the instance and start anew")
        workers.append(InheritedWorker(ends[0], ends[1] if worker.has_flows else -1))
    return Inheritance(
        connection, offer.settings, descriptors[0], tuple(descriptors[1:]), tuple(workers), offer.manager
    )


def _receive(connection: socket.socket, kind: type[T], received: list[int]) -> tuple[T, list[int]]:
    """The next message, which has to be of kind, and its descriptors, which are among received as well."""
    packet, descriptors, _, _ = socket.recv_fds(connection, MAX_PACKET, MAX_DESCRIPTORS)
    received += descriptors
    for fd in descriptors:
        os.set_inheritable(fd, False)
    if not packet:
        raise ConnectionResetError("it closed the connection")
    message = _to_successor.decode(packet)
    if isinstance(message, Denied):
        raise Refusal(f"--takeover: {message.why}")
    if not isinstance(message, kind):
        raise msgspec.ValidationError(f"{type(message).__name__} came where {kind.__name__} was due")
    return message, descriptors


class Door:
    """Where a successor knocks. Nothing here waits."""

    def __init__(self, state: str) -> None:
        """Listens at once; the name in the folder is from now on this one's. Raises OSError."""
        self._path = os.path.join(state, NAME)
        self.listener = socket.socket(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        )
        new = f"{self._path}.new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
        mask = os.umask(0o177)
        try:
            with short_path(new) as short:
                self.listener.bind(short)
            self.listener.listen(4)
            os.rename(new, self._path)
            self._identity = os.stat(self._path).st_ino
        except OSError:
            self.listener.close()
            raise
        finally:
            os.umask(mask)

    def accept(self) -> socket.socket | None:
        """A connection of somebody who may knock, non-blocking and the caller's; None if there is none."""
        try:
            connection, _ = self.listener.accept()
        except OSError:
            return None
        try:
            connection.setblocking(False)
            refuse_strangers(connection)
        except (OSError, Refusal):
            connection.close()
            return None
        return connection

    def close(self) -> None:
        """Nobody can knock any more. The name stays if it is a successor's by now."""
        self.listener.close()
        with contextlib.suppress(OSError):
            if os.stat(self._path).st_ino == self._identity:
                os.unlink(self._path)


def heard(connection: socket.socket) -> ToPredecessor | None:
    """What the successor said; None if it is gone or talks nonsense. Raises BlockingIOError."""
    try:
        packet = connection.recv(MAX_PACKET)
        return _to_predecessor.decode(packet) if packet else None
    except (ConnectionError, *UNREADABLE):
        return None


def say(connection: socket.socket, message: ToSuccessor, descriptors: Sequence[int] = ()) -> bool:
    """Whether the successor could be told."""
    try:
        socket.send_fds(connection, [msgspec.msgpack.encode(message)], list(descriptors))
    except OSError:
        return False
    return True


def invocation() -> str:
    """Of the service whose process this is; "": of none."""
    return os.environ.get("INVOCATION_ID", "")


def peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user of the other end, when it connected (unix(7), SO_PEERCRED)."""
    process, user, _ = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    return process, user


def refuse_strangers(connection: socket.socket) -> None:
    """Raises Refusal unless the other end runs as root or as this process's user (unix(7), SO_PEERCRED)."""
    _, user = peer(connection)
    if user not in (0, os.geteuid()):
        raise Refusal(f"--takeover: the other end runs as user {user}; only root and user {os.geteuid()} may")


@contextlib.contextmanager
def short_path(path: str) -> Iterator[str]:
    """A path to the same name that fits into sockaddr_un's 108 bytes."""
    folder = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{os.path.basename(path)}"
    finally:
        os.close(folder)
