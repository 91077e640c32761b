"""One pellucid a state folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

from .options import Refusal


@contextlib.contextmanager
def locked(state: str, run: str = "") -> Iterator[int]:
    """Holds the state folder for this process, making it (mode 0700) if it is missing; yields the descriptor that holds the lock.

    run: what its file names the holder, a process id and what tells it from all others; by default this process. The kernel lets go of
    the lock when the last process that has the descriptor ends, however it ends. Raises Refusal naming the holder.
    """
    path = os.path.join(state, "lock")
    try:
        os.makedirs(state, mode=0o700, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as err:
        raise Refusal(
            f"--state: {path} cannot be opened: {err.strerror}; give a folder that can be written to"
        ) from err
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            process = holder(fd).partition(" ")[0] or "unknown"
            raise Refusal(
                f"--state: pellucid already runs with {state}, as process {process}; stop it, or give another folder"
            ) from err
        sign(fd, run or str(os.getpid()))
        yield fd
    finally:
        os.close(fd)


def sign(fd: int, run: str) -> None:
    """The lock's file names run as the holder."""
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{run}\n".encode(), 0)


def let_go(fd: int) -> None:
    """The lock is another's, who has a copy of the descriptor: this one holds it no longer, and is still the owner's to close."""
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(nothing, fd, inheritable=False)
    os.close(nothing)


def holder(fd: int) -> str:
    """The run that the lock's file names; "": none."""
    return os.pread(fd, 64, 0).decode("ascii", "replace").strip()
