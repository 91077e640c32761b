"""Signals as events of a selector."""

from __future__ import annotations

import contextlib
import selectors
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def signals_to(selector: selectors.BaseSelector, handle: Callable[[int], None]) -> Iterator[None]:
    """SIGTERM, SIGINT and SIGHUP become events of the selector; the previous handlers come back at the end."""
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    previous = {number: signal.signal(number, _noted) for number in numbers}
    previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def read() -> None:
        for number in reader.recv(64):
            if number in numbers:
                handle(number)

    selector.register(reader, selectors.EVENT_READ, read)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_fd)
        for number, handler in previous.items():
            signal.signal(number, handler)
        selector.unregister(reader)
        reader.close()
        writer.close()


def _noted(number: int, frame: FrameType | None) -> None:
    """The wakeup descriptor carries the signal; a handler must exist for it to be written."""


def name(number: int) -> str:
    return signal.Signals(number).name
