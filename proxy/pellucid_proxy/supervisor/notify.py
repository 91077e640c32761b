"""What the supervisor tells a service manager: sd_notify(3), one datagram a message to the socket that $NOTIFY_SOCKET names."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import MutableMapping

import msgspec

MAX_STATUS = 200


class Manager(msgspec.Struct, frozen=True):
    """A service manager that wants to hear of a run. address: as $NOTIFY_SOCKET names it, "": there is none. watchdog_s: how often at
    least; None: it does not ask."""

    address: str = ""
    watchdog_s: float | None = None


class Notifier:
    """Speaks to nobody where nobody asked. Never waits and never fails: a manager that does not read is no reason to stop."""

    def __init__(self, environment: MutableMapping[str, str], pid: int, relay: socket.socket | None = None) -> None:
        """Takes the protocol's variables out of environment: children are not to speak in this process's place.

        watchdog_s: how often the manager wants to hear from this process at least; None: it does not ask. pid: the process that the manager
        started. relay: of that process, if it is another one, which then speaks (guardian.Ward); it is the caller's.
        """
        address = environment.pop("NOTIFY_SOCKET", "")
        microseconds = environment.pop("WATCHDOG_USEC", "")
        meant = environment.pop("WATCHDOG_PID", "") in ("", str(pid))
        self._socket: socket.socket | None = None
        self._address = address
        self._relay = relay
        if address.startswith(("/", "@")):
            self._socket = _datagram_socket()
        asked = self._socket is not None and meant and microseconds.isascii() and microseconds.isdigit()
        self.watchdog_s = int(microseconds) / 1e6 if asked and int(microseconds) else None

    @property
    def manager(self) -> Manager:
        return Manager(self._address, self.watchdog_s) if self._socket is not None else Manager()

    def adopt(self, manager: Manager) -> None:
        """Speak to that one from now on."""
        self.close()
        self._address, self.watchdog_s = manager.address, manager.watchdog_s
        if manager.address:
            self._socket = _datagram_socket()

    def hand_over(self, main: int) -> None:
        """Process main speaks in this one's place from now on, which says nothing more."""
        self._send(f"MAINPID={main}", _status("Handed over"))
        self.close()

    def ready(self, status: str) -> None:
        """The policy is enforced."""
        self._send("READY=1", _status(status))

    def reloading(self) -> None:
        """What a SIGHUP asks for begins; ready() says that it is done."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str) -> None:
        self._send("STOPPING=1", _status(status))

    def status(self, status: str) -> None:
        """One line for people."""
        self._send(_status(status))

    def alive(self) -> None:
        """Another watchdog_s may pass."""
        self._send("WATCHDOG=1")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, *lines: str) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                if self._relay is not None:
                    self._relay.send("\n".join((self._address, *lines)).encode())
                else:
                    self._socket.sendto("\n".join(lines).encode(), socket_address(self._address))


def _datagram_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)


def _status(text: str) -> str:
    return "STATUS=" + " ".join(text.split())[:MAX_STATUS]


def from_environment(main: int, relay: socket.socket) -> Notifier:
    """To the manager that started process main, which passes on what is sent by relay."""
    return Notifier(os.environ, main, relay)


def socket_address(name: str) -> str:
    """For sendto: what $NOTIFY_SOCKET names."""
    return "\0" + name[1:] if name.startswith("@") else name
