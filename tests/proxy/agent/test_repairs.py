"""Repairs are made, counted, tried again where the kernel refuses, and wait where somebody does not stop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from pellucid_proxy.agent import repairs as module
from pellucid_proxy.agent.enforcer import Enforcer
from pellucid_proxy.agent.repairs import Repairs
from pellucid_proxy.agent.workers import Workers
from pellucid_proxy.kernel.watch import Cause, Drift
from pellucid_proxy.settings import NodeSettings

from .fakes import FakeRules, eventually

FLUSH = Drift(Cause.TABLE, "firewalld, process 7")


def played(body: Callable[[FakeRules, Repairs], Awaitable[None]], a_minute: int = 60) -> None:
    async def run() -> None:
        rules = FakeRules([])
        enforcer = Enforcer(Workers(), rules, NodeSettings(scope=("192.0.2.0/24",)))
        repairs = Repairs(enforcer, a_minute, 0.005)
        task = asyncio.create_task(repairs.run())
        try:
            await body(rules, repairs)
        finally:
            task.cancel()
            enforcer.close()

    asyncio.run(run())


def counted(repairs: Repairs, cause: Cause) -> float:
    return sum(series.value for series in repairs.series() if series.labels == (cause.value,))


def test_a_repair_is_counted_by_what_was_changed() -> None:
    async def body(rules: FakeRules, repairs: Repairs) -> None:
        rules.drifts = [Drift(Cause.RULE, "nft, process 8"), FLUSH]
        await eventually(lambda: counted(repairs, Cause.TABLE) == 1)
        assert counted(repairs, Cause.RULE) == 0
        assert repairs.problems == ()

    played(body)


def test_an_address_of_the_node_is_no_drift() -> None:
    async def body(rules: FakeRules, repairs: Repairs) -> None:
        rules.drifts = [Drift(Cause.ADDRESS)]
        await eventually(lambda: not rules.drifts)
        rules.drifts = [FLUSH]
        await eventually(lambda: counted(repairs, Cause.TABLE) == 1)
        assert rules.log == ["kernel is repaired"]

    played(body)


def test_where_the_kernel_refuses_it_is_said_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.01)

    async def body(rules: FakeRules, repairs: Repairs) -> None:
        rules.repair_fails = "netlink: lo is down; `ip link set lo up`"
        rules.drifts = [FLUSH]
        await eventually(lambda: len(rules.log) >= 2)
        assert repairs.problems == (f"what others changed cannot be repaired: {rules.repair_fails}",)
        rules.repair_fails = ""
        await eventually(lambda: counted(repairs, Cause.TABLE) == 1)
        assert not repairs.problems

    played(body)


def test_who_does_not_stop_is_named_and_waited_for() -> None:
    async def body(rules: FakeRules, repairs: Repairs) -> None:
        for number in range(3):
            rules.drifts = [FLUSH]
            await eventually(lambda number=number: counted(repairs, Cause.TABLE) == number + 1)  # type: ignore[misc]
        (said,) = repairs.problems
        assert said.startswith("firewalld changes our kernel rules again and again: the next repair waits 0.2 s; ")

    played(body, a_minute=2)
