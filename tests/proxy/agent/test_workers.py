"""Control channels: what workers answer, and what they may do wrong without harm to the agent."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from pellucid_proxy.agent import workers as module
from pellucid_proxy.agent.workers import Workers
from pellucid_proxy.control import Applied, Series, Stats
from pellucid_proxy.worker_config import sealed_memfd

from .fakes import FakeWorker, eventually

T = TypeVar("T")


def with_workers(count: int, body: Callable[[Workers, list[FakeWorker]], Awaitable[T]]) -> T:
    async def run() -> T:
        workers, fakes = Workers(), [FakeWorker([], f"worker {index}") for index in range(count)]
        for index, fake in enumerate(fakes):
            workers.add(index, fake.control)
        try:
            async with asyncio.timeout(20):
                return await body(workers, fakes)
        finally:
            workers.close()
            for fake in fakes:
                fake.die()

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STATS_TIMEOUT_S", 0.05)
    monkeypatch.setattr(module, "POLICY_TIMEOUT_S", 0.05)


def test_all_workers_get_the_policy_each_for_itself() -> None:
    async def body(workers: Workers, fakes: list[FakeWorker]) -> None:
        content = os.urandom(300_000)
        assert await workers.set_policy("r1", content) == []
        assert [fake.policy for fake in fakes] == [content, content]
        assert [link.revision for link in workers.links] == ["r1", "r1"]

    with_workers(2, body)


def test_a_refusal_names_the_worker_and_its_reason() -> None:
    async def body(workers: Workers, fakes: list[FakeWorker]) -> list[str]:
        fakes[1].refuses = lambda revision: "DecodeError: at 3"
        return await workers.set_policy("r1", b"")

    assert with_workers(2, body) == ["worker 1: DecodeError: at 3"]


def test_a_refusal_without_a_reason_is_still_one() -> None:
    async def body(workers: Workers, fakes: list[FakeWorker]) -> list[str]:
        fakes[0].refuses = lambda revision: " "
        return await workers.set_policy("r1", b"")

    assert len(with_workers(1, body)) == 1


def test_a_worker_that_does_not_answer_is_named_and_keeps_nobody_waiting() -> None:
    async def body(workers: Workers, fakes: list[FakeWorker]) -> tuple[list[str], dict[int, list[Series] | None]]:
        fakes[0].answers = False
        return await workers.set_policy("r1", b""), await workers.stats()

    problems, stats = with_workers(2, body)
    assert problems == ["worker 0 did not answer within 0.05 s"]
    assert stats == {0: None, 1: [Series("connections_active", "gauge", (), 1)]}


def test_a_worker_that_reads_nothing_at_all_fills_no_queue_of_ours() -> None:
    async def body(workers: Workers, fakes: list[FakeWorker]) -> None:
        asyncio.get_running_loop().remove_reader(fakes[0]._socket.fileno())
        for _ in range(2000):
            workers.links[0].drain(1)
        assert await workers.links[0].stats() is None

    with_workers(1, body)


def test_a_late_answer_to_an_earlier_question_is_no_answer_to_the_next() -> None:
    async def body(workers: Workers, fakes: list[FakeWorker]) -> list[str]:
        fakes[0].answers = False
        await workers.set_policy("r1", b"")
        fakes[0].send(Applied("r1"))
        return await workers.set_policy("r2", b"")

    assert len(with_workers(1, body)) == 1


def test_a_dead_worker_answers_at_once_and_all_ended_is_told() -> None:
    async def body(workers: Workers, fakes: list[FakeWorker]) -> None:
        asked = asyncio.create_task(workers.stats())
        fakes[0].answers = False
        await asyncio.sleep(0)
        fakes[0].die()
        fakes[1].die()
        await workers.all_ended()
        assert await asked == {0: None, 1: None}
        assert [link.alive for link in workers.links] == [False, False]
        assert await workers.set_policy("r1", b"") == []

    with_workers(2, body)


@pytest.mark.parametrize("packet", [b"\xc1", b"\x93\x01\x02\x03", b"\x81\xa4type\xa4Evil"])
def test_a_message_that_cannot_be_read_is_logged_and_the_next_one_counts(
    packet: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(workers: Workers, fakes: list[FakeWorker]) -> None:
        fakes[0].send_bytes(packet)
        assert await workers.set_policy("r1", b"") == []

    with_workers(1, body)
    assert "worker 0: a message that cannot be read" in caplog.text


def test_descriptors_that_lie_are_refused_and_closed() -> None:
    async def body(workers: Workers, fakes: list[FakeWorker]) -> None:
        before = len(os.listdir("/proc/self/fd"))
        reader, writer = os.pipe()
        short = sealed_memfd("short", b"\x90")
        fakes[0].send(Stats(1, 10), [reader])  # cannot be read at an offset, and would be waited for
        fakes[0].send(Stats(2, 1000), [short])  # says more than it holds
        fakes[0].send(Stats(3, 1 << 40), [short])
        fakes[0].send(Stats(4, 1), [short, short])
        fakes[0].send(Stats(5, 1))
        for fd in (reader, writer, short):
            os.close(fd)
        fakes[0].send(Applied("r1"))
        await eventually(lambda: workers.links[0].revision == "r1")
        assert len(os.listdir("/proc/self/fd")) == before

    with_workers(1, body)
