"""What a supervisor leaves to the next one of the same run, should it be killed."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import socket
import termios
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from ..control import SetPolicy
from .children import seqpacket_pair
from .messages import Configured, Enforced
from .notify import Manager

MAX_PACKET = 1 << 20
MAX_DESCRIPTORS = 8


class Legacy(msgspec.Struct, frozen=True):
    """configured: what the agent said of settings and node when the policy was enforced. enforced: of the policy, if its memfd is there.
    manager: whom to tell."""

    configured: Configured
    enforced: Enforced | None
    manager: Manager


@dataclass(frozen=True, slots=True)
class Policy:
    """What is enforced, for workers that start without an agent. memfd: the holder's."""

    enforced: Enforced
    memfd: int

    def give(self, control: socket.socket) -> None:
        """The worker whose channel has this end decides by it. Raises OSError."""
        message = SetPolicy(self.enforced.revision, self.enforced.size)
        socket.send_fds(control, [msgspec.msgpack.encode(message)], [self.memfd])

    def close(self) -> None:
        os.close(self.memfd)


@dataclass(frozen=True, slots=True)
class Found:
    """lock: of the state folder, and listeners: the holder's descriptors, as the policy's is."""

    configured: Configured
    manager: Manager
    lock: int
    policy: Policy | None
    listeners: tuple[int, ...]


class Deposit:
    """A packet in the queue of a socket, with descriptors in it (unix(7), SCM_RIGHTS). It lives as long as a process has the socket, and
    none has to read or to know what is in it: listeners in there listen, a lock is held."""

    def __init__(self) -> None:
        """Empty."""
        self._in, self._out = seqpacket_pair()

    @property
    def filled(self) -> bool:
        return self._bytes() > 0

    def leave(
        self, configured: Configured, manager: Manager, lock: int, policy: Policy | None, listeners: Iterable[int]
    ) -> None:
        """This and nothing else is in there, at no moment nothing. Copies of the descriptors are kept. Raises OSError."""
        packet = msgspec.msgpack.encode(Legacy(configured, policy.enforced if policy else None, manager))
        socket.send_fds(self._in, [packet], [lock, *([policy.memfd] if policy else []), *listeners])
        while self._bytes() > len(packet):
            self._out.recv(1)

    def find(self) -> Found | None:
        """What was left, which stays in there; None: nothing."""
        if not self.filled:
            return None
        descriptors = array.array("i")
        room = socket.CMSG_SPACE(MAX_DESCRIPTORS * descriptors.itemsize)
        # Not recv_fds: it does not pass flags on (Python 3.11), and what was read would be gone.
        packet, ancillary, _, _ = self._out.recvmsg(MAX_PACKET, room, socket.MSG_PEEK | socket.MSG_CMSG_CLOEXEC)
        for _, _, content in ancillary:
            descriptors.frombytes(content)
        legacy = msgspec.msgpack.decode(packet, type=Legacy)
        lock, *others = descriptors
        policy = Policy(legacy.enforced, others.pop(0)) if legacy.enforced else None
        return Found(legacy.configured, legacy.manager, lock, policy, tuple(others))

    def withdraw(self) -> None:
        """It is empty."""
        with contextlib.suppress(BlockingIOError):
            while self._out.recv(1):
                pass

    def close(self) -> None:
        """For this process; what is in there lives on if another one has it."""
        self._in.close()
        self._out.close()

    def _bytes(self) -> int:
        """Of all packets in there."""
        answer = array.array("i", [0])
        fcntl.ioctl(self._out, termios.FIONREAD, answer)
        return answer[0]
