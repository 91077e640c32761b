"""What a worker gets at its start: settings and descriptors, as msgpack in a sealed memfd whose number is on its command line."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
from typing import TypeVar

import msgspec

from .settings import NodeSettings

PR_SET_PDEATHSIG = 1  # linux/prctl.h
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

T = TypeVar("T")


class WorkerConfig(msgspec.Struct, frozen=True):
    """Descriptors are inherited and stay the worker's own.

    listeners: listening, non-blocking, IP_TRANSPARENT; shared with the other workers. control: SOCK_SEQPACKET, see control.py.
    flows: write end of a non-blocking pipe for flow records, -1 where they are off. node_addresses: packed; never dialled for a pod.
    parent: process id of the supervisor, for die_with_parent.
    user: uid and gid to become; None: stay as it is.
    """

    settings: NodeSettings
    listeners: tuple[int, ...]
    control: int
    flows: int
    node: str
    index: int
    node_addresses: tuple[bytes, ...]
    parent: int
    user: tuple[int, int] | None = None


def sealed_memfd(name: str, content: bytes) -> int:
    """Open a memfd that holds content and that nobody can change any more; its offset is 0. The caller closes it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        left = memoryview(content)
        while left:  # no file object: it would ask what kind of file this is, which a worker may not
            left = left[os.write(fd, left) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_memfd(fd: int, size: int) -> bytes:
    """Read size bytes from the start of fd. Raises OSError if fd cannot be read at an offset, ValueError if it holds less.

    By pread and never by mmap: whoever gave it may cut it short meanwhile.
    """
    parts = []
    at = 0
    while at < size:
        part = os.pread(fd, size - at, at)
        if not part:
            raise ValueError(f"memfd holds {at} bytes of {size}")
        parts.append(part)
        at += len(part)
    return b"".join(parts)


def read_config(fd: int, kind: type[T]) -> T:
    """The configuration of this process; closes fd."""
    try:
        return msgspec.msgpack.decode(read_memfd(fd, os.fstat(fd).st_size), type=kind)
    finally:
        os.close(fd)


def die_with_parent(parent: int) -> None:
    """Ends this process with SIGKILL when process parent ends, from now on; at once if it has ended already.

    A child calls it first thing. prctl(2): the signal follows the death of the thread that forked, so parent must fork in its main one.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it ended before the call above
        os.kill(os.getpid(), signal.SIGKILL)
