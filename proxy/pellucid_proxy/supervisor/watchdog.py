"""Whether the service manager may hear that this node is well: an agent that answers, and through it every worker."""

from __future__ import annotations

from collections.abc import Collection

from .messages import Ping, Pong
from .notify import Notifier

ASKS = 4
"""How often the agent is asked within the time that the manager waits: one slow answer costs nothing."""


class Watchdog:
    """Asks the agent, and tells the manager of complete answers only. A process that hangs, or cannot live, ends the telling; the manager
    then ends them all, and the kernel goes on by its rules. due: when to ask next, monotonic seconds."""

    def __init__(self, manager: Notifier) -> None:
        self._manager = manager
        self._every_s = manager.watchdog_s / ASKS if manager.watchdog_s else float("inf")
        self.due = float("inf")
        self._number = 0
        self._missing: tuple[int, ...] = ()

    def start(self, now: float) -> None:
        """The manager waits from now on; may be called again."""
        if self._every_s != float("inf") and self.due == float("inf"):
            self.due = now

    def feed(self, now: float) -> None:
        """There is no agent any more to ask, and only live connections to wait for: that this process lives is all there is to tell."""
        self.due = now + self._every_s
        self._manager.alive()

    def stop(self) -> None:
        """Somebody else tells."""
        self.due = float("inf")

    def ask(self, now: float) -> Ping:
        """What to send to the agent now. An answer to an earlier one counts no more."""
        self._number += 1
        self.due = now + self._every_s
        return Ping(self._number)

    def answered(self, pong: Pong, expected: Collection[int]) -> None:
        """expected: the workers that must have answered."""
        missing = tuple(sorted(set(expected) - set(pong.workers)))
        if missing != self._missing:
            self._missing = missing
            silent = ", ".join(map(str, missing))
            self._manager.status(f"No answer from worker {silent}" if missing else "All processes answer again")
        if pong.number == self._number and not missing:
            self._manager.alive()
