"""Signals as events of a selector."""

from __future__ import annotations

import contextlib
import selectors
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextlib.contextmanager
def signals_to(selector: selectors.BaseSelector, handle: Callable[[int], None]) -> Iterator[None]:
    """NUMBERS become events of the selector, those that were blocked so far as well; the previous handlers come back at the end."""
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    previous = {number: signal.signal(number, _noted) for number in NUMBERS}
    previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def read() -> None:
        for number in reader.recv(64):
            if number in NUMBERS:
                handle(number)

    selector.register(reader, selectors.EVENT_READ, read)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NUMBERS)
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
