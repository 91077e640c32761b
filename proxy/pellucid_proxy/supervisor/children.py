"""Child processes and what they inherit."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from ..worker_config import sealed_memfd

PIPE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Child:
    """A running process. pidfd becomes readable when it ends; close() reaps and closes it."""

    name: str
    process: subprocess.Popen[bytes]
    pidfd: int

    def close(self) -> int:
        """Waits for its end; returns its exit status, or minus the signal that ended it."""
        os.close(self.pidfd)
        return self.process.wait()

    def send_signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)


def spawn(name: str, module: str, config: msgspec.Struct, inherited: Iterable[int]) -> Child:
    """Start `python -m module --config-fd N` with config in descriptor N and the inherited descriptors under their own numbers.

    -P: the working folder is no place to import from. Its own process group: a terminal's Ctrl-C is for the supervisor alone.
    """
    fd = sealed_memfd(f"pellucid-{name}", msgspec.msgpack.encode(config))
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, "--config-fd", str(fd)],
            stdin=subprocess.DEVNULL,
            pass_fds=(fd, *inherited),
            process_group=0,
        )
    finally:
        os.close(fd)
    return Child(name, process, os.pidfd_open(process.pid))


def seqpacket_pair() -> tuple[socket.socket, socket.socket]:
    """A control channel; both ends non-blocking."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)


def flow_pipe() -> tuple[int, int]:
    """Read and write end of a non-blocking pipe, of 1 MiB where the kernel grants it (pipe-user-pages-soft bounds users without rights)."""
    read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    with contextlib.suppress(PermissionError):
        fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return read_end, write_end


def how_it_ended(status: int) -> str:
    """`exited with status 3`, `was killed by SIGSEGV`."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
