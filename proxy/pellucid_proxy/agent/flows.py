"""Flow records on their way from the workers' pipes to a file. A slow disk costs records, which are counted, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
import threading
import time
from collections import deque
from typing import Protocol

log = logging.getLogger(__name__)

GATHER_S = 0.02  # from the first record to reading: one wakeup for many
READ_BYTES = 1 << 18
MAX_LINE_BYTES = 1 << 20
MAX_QUEUE_BYTES = 8 << 20  # waiting for the disk
COMPLAIN_S = 10.0  # between two log lines of one kind
STDOUT = "-"
RECORD_START = b'{"time":'  # session/desk.py writes it


class Sink(Protocol):
    """What takes whole lines without ever waiting, and hears of those that were lost before."""

    def put(self, lines: bytes) -> None: ...

    def count_lost(self, lines: int) -> None: ...


class FlowFile:
    """Appends lines to a file from a thread of its own. dropped: lines lost so far."""

    def __init__(self, path: str) -> None:
        """path: made with mode 0640 if missing, or - for standard output. Raises OSError."""
        self.path = path
        self.dropped = 0
        self._fd = _open(path)
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._reopen = self._closing = False
        self._changed = threading.Condition()
        self._complained_at = float("-inf")
        self._thread = threading.Thread(target=self._write_all, name="flow-file", daemon=True)
        self._thread.start()

    def put(self, lines: bytes) -> None:
        """Have whole lines written; they are dropped and counted where too many wait already. Never waits for the disk."""
        with self._changed:
            if self._queued_bytes + len(lines) > MAX_QUEUE_BYTES:
                self.dropped += lines.count(b"\n")
                return
            self._queue.append(lines)
            self._queued_bytes += len(lines)
            self._changed.notify()

    def count_lost(self, lines: int) -> None:
        """So many lines could not be put."""
        with self._changed:
            self.dropped += lines

    def reopen(self) -> None:
        """Write to the file that bears the name now: the old one was renamed."""
        with self._changed:
            self._reopen = True
            self._changed.notify()

    def close(self, timeout_s: float) -> None:
        """Waits for what was put, no longer than timeout_s: a reader of standard output may have stopped reading."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._reopen or self._closing)
                chunks, self._queue = self._queue, deque()
                reopen, self._reopen = self._reopen, False
                ending = self._closing and not chunks
            if reopen or _renamed(self._fd, self.path):
                self._open_again()
            if chunks:
                lines = b"".join(chunks)
                self._write(lines)
                with self._changed:
                    self._queued_bytes -= len(lines)
            if ending:
                if self.path != STDOUT:
                    os.close(self._fd)
                return

    def _open_again(self) -> None:
        try:
            opened = _open(self.path)
        except OSError as err:
            self._complain(f"cannot be opened again: {err.strerror}; going on with the renamed one")
            return
        if self.path != STDOUT:
            os.close(self._fd)
        self._fd = opened

    def _write(self, lines: bytes) -> None:
        start = _size(self._fd)
        at = 0
        try:
            while at < len(lines):
                at += os.write(self._fd, memoryview(lines)[at:])
        except OSError as err:
            kept = lines.rfind(b"\n", 0, at) + 1
            if start is not None and kept != at:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, start + kept)  # no reader shall find half a line
            self.count_lost(lines.count(b"\n", kept))
            self._complain(f"cannot be written: {err.strerror}; records are lost until it can")

    def _complain(self, what: str) -> None:
        if time.monotonic() - self._complained_at >= COMPLAIN_S:
            self._complained_at = time.monotonic()
            log.error("flow file %s %s", self.path, what)


class FlowPipe:
    """Reads one worker's pipe and hands whole lines on. Closes itself, and the descriptor, when the worker has ended."""

    def __init__(self, fd: int, file: Sink, resumed: bool = False) -> None:
        """fd: read end of a non-blocking pipe, taken over. resumed: another agent may have read the first half of a record."""
        self._fd = fd
        self._file = file
        self._rest = b""  # a line whose end has not come
        self._resumed = resumed
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(fd, self._on_readable)

    def close(self) -> None:
        """Reads what is there and ends; may be called twice."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            self._read()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _on_readable(self) -> None:
        self._loop.remove_reader(self._fd)
        self._loop.call_later(GATHER_S, self._read_then_wait)

    def _read_then_wait(self) -> None:
        if self._fd >= 0 and self._read():
            self._loop.add_reader(self._fd, self._on_readable)

    def _read(self) -> bool:
        """Reads until nothing is left, at most as much as a pipe holds; False at its end."""
        for _ in range(8):
            try:
                data = os.read(self._fd, READ_BYTES)
            except BlockingIOError:
                return True
            if not data:
                os.close(self._fd)
                self._fd = -1
                return False
            if self._resumed:
                self._resumed = False
                if not data.startswith(RECORD_START):
                    data = data[data.find(b"\n") + 1 :] if b"\n" in data else b""
                    self._file.count_lost(1)
            cut = data.rfind(b"\n") + 1
            if cut:
                self._file.put(self._rest + data[:cut])
                self._rest = data[cut:]
            else:
                self._rest += data
            if len(self._rest) > MAX_LINE_BYTES:  # no record is so long: whatever this is, it is not one
                self._rest = b""
                self._file.count_lost(1)
        return True


def _open(path: str) -> int:
    if path == STDOUT:
        return 1
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    fd = os.open(path, flags | os.O_NONBLOCK, 0o640)  # a named pipe without reader is refused, not waited for
    os.set_blocking(fd, True)
    return fd


def _renamed(fd: int, path: str) -> bool:
    if path == STDOUT:
        return False
    try:
        return not os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return True


def _size(fd: int) -> int | None:
    """Of a regular file; None for a pipe or a terminal."""
    found = os.fstat(fd)
    return found.st_size if stat.S_ISREG(found.st_mode) else None
