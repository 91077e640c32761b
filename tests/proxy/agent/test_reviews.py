"""When live flows of the kernel are decided again."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

import pytest

from pellucid_policy.plan import AddressRule, KernelGroup
from pellucid_proxy.agent import reviews as module
from pellucid_proxy.agent.reviews import MAX_ERAS, Reviews
from pellucid_proxy.kernel.judgement import Era, Fate
from pellucid_proxy.kernel.state import KernelState
from pellucid_proxy.settings import NodeSettings

from .fakes import eventually

SETTINGS = NodeSettings(scope=("10.0.0.0/24",))


def era(number: int, port: int | None = None) -> Era:
    """One that differs from every other; port: of a state that may be equal to another's."""
    rule = AddressRule(None, f"r{number if port is None else port}", None, None, True)
    group = KernelGroup((rule,), (rule,), closed=False, reject_quic=False)
    return Era(KernelState(SETTINGS, (group,), strangers=0), {}, number)


class Kernel:
    """Remembers what was asked; waits where free is not set, and fails as often as failures says."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.free = threading.Event()
        self.free.set()
        self.failures = 0

    def review(self, eras: Sequence[Era]) -> Counter[Fate]:
        self.asked.append([each.since_ns for each in eras])
        assert self.free.wait(10)
        if self.failures:
            self.failures -= 1
            raise OSError("no buffer space")
        return Counter({Fate.POLICY_CHANGED: 2})


def reviewed(body: Callable[[Reviews, Kernel], Awaitable[None]]) -> Kernel:
    async def run() -> Kernel:
        kernel = Kernel()
        reviews = Reviews(kernel.review)
        try:
            await body(reviews, kernel)
        finally:
            reviews.close()
        return kernel

    return asyncio.run(run())


def test_the_first_policy_decides_no_flow_again_and_the_next_one_does() -> None:
    async def body(reviews: Reviews, kernel: Kernel) -> None:
        reviews.enforced(era(1))
        reviews.enforced(era(2))
        await eventually(lambda: any(each.value for each in reviews.series()))
        assert {each.labels[0]: each.value for each in reviews.series()} == {
            "kept": 0,
            "policy_changed": 2,
            "pod_changed": 0,
        }

    assert reviewed(body).asked == [[1, 2]]


def test_after_a_restart_the_policy_before_counts() -> None:
    async def body(reviews: Reviews, kernel: Kernel) -> None:
        reviews.begin(era(0))
        reviews.enforced(era(1))
        await eventually(lambda: bool(kernel.asked))

    assert reviewed(body).asked == [[0, 1]]


def test_what_concerns_no_flow_is_not_looked_at() -> None:
    async def body(reviews: Reviews, kernel: Kernel) -> None:
        reviews.enforced(era(1, 7))
        reviews.enforced(era(2, 7))
        reviews.enforced(era(3))
        await eventually(lambda: bool(kernel.asked))

    assert reviewed(body).asked == [[1, 3]]


def test_changes_during_a_reading_are_one_reading_more_and_a_bounded_number_is_told_apart() -> None:
    async def body(reviews: Reviews, kernel: Kernel) -> None:
        kernel.free.clear()
        reviews.enforced(era(1))
        reviews.enforced(era(2))
        await eventually(lambda: len(kernel.asked) == 1)
        for number in range(3, 103):
            reviews.enforced(era(number))
        kernel.free.set()
        await eventually(lambda: len(kernel.asked) == 2)

    asked = reviewed(body).asked
    assert asked[0] == [1, 2]
    assert asked[1][-1] == 102
    assert len(asked[1]) <= MAX_ERAS


def test_what_could_not_be_read_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.01)

    async def body(reviews: Reviews, kernel: Kernel) -> None:
        kernel.failures = 2
        reviews.enforced(era(1))
        reviews.enforced(era(2))
        await eventually(lambda: len(kernel.asked) == 3)

    assert reviewed(body).asked == [[1, 2]] * 3
