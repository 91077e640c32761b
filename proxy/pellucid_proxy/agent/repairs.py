"""Kernel rules that somebody else changed are put right at once; a second owner who does not stop is met with patience, and named."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable

from ..control import Series
from ..kernel.apply import KernelError
from ..kernel.watch import Cause, Drift
from ..supervisor.backoff import WINDOW_S, Backoff
from .enforcer import Enforcer

log = logging.getLogger(__name__)

RETRY_S = 1.0  # after the kernel refused a repair
COUNTED = tuple(cause for cause in Cause if cause is not Cause.ADDRESS)


class Repairs:
    """problems: what the rules suffer from now, for people; empty where all is well. run() is to be a task."""

    def __init__(
        self,
        enforcer: Enforcer,
        a_minute: int,
        audit_interval_s: float,
        addresses_changed: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """a_minute: repairs that are made at once. addresses_changed: called when the node has another address, or one less."""
        self.problems: tuple[str, ...] = ()
        self._enforcer = enforcer
        self._audit_interval_s = audit_interval_s
        self._addresses_changed = addresses_changed
        self._backoff = Backoff(a_minute)
        self._counts: Counter[Cause] = Counter()
        self._owners: Counter[str] = Counter()  # of the changes of the last minute
        self._waiting: list[Drift] = []
        self._wait_s = 0.0
        self._last = 0.0
        self._noticed = asyncio.Event()

    def series(self) -> list[Series]:
        """How many repairs there were, by cause."""
        return [Series("rules_repairs", "counter", (cause.value,), self._counts[cause]) for cause in COUNTED]

    async def run(self) -> None:
        """Until it is cancelled."""
        loop = asyncio.get_running_loop()
        audit_at = time.monotonic() + self._audit_interval_s
        try:
            while True:
                await self._notices(RETRY_S if self._waiting else audit_at - time.monotonic())
                due = time.monotonic() >= audit_at
                if due:
                    audit_at = time.monotonic() + self._audit_interval_s
                await self._look(self._enforcer.audit if due else self._enforcer.drifted)
                self._calm()
        finally:
            for descriptor in self._enforcer.descriptors:
                loop.remove_reader(descriptor)

    async def _notices(self, patience_s: float) -> None:
        """Returns when the kernel has something to tell, or after patience_s."""
        loop = asyncio.get_running_loop()
        self._noticed.clear()
        for descriptor in self._enforcer.descriptors:
            loop.add_reader(descriptor, self._on_notice, descriptor)
        try:
            async with asyncio.timeout(max(0.0, patience_s)):
                await self._noticed.wait()
        except TimeoutError:
            pass

    def _on_notice(self, descriptor: int) -> None:
        asyncio.get_running_loop().remove_reader(descriptor)  # it stays readable until the kernel's thread has read it
        self._noticed.set()

    async def _look(self, told: Callable[[], Awaitable[list[Drift]]]) -> None:
        began = time.monotonic()
        drifts: list[Drift] = []
        try:
            drifts = await told()
            if any(drift.cause is Cause.ADDRESS for drift in drifts) and self._addresses_changed is not None:
                await self._addresses_changed()
            self._waiting += (drift for drift in drifts if drift.cause is not Cause.ADDRESS)
            if not self._waiting:
                return
            if self._wait_s:
                await asyncio.sleep(self._wait_s)
                self._waiting += (d for d in await self._enforcer.drifted() if d.cause is not Cause.ADDRESS)
            drifts, self._waiting = self._waiting, []
            self._repaired(await self._enforcer.repair(drifts), time.monotonic() - began)
        except KernelError as err:
            log.error("kernel rules that others changed cannot be repaired: %s; trying again", err)
            self._waiting = self._waiting or drifts
            self.problems = (f"what others changed cannot be repaired: {err}",)

    def _repaired(self, repaired: list[Drift], took_s: float) -> None:
        self.problems = self.problems if self._wait_s else ()
        if not repaired:
            return
        worst = min(repaired, key=lambda drift: COUNTED.index(drift.cause))
        self._counts[worst.cause] += 1
        self._last = time.monotonic()
        owners = sorted({drift.owner for drift in repaired if drift.owner})
        self._owners.update(owner.partition(",")[0] for owner in owners)
        self._wait_s = self._backoff.ended(self._last)
        log.warning(
            "kernel rules repaired within %.0f ms: %s changed by %s",
            took_s * 1000,
            ", ".join(sorted({drift.cause.value for drift in repaired})),
            "; ".join(owners) or "somebody whom the kernel does not name",
        )
        if self._wait_s:
            who = self._owners.most_common(1)[0][0] if self._owners else "somebody"
            said = (
                f"{who} changes our kernel rules again and again: the next repair waits {self._wait_s:g} s; "
                "have it leave the table, ip rules and routes of pellucid alone"
            )
            self.problems = (said,)
            log.error("%s", said)

    def _calm(self) -> None:
        """After a quiet minute all is forgotten."""
        if self._last and time.monotonic() - self._last > WINDOW_S:
            self._wait_s, self._last = 0.0, 0.0
            self._owners.clear()
            if not self._waiting:
                self.problems = ()
