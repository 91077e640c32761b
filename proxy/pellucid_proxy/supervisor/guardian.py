"""The process that somebody starts as `pellucid run`: it has a supervisor, and another one when that is killed.

It is what people, service managers and the lock's file know as the run: signals to it are the supervisor's, what the supervisor tells
the service manager comes from it, and it ends as the supervisor ends. It reads no file, parses nothing and owns nothing but the queue
in which the listeners wait for the next supervisor (legacy.py). When it is killed all others end: there is nobody to start it again.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import secrets
import selectors
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import NoReturn

from ..rights.confine import NotConfined, confine
from ..rights.table import SUPERVISOR
from ..worker_config import die_with_parent
from .backoff import Backoff
from .children import how_it_ended, seqpacket_pair
from .legacy import Deposit
from .notify import socket_address
from .options import FAILED, REFUSED
from .signals import NUMBERS, name, signals_to

log = logging.getLogger(__name__)

CRASHED = 70
"""Exit status of a supervisor that had a fault of its own (sysexits.h, EX_SOFTWARE): as if it had been killed. None of `pellucid run`."""
MAX_MESSAGE = 8192


@dataclass(frozen=True, slots=True)
class Ward:
    """What a supervisor has of its guardian. relay: packets to the service manager, each its address, a newline and the message.

    guardian: its process id. run: that, and what tells it from all others, for in two containers both may be process 1. ends: how many
    supervisors of this run ended before. asked: the signals that asked for the end so far."""

    guardian: int
    run: str
    deposit: Deposit
    relay: socket.socket
    ends: int
    asked: tuple[int, ...]


def guard() -> Ward:
    """Returns in a child of this process, which is to be the supervisor. This process ends in here.

    To be called with one thread. In the first child signals do what they did before; in a later one they wait until signals_to.
    """
    ward = _Guardian().guard()
    if ward.ends == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, NUMBERS)
    return ward


class _Guardian:
    def __init__(self) -> None:
        self._pid = os.getpid()
        self._run = f"{self._pid} {secrets.token_hex(8)}"
        self._deposit = Deposit()
        self._relay, self._relayed = seqpacket_pair()
        self._manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._selector = (
            selectors.PollSelector()
        )  # an epoll would be one with the children's: what they unregister, too
        self._backoff = Backoff()
        self._asked: list[int] = []
        self._child: int | None = None  # pidfd
        self._ended = False

    def guard(self) -> Ward:
        gc.freeze()  # what is shared with the supervisor stays so
        with signals_to(self._selector, self._on_signal):
            self._selector.register(self._relayed, selectors.EVENT_READ, self._pass_on)
            while True:
                ward = self._start()
                if ward is not None:
                    return ward
                if self._backoff.ends == 0:
                    self._give_up_rights()
                wait_s = self._after(self._status_of_supervisor())
                self._wait_until(time.monotonic() + wait_s)

    def _start(self) -> Ward | None:
        """A supervisor runs; in itself: what it has of this one."""
        self._reap_strangers()
        sys.stdout.flush()
        sys.stderr.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
        child = os.fork()
        if child == 0:
            die_with_parent(self._pid)
            os.setpgid(0, 0)  # a terminal's Ctrl-C is for the guardian, who passes it on
            self._relayed.close()
            self._manager.close()
            return Ward(self._pid, self._run, self._deposit, self._relay, self._backoff.ends, tuple(self._asked))
        self._child = os.pidfd_open(child)
        self._ended = False
        self._selector.register(self._child, selectors.EVENT_READ, self._on_end)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, NUMBERS)
        return None

    def _reap_strangers(self) -> None:
        """As process 1 of a container it is the parent of what a killed supervisor has left."""
        with contextlib.suppress(ChildProcessError):
            while os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG):
                pass

    def _give_up_rights(self) -> None:
        """Once the first supervisor is there: it opens the state folder with all that this run was started with."""
        try:
            confine(SUPERVISOR)
        except NotConfined as err:
            log.error("rights cannot be given up: %s", err)
            os._exit(REFUSED)  # the supervisor goes as well

    def _status_of_supervisor(self) -> int:
        """Waits for its end. Minus a signal, if one has killed it."""
        while not self._ended:
            for key, _ in self._selector.select():
                key.data()
        assert self._child is not None
        self._selector.unregister(self._child)
        found = os.waitid(os.P_PIDFD, self._child, os.WEXITED)
        os.close(self._child)
        self._child = None
        assert found is not None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def _after(self, status: int) -> float:
        """How long to wait for the next start. Ends this process if there is to be none."""
        self._pass_on()
        if status >= 0 and status != CRASHED:
            os._exit(status)
        if not self._deposit.filled:
            self._end_like(status)
        wait_s = self._backoff.ended(time.monotonic())
        log.error(
            "supervisor %s; it is started again%s, with its processes. Live connections are lost, new ones wait",
            how_it_ended(status),
            f" in {wait_s:g} s" if wait_s else "",
        )
        return wait_s

    def _end_like(self, status: int) -> NoReturn:
        """A supervisor that has nothing to go on with is none to be started again: as if it had been this process."""
        if -status in NUMBERS:
            signal.signal(-status, signal.SIG_DFL)
            os.kill(self._pid, -status)
        log.error("supervisor %s, and was not enforcing yet or no more", how_it_ended(status))
        os._exit(FAILED)

    def _wait_until(self, due: float) -> None:
        """Whoever asks for the end meanwhile waits no longer: only a supervisor can take the rules away."""
        asked = len(self._asked)
        while (left := due - time.monotonic()) > 0 and len(self._asked) == asked:
            for key, _ in self._selector.select(left):
                key.data()

    # Events

    def _on_signal(self, number: int) -> None:
        if number != signal.SIGHUP:
            self._asked.append(number)
        if self._child is not None:
            log.debug("%s passed on", name(number))
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._child, number)

    def _on_end(self) -> None:
        self._ended = True

    def _pass_on(self) -> None:
        """To the service manager, in whose eyes this process is the run. It never waits for it."""
        with contextlib.suppress(BlockingIOError):
            while packet := self._relayed.recv(MAX_MESSAGE):
                address, _, message = packet.partition(b"\n")
                with contextlib.suppress(OSError):
                    self._manager.sendto(message, socket_address(os.fsdecode(address)))
