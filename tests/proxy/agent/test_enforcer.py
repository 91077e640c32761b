"""The order in which a policy comes into force, and what stays when it does not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from pellucid_policy.compile import PolicySet, compile_policies
from pellucid_policy.objects import Objects
from pellucid_proxy.agent.enforcer import Enforcer
from pellucid_proxy.agent.workers import Workers
from pellucid_proxy.settings import NodeSettings

from .fakes import FakeRules, FakeWorker

SETTINGS = NodeSettings(scope=("192.0.2.0/24",))
OLD = compile_policies(Objects(), default_action="Allow")
NEW = PolicySet("new", OLD.groups, OLD.pods, OLD.strangers, OLD.policies)


class Stage:
    """Two workers, a kernel and an enforcer; log: what happened, in order."""

    def __init__(self, inherited: bool = False) -> None:
        self.log: list[str] = []
        self.fakes = [FakeWorker(self.log, f"worker {index}") for index in range(2)]
        self.rules = FakeRules(self.log, inherited)
        self.workers = Workers()
        for index, fake in enumerate(self.fakes):
            self.workers.add(index, fake.control)
        self.enforcer = Enforcer(self.workers, self.rules, SETTINGS)

    def close(self) -> None:
        self.enforcer.close()
        self.workers.close()
        for fake in self.fakes:
            fake.die()


def staged(body: Callable[[Stage], Awaitable[None]], inherited: bool = False) -> list[str]:
    async def run() -> list[str]:
        stage = Stage(inherited)
        try:
            await body(stage)
        finally:
            stage.close()
        return stage.log

    return asyncio.run(run())


def test_workers_take_a_policy_before_the_kernel_does() -> None:
    async def body(stage: Stage) -> None:
        assert await stage.enforcer.enforce(NEW) == []
        assert stage.enforcer.enforced == NEW

    assert staged(body) == ["worker 0 takes new", "worker 1 takes new", "kernel has rules"]


def test_where_one_worker_refuses_all_go_back_and_the_kernel_is_not_asked() -> None:
    async def body(stage: Stage) -> None:
        await stage.enforcer.enforce(OLD)
        stage.log.clear()
        stage.fakes[1].refuses = lambda revision: "no room" if revision == "new" else ""
        assert await stage.enforcer.enforce(NEW) == ["worker 1: no room"]
        assert stage.enforcer.enforced == OLD

    old = OLD.revision
    assert staged(body) == [
        "worker 0 takes new",
        "worker 1 refuses new",
        f"worker 0 takes {old}",
        f"worker 1 takes {old}",
    ]


def test_where_the_kernel_refuses_the_workers_go_back() -> None:
    async def body(stage: Stage) -> None:
        await stage.enforcer.enforce(OLD)
        stage.log.clear()
        stage.rules.refuses = lambda state: "nft: too many elements; fewer rules"
        assert await stage.enforcer.enforce(NEW) == ["kernel rules: nft: too many elements; fewer rules"]
        assert stage.enforcer.enforced == OLD

    assert staged(body)[2:] == [
        "kernel refuses rules",
        f"worker 0 takes {OLD.revision}",
        f"worker 1 takes {OLD.revision}",
    ]


def test_a_start_that_failed_leaves_nothing_behind() -> None:
    async def body(stage: Stage) -> None:
        await stage.enforcer.hold()
        stage.fakes[0].refuses = lambda revision: "no"
        await stage.enforcer.enforce(NEW)
        await stage.enforcer.give_up(NEW)
        assert not stage.enforcer.touched

    assert staged(body)[-1] == "kernel has nothing"


def test_a_start_that_failed_does_not_open_what_a_killed_run_had_closed() -> None:
    async def body(stage: Stage) -> None:
        await stage.enforcer.hold()
        stage.fakes[0].refuses = lambda revision: "no"
        await stage.enforcer.enforce(NEW)
        await stage.enforcer.give_up(NEW)

    assert staged(body, inherited=True)[-1] == "kernel has rules"


def test_the_kernel_that_cannot_be_asked_costs_its_own_series_only() -> None:
    async def body(stage: Stage) -> None:
        assert [each.name for each in await stage.enforcer.kernel_series()] == [
            "kernel_events",
            *["kernel_flows_reviewed"] * 3,
        ]

    staged(body)
