"""Lists and events that overtake each other, and writes of which some are refused: a cluster that answers as it is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pellucid_operator import loop as loop_module
from pellucid_operator import writer as writer_module
from pellucid_operator.cluster import Refused
from pellucid_operator.loop import Loop
from pellucid_operator.plan import plan
from pellucid_operator.store import Store
from pellucid_operator.world import (
    DAEMON_SETS,
    NODES,
    POLICIES,
    PROXIES,
    SNAPSHOTS,
    WATCHED,
    Body,
    Key,
    Kind,
    Wanted,
    World,
    key_of,
)
from pellucid_operator.writer import Writer

from .test_plan import NOW, OWNER, TEMPLATE, WEB, changed, domains, node, policy, proxy, world, written

PATIENCE_S = 15.0


class Fake:
    """fails: raises for a write, by what and kind. on_list: called in the middle of a list."""

    def __init__(self, *found: tuple[Kind, dict[str, Any]]) -> None:
        self.objects: dict[str, dict[Key, Any]] = {kind.name: {} for kind in (*WATCHED, DAEMON_SETS)}
        self.version = 1
        self.writes: dict[str, int] = {}
        self.statuses: list[Key] = []
        self.applied: list[tuple[str, str]] = []
        self.warned: list[str] = []
        self.fails: Callable[[str, Kind], None] = lambda _what, _kind: None
        self.on_list: Callable[[Kind], None] = lambda _kind: None
        for kind, body in found:
            self.put(kind, body)

    def put(self, kind: Kind, body: Body) -> Body:
        self.version += 1
        key = key_of(kind.name, body)
        self.objects[kind.name][key] = {**body, "metadata": {**body["metadata"], "resourceVersion": str(self.version)}}
        found: Body = self.objects[kind.name][key]
        return found

    def listed(self, kind: Kind, namespace: str = "") -> list[Body]:
        found = list(self.objects[kind.name].values())
        self.on_list(kind)
        return found

    def apply(self, kind: Kind, value: Body) -> None:
        self.fails("apply", kind)
        self.applied.append((kind.name, value["metadata"]["name"]))
        self.put(kind, value)

    def write_status(self, kind: Kind, key: Key, status: Any) -> None:
        self.fails("status", kind)
        self.statuses.append(key)
        self.put(kind, {**self.objects[kind.name][key], "status": status})

    def delete(self, kind: Kind, key: Key) -> None:
        self.objects[kind.name].pop(key, None)

    def warn(self, kind: Kind, namespace: str, about: Body, reason: str, message: str, now: str) -> None:
        self.warned.append(message)


@asynccontextmanager
async def running(fake: Fake, wanted_proxy: Body | None = None) -> AsyncIterator[Loop]:
    loop = Loop(fake, "pellucid-system", Wanted({"pellucid-node": TEMPLATE}, wanted_proxy), OWNER)  # type: ignore[arg-type]
    task = asyncio.create_task(loop.run())
    try:
        async with asyncio.timeout(PATIENCE_S):
            await loop.listed.wait()
        yield loop
    finally:
        task.cancel()
        await asyncio.wait([task])


async def comes_true(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.01)  # between two looks
    return True


def offered(fake: Fake) -> dict[str, str]:
    return domains(World(fake.objects)) if (SNAPSHOTS.name, "", "current") in fake.objects[SNAPSHOTS.name] else {}


def test_an_edit_that_comes_while_everything_is_listed_counts() -> None:
    async def act() -> None:
        fake = Fake((POLICIES, policy()), (PROXIES, proxy()))
        async with running(fake) as loop:
            assert await comes_true(lambda: offered(fake) == {"web": "one.example"})
            events = asyncio.get_running_loop()

            def edit(kind: Kind) -> None:
                if kind is POLICIES:
                    fake.on_list = lambda _kind: None
                    body = fake.put(POLICIES, policy("web", "new.example", generation=2))
                    events.call_soon_threadsafe(loop.on_event, POLICIES, "MODIFIED", body)

            fake.on_list = edit
            loop.on_event(POLICIES, None, fake.objects[POLICIES.name][WEB])
            assert await comes_true(lambda: offered(fake) == {"web": "new.example"})

    asyncio.run(act())


def test_a_deletion_that_no_watch_told_of_is_found_when_a_watch_begins_anew() -> None:
    async def act() -> None:
        fake = Fake((POLICIES, policy()), (POLICIES, policy("other")), (PROXIES, proxy()))
        async with running(fake) as loop:
            assert await comes_true(lambda: len(offered(fake)) == 2)
            del fake.objects[POLICIES.name][WEB]
            for body in list(fake.objects[POLICIES.name].values()):
                loop.on_event(POLICIES, None, body)
            assert await comes_true(lambda: set(offered(fake)) == {"other"})

    asyncio.run(act())


@pytest.mark.parametrize(("what", "kind"), [("apply", PROXIES), ("apply", DAEMON_SETS), ("status", POLICIES)])
def test_one_write_that_is_refused_hinders_no_other(what: str, kind: Kind) -> None:
    def refuse(asked: str, of: Kind) -> None:
        if (asked, of) == (what, kind):
            raise Refused(422, "invalid")

    async def act() -> None:
        fake = Fake((POLICIES, policy()), (PROXIES, proxy()))
        fake.fails = refuse
        async with running(fake, {**proxy(workers=2), "metadata": {"name": "default"}}):
            assert await comes_true(lambda: offered(fake) == {"web": "one.example"})
            assert await comes_true(lambda: ("TransparentProxy", "", "default") in fake.statuses)
            if kind is not DAEMON_SETS:
                assert await comes_true(lambda: ("DaemonSet", "pellucid-node") in fake.applied)
            if kind is not POLICIES:
                assert await comes_true(lambda: WEB in fake.statuses)

    asyncio.run(act())


def test_what_could_not_be_written_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "RETRY_S", 0.05)

    async def act() -> None:
        fake = Fake((POLICIES, policy()), (PROXIES, proxy()))

        def away(_what: str, _kind: Kind) -> None:
            raise Refused(0, "nobody there")

        fake.fails = away
        async with running(fake) as loop:
            loop.on_event(POLICIES, "MODIFIED", fake.put(POLICIES, policy("web", "new.example")))
            monkeypatch.setattr(loop_module, "STUCK_S", -1.0)
            assert await comes_true(lambda: loop._reachable is False)
            assert loop.stuck() == "", "to start again would not bring the API server back"
            fake.fails = lambda _what, _kind: None
            assert await comes_true(lambda: offered(fake) == {"web": "new.example"})

    asyncio.run(act())


def test_a_busy_loop_is_not_a_stuck_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "LONGEST_S", 0.2)
    monkeypatch.setattr(loop_module, "STUCK_S", 1.0)

    async def act() -> None:
        fake = Fake((POLICIES, policy()), (PROXIES, proxy()))
        fake.on_list = lambda _kind: time.sleep(0.05)  # a slow API server
        async with running(fake) as loop:
            until, count = time.monotonic() + 3.0, 0
            while time.monotonic() < until:
                count += 1
                loop.on_event(NODES, "MODIFIED", fake.put(NODES, node("n1", f"r{count}")))
                assert loop.stuck() == ""
                await asyncio.sleep(0.02)

    asyncio.run(act())


# Writing


def settle(fake: Fake, clock: list[float], rounds: int) -> list[int]:
    """How many statuses each round writes, half a second apart."""
    writer = Writer(fake, "pellucid-system", lambda: clock[0])  # type: ignore[arg-type]
    counts = []
    for _ in range(rounds):
        before = len(fake.statuses)
        seen = world(*((kind, dict(body)) for kind in WATCHED for body in fake.objects[kind.name].values()))
        writer.apply(plan(seen, NOW), seen, NOW)
        counts.append(len(fake.statuses) - before)
        clock[0] += 0.5
    return counts


def test_statuses_of_many_are_written_at_a_bounded_rate() -> None:
    fake = Fake(*((POLICIES, policy(f"p{n}")) for n in range(100)), (PROXIES, proxy()))
    assert settle(fake, [0.0], 4) == [40, 40, 21, 0]


def test_a_status_that_changes_all_the_time_is_written_now_and_then_but_an_edit_at_once() -> None:
    fake, clock = Fake((POLICIES, policy()), (PROXIES, proxy())), [100.0]
    writer = Writer(fake, "pellucid-system", lambda: clock[0])  # type: ignore[arg-type]
    seen, at = world((POLICIES, policy()), (PROXIES, proxy())), []
    for number in range(60):
        seen = changed(seen, NODES, node(f"n{number}", "old"))
        if number == 30:
            seen = changed(seen, POLICIES, policy(generation=2))
        made = plan(seen, NOW)
        before = fake.statuses.count(WEB)
        for key in made.statuses:
            fake.objects[key[0]][key] = dict(seen.objects[key[0]][key])
        writer.apply(made, seen, NOW)
        if fake.statuses.count(WEB) > before:
            at.append(number)
            seen = written(seen, made)
        clock[0] += 0.5
    assert at == [0, 20, 30, 50]


def test_a_piece_that_is_needless_goes_after_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    fake = Fake((POLICIES, policy()), (PROXIES, proxy()))
    fake.put(SNAPSHOTS, {"metadata": {"name": "piece-old"}, "spec": {"piece": {"data": "AAAA"}}})
    writer = Writer(fake, "pellucid-system", lambda: clock[0])  # type: ignore[arg-type]
    seen = world(*((kind, dict(body)) for kind in WATCHED for body in fake.objects[kind.name].values()))
    made = plan(seen, NOW)
    writer.apply(made, seen, NOW)
    assert writer.due <= writer_module.PIECES_STAY_S
    assert (SNAPSHOTS.name, "", "piece-old") in fake.objects[SNAPSHOTS.name]
    clock[0] = writer_module.PIECES_STAY_S
    writer.apply(made, seen, NOW)
    assert (SNAPSHOTS.name, "", "piece-old") not in fake.objects[SNAPSHOTS.name]


# The store


def body(name: str, version: int, domain: str = "one.example") -> Body:
    found = policy(name, domain)
    return {**found, "metadata": {**found["metadata"], "resourceVersion": str(version)}}


def test_the_newest_version_counts_in_whichever_order_they_come() -> None:
    store = Store()
    assert store.event(POLICIES, False, body("web", 5, "new.example"))
    assert not store.event(POLICIES, False, body("web", 4))
    assert not store.event(POLICIES, True, body("web", 3)), "an old deletion"
    store.list_begins(POLICIES)
    store.event(POLICIES, False, body("later", 9))
    store.event(POLICIES, True, body("gone", 8))
    assert not store.listed(POLICIES, [body("web", 5, "new.example"), body("gone", 6)]), "the events told of all"
    assert {key[2] for key in store.all()[POLICIES.name]} == {"web", "later"}
    assert not store.listed(POLICIES, [body("web", 5, "new.example"), body("later", 9)])
