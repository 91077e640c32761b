"""One pellucid a state folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

from .options import Refusal


@contextlib.contextmanager
def locked(state: str, run: int | None = None) -> Iterator[int]:
    """Holds the state folder for this process, making it (mode 0700) if it is missing; yields the descriptor that holds the lock.

    run: the process that its file names as the holder; by default this one. The kernel lets go of the lock when the last process that has
    the descriptor ends, however it ends. Raises Refusal naming the holder.
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
            raise Refusal(
                f"--state: pellucid already runs with {state}, as process {holder(fd) or 'unknown'}; stop it, or give another folder"
            ) from err
        sign(fd, os.getpid() if run is None else run)
        yield fd
    finally:
        os.close(fd)


def sign(fd: int, run: int) -> None:
    """The lock's file names process run as the holder."""
    os.ftruncate(fd, 0)
    os.pwrite(fd, b"%d\n" % run, 0)


def holder(fd: int) -> str:
    """The process that the lock's file names; "": none."""
    return os.pread(fd, 32, 0).decode("ascii", "replace").strip()
