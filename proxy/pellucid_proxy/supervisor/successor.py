"""A hand-over as the predecessor sees it (handover.py has the messages): who takes this run's place, and when it is through."""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import time
from collections.abc import Callable
from typing import Protocol

from .. import __version__
from ..settings import NodeSettings
from .handover import (
    Denied,
    Door,
    Offer,
    OfferedWorker,
    Taken,
    TakeOver,
    Yield,
    Yielded,
    common_protocol,
    heard,
    invocation,
    peer,
    say,
)
from .notify import Manager

log = logging.getLogger(__name__)

YIELD_S = 3.0  # for the agent to end by itself
TAKE_S = 60.0  # for the successor to enforce, from its first word on


class Owner(Protocol):
    """What the run does for a successor; Supervisor's methods say it."""

    @property
    def serving(self) -> bool: ...

    def estate(self) -> tuple[NodeSettings, list[int], list[tuple[int, int]]]: ...

    def yield_rules(self) -> None: ...

    def kill_agent(self) -> None: ...

    def take_back(self) -> None: ...

    def hand_over(self, main: int | None) -> None: ...

    @property
    def manager(self) -> Manager: ...


class Successor:
    """Nobody yet (no connection), or one that was offered the estate, or one for whom the agent ends (holds)."""

    def __init__(self, state: str, selector: selectors.BaseSelector, owner: Owner) -> None:
        """Raises OSError."""
        self.holds = False  # the agent has been told to end: from now on it is either Taken or taken back
        self.due = float("inf")  # when check() has something to do
        self._door = Door(state)
        self._selector = selector
        self._owner = owner
        self._connection: socket.socket | None = None
        self._main: int | None = None
        self._take_by = float("inf")
        self._afterwards: list[Callable[[], None]] = []
        selector.register(self._door.listener, selectors.EVENT_READ, self._on_knock)

    def check(self, now: float) -> None:
        """Time is up for an agent that does not end, or for a successor that does not take."""
        if now < self.due:
            return
        if now >= self._take_by:
            log.error("the new instance did not come to enforce within %g s", TAKE_S)
            self._lost()
        else:
            self.due = self._take_by
            self._owner.kill_agent()

    def yielded(self) -> None:
        """The agent has ended."""
        self.due = self._take_by
        if self._connection is None or not say(self._connection, Yielded()):
            self._lost()

    def afterwards(self, act: Callable[[], None]) -> None:
        """Call act when it is decided who goes on."""
        self._afterwards.append(act)

    def close(self) -> None:
        """Nobody can take over any more; a name in the folder that is another's stays."""
        if self._door.listener.fileno() >= 0:
            self._selector.unregister(self._door.listener)
            self._door.close()
        self._hang_up()

    def _on_knock(self) -> None:
        connection = self._door.accept()
        if connection is None:
            return
        if self._connection is not None:  # closed before its word is read, it would get a reset and no answer
            self._selector.register(connection, selectors.EVENT_READ, lambda: self._turn_away(connection))
            return
        self._connection = connection
        self._take_by = self.due = time.monotonic() + TAKE_S
        self._selector.register(connection, selectors.EVENT_READ, self._on_word)

    def _turn_away(self, connection: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            heard(connection)
        say(connection, Denied("another hand-over is under way; try again when it is through"))
        self._selector.unregister(connection)
        connection.close()

    def _on_word(self) -> None:
        assert self._connection is not None
        try:
            word = heard(self._connection)
        except BlockingIOError:
            return
        match word:
            case TakeOver() as asked if not self.holds:
                self._offer(self._connection, asked)
            case Yield() if not self.holds and self._owner.serving:
                self.holds = True
                self.due = time.monotonic() + YIELD_S
                self._owner.yield_rules()
            case Taken() if self.holds:
                self._taken()
            case _:
                self._lost()

    def _offer(self, connection: socket.socket, asked: TakeOver) -> None:
        protocol = common_protocol(asked.protocols)
        why = ""
        if not self._owner.serving:
            why = "the instance that runs does not enforce now; try again when it does, or stop it"
        elif protocol is None:
            why = (
                f"version {__version__} runs and knows no hand-over to version {asked.version}; stop it and start anew"
            )
        if why or protocol is None:
            say(connection, Denied(why))
            self._lost()
            return
        settings, descriptors, workers = self._owner.estate()
        log.info("version %s takes over", asked.version)
        # Another service has a manager of its own: two services cannot have one main process.
        own = asked.invocation not in ("", invocation())
        self._main = None if own else asked.run or peer(connection)[0]
        manager = Manager() if own else self._owner.manager
        told = say(connection, Offer(protocol, __version__, settings, len(workers), manager), descriptors)
        for control, flows in workers:
            told = told and say(connection, OfferedWorker(flows >= 0), [control, flows] if flows >= 0 else [control])
        if not told:
            self._lost()

    def _taken(self) -> None:
        log.info("handed over; live connections go on here until they end")
        self.holds = False
        self.close()
        self._owner.hand_over(self._main)
        self._through()

    def _lost(self) -> None:
        """The successor is gone, or has no manners."""
        held, self.holds = self.holds, False
        self._hang_up()
        if held:
            log.error("the new instance has failed; this one takes up its work again")
            self._owner.take_back()
        self._through()

    def _through(self) -> None:
        acts, self._afterwards = self._afterwards, []
        for act in acts:
            act()

    def _hang_up(self) -> None:
        self._take_by = self.due = float("inf")
        if self._connection is not None:
            self._selector.unregister(self._connection)
            self._connection.close()
            self._connection = None
