"""Observers get every record in order, or are told how many they lost; and cost nobody else anything."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pellucid_proxy.agent.flow_hub import FlowHub, FlowsRequest, Observer
from pellucid_proxy.agent.status import NAME, NodeStatus, serve_status
from pellucid_proxy.settings import NodeSettings

from .fakes import eventually

SETTINGS = NodeSettings(scope=("192.0.2.0/24",), flow_history_bytes=100, max_observers=2, observer_buffer_bytes=1 << 16)
Ask = Callable[..., Awaitable[asyncio.StreamReader]]


def line(number: int, size: int = 10) -> bytes:
    return json.dumps({"n": number}).ljust(size - 1).encode() + b"\n"


def run(
    folder: Path, body: Callable[[FlowHub, Ask, list[bool]], Awaitable[None]], settings: NodeSettings | None = SETTINGS
) -> None:
    """body(hub, ask, wanted): ask(**request) connects and asks; wanted: what workers were told."""

    async def status() -> NodeStatus:
        raise AssertionError

    async def play() -> None:
        wanted: list[bool] = []
        hub = FlowHub(None, wanted.append)
        hub.settings = settings
        writers: list[asyncio.StreamWriter] = []

        async def ask(**request: bool) -> asyncio.StreamReader:
            reader, writer = await asyncio.open_unix_connection(str(folder / NAME))
            asked = FlowsRequest(history=request.get("history", False), follow=request.get("follow", False))
            writer.write(msgspec.json.encode(asked) + b"\n")
            writers.append(writer)
            ask.writers = writers  # type: ignore[attr-defined]
            return reader

        async with await serve_status(str(folder), status, {"flows": hub.answer}), asyncio.timeout(20):
            await body(hub, ask, wanted)
            for writer in writers:
                writer.close()
                await writer.wait_closed()
            await eventually(lambda: not hub._observers)

    asyncio.run(play())


async def said(reader: asyncio.StreamReader) -> Any:
    return json.loads(await reader.readline())


def test_the_first_observer_has_records_made_and_the_last_one_ends_them(tmp_path: Path) -> None:
    async def body(hub: FlowHub, ask: Ask, wanted: list[bool]) -> None:
        first = await ask(follow=True)
        assert (await said(first))["recorded"] is False
        assert (wanted, hub.wanted) == ([True], True)
        second = await ask(follow=True)
        assert (await said(second))["recorded"] is True
        hub.put(line(1))
        for reader in (first, second):
            assert await said(reader) == {"live": True}
            assert await said(reader) == {"n": 1}
        ask.writers[0].close()  # type: ignore[attr-defined]
        await eventually(lambda: len(hub._observers) == 1)
        assert wanted == [True]
        ask.writers[1].close()  # type: ignore[attr-defined]
        await eventually(lambda: not hub._observers)
        assert wanted == [True, False]

    run(tmp_path, body)


def test_history_is_the_last_records_that_fit(tmp_path: Path) -> None:
    async def body(hub: FlowHub, ask: Ask, wanted: list[bool]) -> None:
        for number in range(30):
            hub.put(line(number))
        told = (await (await ask(history=True)).read()).splitlines()
        assert json.loads(told[0])["kept"] == 10
        assert [json.loads(each) for each in told[1:]] == [*({"n": number} for number in range(20, 30)), {"live": True}]
        assert wanted == []

    run(tmp_path, body)


def test_a_slow_observer_is_told_what_it_lost_and_the_other_loses_nothing(tmp_path: Path) -> None:
    count, size = 4000, 1000

    async def body(hub: FlowHub, ask: Ask, wanted: list[bool]) -> None:
        slow, quick = await ask(follow=True), await ask(follow=True)
        for reader in (slow, quick):
            await said(reader)
            await said(reader)
        slow._transport.pause_reading()  # type: ignore[attr-defined]
        for number in range(count):
            hub.put(line(number, size))
            assert await said(quick) == {"n": number}
        assert hub.lost_by_observers > 0
        slow._transport.resume_reading()  # type: ignore[attr-defined]
        await eventually(lambda: all(not observer._chunks for observer in hub._observers))
        hub.put(line(-1))  # the news of a loss travels with the next record
        got = lost = 0
        while (told := await said(slow)) != {"n": -1}:
            got, lost = got + ("n" in told), lost + told.get("lost", 0)
        assert lost == hub.lost_by_observers
        assert got + lost == count

    run(tmp_path, body)


def test_observers_are_bounded_and_refused_with_a_cure(tmp_path: Path) -> None:
    async def body(hub: FlowHub, ask: Ask, wanted: list[bool]) -> None:
        for _ in range(2):
            assert "observing" in await said(await ask(follow=True))
        assert await said(await ask(follow=True)) == {"error": "2 observers watch already", "cure": "end one of them"}
        assert "observing" in await said(await ask(history=True))

    run(tmp_path, body)


def test_nobody_observes_before_there_is_a_policy(tmp_path: Path) -> None:
    async def body(hub: FlowHub, ask: Ask, wanted: list[bool]) -> None:
        assert "no policy is enforced yet" in (await said(await ask(follow=True)))["error"]

    run(tmp_path, body, settings=None)


@pytest.mark.parametrize(
    "text", [b'{"get":"flows","follow":1}', b'{"get":"flows","else":true}', b'{"get":"flows","version":2}']
)
def test_other_questions_are_refused(tmp_path: Path, text: bytes) -> None:
    async def body(hub: FlowHub, ask: Ask, wanted: list[bool]) -> None:
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / NAME))
        writer.write(text + b"\n")
        assert "error" in await said(reader)
        writer.close()
        await writer.wait_closed()

    run(tmp_path, body)


def test_what_waits_for_an_observer_is_bounded() -> None:
    observer = Observer(25)
    assert [observer.put(line(number)) for number in range(4)] == [0, 0, 1, 1]
    assert asyncio.run(observer.next()) == line(0) + line(1)
    assert observer.put(line(4)) == 0
    assert asyncio.run(observer.next()) == b'{"lost":2}\n' + line(4)
    assert observer.lost == 2
