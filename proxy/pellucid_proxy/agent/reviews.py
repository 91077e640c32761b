"""When live flows of the kernel are decided again: after each change that may concern one, by one reading at a time, of the latest state.

However fast policies follow each other, one reading runs and at most one waits: it judges by what is in force when it begins.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from ..control import Series
from ..kernel.judgement import Era, Fate, alike

log = logging.getLogger(__name__)

RETRY_S = 1.0  # after connection tracking could not be read
MAX_ERAS = 16
"""Policies between two readings whose flows are told apart; of more, the oldest between count as the one before them."""
COUNTED = tuple(each for each in Fate if each is not Fate.GOES_ON)


class Reviews:
    """review: judges flows by eras and waits for the kernel; may raise OSError. Called by one thread at a time, not the loop's."""

    def __init__(self, review: Callable[[Sequence[Era]], Counter[Fate]]) -> None:
        self._review = review
        self._eras: list[Era] = []
        self._counts: Counter[Fate] = Counter()
        self._task: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="review")

    def begin(self, era: Era) -> None:
        """Flows until now were judged by era."""
        self._eras = [era]

    def enforced(self, era: Era) -> None:
        """era is in force: whatever it concerns is decided again soon."""
        if self._eras and alike(self._eras[-1], era):
            return
        self._eras = _bounded([*self._eras, era])
        if len(self._eras) > 1 and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._run(), name="review flows")

    def series(self) -> list[Series]:
        """How many flows met which fate."""
        return [Series("kernel_flows_reviewed", "counter", (each.value,), self._counts[each]) for each in COUNTED]

    def close(self) -> None:
        """No reading begins any more."""
        if self._task is not None:
            self._task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        while len(self._eras) > 1:
            judged, self._eras = self._eras, self._eras[-1:]
            began = time.monotonic()
            try:
                met = await asyncio.get_running_loop().run_in_executor(self._thread, self._review, judged)
            except OSError as err:
                log.warning("live flows cannot be decided again: %s; trying again", err)
                self._eras = _bounded([*judged, *self._eras[1:]])
                await asyncio.sleep(RETRY_S)
                continue
            self._counts += met
            if any(met.values()):
                told = ", ".join(f"{met[each]} {each.value}" for each in COUNTED if met[each])
                log.info("live flows of the kernel, decided again: %s", told)
            await asyncio.sleep(time.monotonic() - began)  # at most half of the time, however large the table is


def _bounded(eras: list[Era]) -> list[Era]:
    return [eras[0], *eras[1:][1 - MAX_ERAS :]]
