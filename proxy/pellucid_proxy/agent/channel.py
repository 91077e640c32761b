"""The agent's end of the channel to the supervisor (supervisor/messages.py)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Sequence

import msgspec

from ..supervisor.messages import MAX_PACKET, Ping, ReopenFlows, Stop, ToAgent, ToSupervisor, WorkerStarted

log = logging.getLogger(__name__)

_decoder = msgspec.msgpack.Decoder(ToAgent)


class SupervisorChannel:
    """stop: what the supervisor asked for last; stop_asked is set whenever that changes, also when the supervisor is gone."""

    def __init__(
        self,
        descriptor: int,
        worker_started: Callable[[WorkerStarted, socket.socket, int], None],
        reopen_flows: Callable[[], None],
        ping: Callable[[Ping], None],
    ) -> None:
        """worker_started: called with the message, control socket and flow pipe (-1: none), both to be taken over."""
        self.stop: Stop | None = None
        self.stop_asked = asyncio.Event()
        self._worker_started = worker_started
        self._reopen_flows = reopen_flows
        self._ping = ping
        self._socket = socket.socket(fileno=descriptor)
        self._socket.setblocking(False)
        asyncio.get_running_loop().add_reader(descriptor, self._on_readable)

    def send(self, message: ToSupervisor, descriptors: Sequence[int] = ()) -> None:
        """descriptors: copies of them go along."""
        if self._socket.fileno() < 0:
            return
        with contextlib.suppress(ConnectionError):  # the supervisor is gone: stop_asked tells
            socket.send_fds(self._socket, [msgspec.msgpack.encode(message)], list(descriptors))

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()

    def _on_readable(self) -> None:
        try:
            packet, descriptors, _, _ = socket.recv_fds(self._socket, MAX_PACKET, 4)
        except BlockingIOError:
            return
        except ConnectionError:
            packet, descriptors = b"", []
        if not packet:
            log.error("the supervisor is gone; the kernel rules stay")
            self.close()
            self._ask_to_stop(Stop(0.0, keep_rules=True))
            return
        match _decoder.decode(packet):
            case WorkerStarted() as started:
                control, flows = descriptors if started.has_flows else (descriptors[0], -1)
                for fd in descriptors:
                    os.set_inheritable(fd, False)
                self._worker_started(started, socket.socket(fileno=control), flows)
            case ReopenFlows():
                self._reopen_flows()
            case Ping() as ping:
                self._ping(ping)
            case Stop() as stop:
                self._ask_to_stop(stop)

    def _ask_to_stop(self, stop: Stop) -> None:
        self.stop = stop
        self.stop_asked.set()
