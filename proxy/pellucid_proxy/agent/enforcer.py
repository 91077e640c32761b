"""Brings a policy into force on workers and kernel, or leaves the one before in force on both.

Workers first, the kernel second:
Rule 1. A worker evaluates the whole policy of a pod and the kernel's leading rules are a prefix of it, so that whichever of the two
        knows the new policy first, each flow is decided wholly by the old policy or wholly by the new one.
Rule 2. A worker may refuse; an nft transaction is all or nothing. What can be taken back goes first, what commits goes last.
Rule 3. A pod that the kernel hands over is one that the workers know. The other way round, a new pod's first connections would be
        decided as a stranger's.
Rule 4. Live connections, the kernel's too, are decided again once both have the new policy: those that end cannot be taken back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from pellucid_policy.compile import PolicySet, encode

from ..control import Series
from ..kernel.apply import KernelError
from ..kernel.judgement import Era, Fate
from ..kernel.state import KernelState, boot_hold, kernel_state
from ..kernel.watch import Drift
from ..settings import NodeSettings
from .reviews import Reviews
from .workers import WorkerLink, Workers

log = logging.getLogger(__name__)

T = TypeVar("T")


class Rules(Protocol):
    """The kernel's side. Every method waits for the kernel, is called by one thread at a time (review: by another one), and may raise
    KernelError (review: OSError)."""

    def apply(self, state: KernelState) -> None: ...

    def recognise(self, state: KernelState) -> bool: ...

    def remove(self) -> None: ...

    def series(self) -> list[Series]: ...

    def present(self) -> bool: ...

    @property
    def descriptors(self) -> tuple[int, ...]: ...

    def drifted(self) -> list[Drift]: ...

    def audit(self) -> list[Drift]: ...

    def repair(self, drifts: list[Drift]) -> list[Drift]: ...

    def review(self, eras: Sequence[Era]) -> Counter[Fate]: ...


class Enforcer:
    """enforced: what workers and kernel decide by; None before the first. touched: this run has changed the kernel."""

    def __init__(self, workers: Workers, rules: Rules, settings: NodeSettings) -> None:
        self.enforced: PolicySet | None = None
        self.touched = False
        self._inherited = False
        self._workers = workers
        self._rules = rules
        self._settings = settings
        self._reviews = Reviews(rules.review)
        self._one_at_a_time = asyncio.Lock()
        self._kernel_thread = ThreadPoolExecutor(
            1, thread_name_prefix="kernel"
        )  # one thread: one change after the other

    async def hold(self, before: PolicySet | None = None) -> None:
        """Let nothing new of the scope pass until there is a policy. Raises KernelError.

        before: what a run that was killed enforced last, if its rules are still there."""
        self._inherited = await self._in_kernel(self._rules.present)
        if self._inherited and before is not None:
            self._reviews.begin(_era(before, kernel_state(before, self._settings)))
        self.touched = True
        await self._in_kernel(lambda: self._rules.apply(boot_hold(self._settings)))

    async def resume(self, policy: PolicySet | None, settings: NodeSettings) -> None:
        """Go on where an agent that ended has left off: workers and kernel enforce, and nothing is to be held. Raises KernelError.

        policy: what it may have enforced last, with settings. Where the kernel has just these rules, they are changed from now on,
        never replaced.
        """
        self._inherited = self.touched = True
        if policy is not None:
            state = kernel_state(policy, settings)
            self._reviews.begin(_era(policy, state))
            known = await self._in_kernel(lambda: self._rules.recognise(state))
            log.info(
                "the kernel's rules are %s", "recognised" if known else "not those of the last policy: replacing them"
            )

    async def enforce(self, policy: PolicySet) -> list[str]:
        """Have every flow decided by policy, live ones again. Returns why that is not so; then the policy before is in force again."""
        async with self._one_at_a_time:
            return await self._enforce(policy)

    async def bring_up(self, link: WorkerLink) -> None:
        """Give a worker that was started again the policy in force: it accepts nothing before."""
        async with self._one_at_a_time:
            if self.enforced is not None and link.alive:
                why = await link.set_policy(self.enforced.revision, encode(self.enforced))
                if why:
                    log.error("%s; it takes no connections", why)

    async def _enforce(self, policy: PolicySet) -> list[str]:
        problems = await self._workers.set_policy(policy.revision, encode(policy))
        state = kernel_state(policy, self._settings)
        if not problems:
            try:
                self.touched = True
                await self._in_kernel(lambda: self._rules.apply(state))
            except KernelError as err:
                problems = [f"kernel rules: {err}"]
        if problems:
            await self._go_back()
        else:
            self.enforced = policy
            self._workers.review()
            self._reviews.enforced(_era(policy, state, time.time_ns()))
        return problems

    async def drain(self) -> None:
        """Take nothing new; what the workers carry goes on. Raises KernelError."""
        await self._in_kernel(lambda: self._rules.apply(KernelState(self._settings, drain=True)))

    async def remove(self) -> None:
        """Take everything of ours out of the kernel. Raises KernelError."""
        await self._in_kernel(self._rules.remove)
        self.touched = False

    async def give_up(self, policy: PolicySet) -> None:
        """Undo a start that failed. Raises KernelError.

        Where a run before this one was killed, its rules were there and refused the pods with failureMode Closed. To take them
        away now would open what is closed: the rules of policy, with no worker behind them, refuse the same.
        """
        if self._inherited:
            await self._in_kernel(lambda: self._rules.apply(kernel_state(policy, self._settings)))
        else:
            await self.remove()

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Readable while drifted() may have something to tell."""
        return self._rules.descriptors

    async def drifted(self) -> list[Drift]:
        """What others changed among the kernel rules since the last call."""
        return await self._in_kernel(self._rules.drifted)

    async def audit(self) -> list[Drift]:
        """The same, and what may have changed without a notice. Raises KernelError."""
        return await self._in_kernel(self._rules.audit)

    async def repair(self, drifts: list[Drift]) -> list[Drift]:
        """The kernel rules are again what they are to be; returns which of drifts were about them. Raises KernelError."""
        async with self._one_at_a_time:
            return await self._in_kernel(lambda: self._rules.repair(drifts))

    async def kernel_series(self) -> list[Series]:
        """What the kernel counted, if it can be asked, and what became of its live flows."""
        counted: list[Series] = []
        try:
            counted = await self._in_kernel(self._rules.series)
        except KernelError as err:
            log.warning("kernel counters cannot be read: %s", err)
        return [*counted, *self._reviews.series()]

    def close(self) -> None:
        self._reviews.close()
        self._kernel_thread.shutdown(wait=False, cancel_futures=True)

    async def _go_back(self) -> None:
        if self.enforced is None:
            return
        for problem in await self._workers.set_policy(self.enforced.revision, encode(self.enforced)):
            log.error("going back to revision %s: %s", self.enforced.revision, problem)

    async def _in_kernel(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._kernel_thread, call)


def _era(policy: PolicySet, state: KernelState, since_ns: int = 0) -> Era:
    return Era(state, {address: pod for pod in policy.pods for address in pod.addresses}, since_ns)
