"""However watches end, a reflector comes to hold what the API server has."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from pellucid_proxy.kube import client as client_module
from pellucid_proxy.kube import reflector as reflector_module
from pellucid_proxy.kube.access import ApiError, in_cluster
from pellucid_proxy.kube.client import Client
from pellucid_proxy.kube.reflector import Reflector

from .server import PODS, FakeServer, comes_true, refusal, serving

PATIENCE_S = 20.0


def pod(name: str, value: int = 0, version: str = "") -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "shop", "resourceVersion": version}, "value": value}


class Watched:
    def __init__(self, server: FakeServer, reflector: Reflector[int], changes: list[int]) -> None:
        self.server = server
        self.reflector = reflector
        self.changes = changes

    async def agrees(self) -> bool:
        """Whether it comes to hold what the server has."""
        return await comes_true(
            lambda: (
                {name: value["value"] for name, value in self.server.collections[PODS].items()}
                == {name: value for (_, name), value in self.reflector.objects.items()}
            )
        )


@asynccontextmanager
async def watched(tmp_path: Path, *names: str) -> AsyncIterator[Watched]:
    server = FakeServer(collections={PODS: {}})
    for each in names:
        await server.put(PODS, pod(each))
    changes: list[int] = []
    async with serving(server, str(tmp_path / "token")) as access, Client(access) as client:
        reflector = Reflector(
            client,
            PODS,
            lambda value: msgspec.convert(value["value"], int),
            lambda: changes.append(1),
            {"fieldSelector": "spec.nodeName=n1"},
        )
        task = asyncio.create_task(reflector.run())
        try:
            async with asyncio.timeout(PATIENCE_S):
                await reflector.synced.wait()
            yield Watched(server, reflector, changes)
        finally:
            task.cancel()
            await asyncio.wait([task])


def run(act: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(act())  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflector_module, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(reflector_module, "LONGEST_WAIT_S", 0.05)


def test_a_list_in_pages_is_one_list(tmp_path: Path) -> None:
    async def act() -> None:
        async with watched(tmp_path, "a", "b", "c", "d", "e") as w:
            assert sorted(name for _, name in w.reflector.objects) == ["a", "b", "c", "d", "e"]
            lists = [query for method, path, query in w.server.requests if method == "GET" and "watch" not in query]
            assert len(lists) == 3
            assert {query["fieldSelector"] for query in lists} == {"spec.nodeName=n1"}

    run(act)


def test_events_are_followed_and_a_watch_goes_on_where_it_ended(tmp_path: Path) -> None:
    async def act() -> None:
        async with watched(tmp_path, "a") as w:
            await w.server.put(PODS, pod("b"))
            await w.server.put(PODS, pod("a", 7))
            assert await w.agrees()
            await w.server.break_off()
            await w.server.remove(PODS, "b")
            assert await w.agrees()
            lists = [query for _, _, query in w.server.requests if "watch" not in query]
            assert len(lists) == 1, "no second list: a bookmark or event told where to go on"

    run(act)


def test_after_410_it_is_listed_anew_and_what_went_meanwhile_is_gone(tmp_path: Path) -> None:
    async def act() -> None:
        async with watched(tmp_path, "a", "b") as w:
            async with w.server.changed:
                w.server.collections[PODS].pop("a")  # unseen by any watch
                w.server.version += 5
            await w.server.forget()
            assert await w.agrees()

    run(act)


def error_event(request: web.Request) -> web.Response | None:
    if not request.query.get("watch"):
        return None
    return web.Response(text='{"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old"}}\n')


@pytest.mark.parametrize(
    "failure",
    [
        lambda _request: refusal(500, "etcd is away"),
        lambda _request: refusal(429, "too many requests"),
        lambda _request: refusal(403, "pods is forbidden"),
        lambda _request: web.Response(text="<html>a proxy's page</html>"),
        lambda _request: web.Response(status=302, headers={"Location": "http://198.51.100.1/"}),
        lambda _request: web.Response(text='{"type": "ADDED", "object": {"met'),
        lambda _request: web.Response(text="[1, 2]\n"),
        lambda _request: web.Response(text="{}\n"),
        lambda _request: web.Response(text='{"metadata": null, "items": []}\n'),
        lambda _request: web.Response(text='{"type": "ADDED", "object": {"metadata": {"name": "b"}}}\n'),
        lambda _request: web.Response(text='{"type": "ADDED", "object": {"metadata": {"name": 1, "resourceVersion": "9"}}}\n'),
        error_event,
    ],
    ids=["500", "429", "403", "no JSON", "redirect", "broken off", "no object", "empty",
         "no metadata", "no version", "no name", "ERROR event"],
)  # fmt: skip
def test_whatever_fails_it_goes_on_when_the_server_does(
    tmp_path: Path, failure: Callable[[web.Request], web.Response | None]
) -> None:
    async def act() -> None:
        async with watched(tmp_path, "a") as w:
            asked = len(w.server.requests)
            w.server.fails = failure
            await w.server.break_off()
            assert await comes_true(lambda: len(w.server.requests) >= asked + 3)
            assert dict(w.reflector.objects), "what was known stays meanwhile"
            w.server.fails = lambda _request: None
            await w.server.put(PODS, pod("b"))
            assert await w.agrees()
            assert w.reflector.problem == ""

    run(act)


@pytest.mark.parametrize("answer", ["{}", '{"metadata": null}', '{"metadata": {"resourceVersion": "1"}, "items": [1]}'])
def test_a_list_that_is_none_is_told_and_asked_for_again(tmp_path: Path, answer: str) -> None:
    async def act() -> None:
        async with watched(tmp_path, "a") as w:
            w.server.fails = lambda request: None if request.query.get("watch") else web.Response(text=answer)
            w.server.version += 1
            await w.server.forget()
            assert await comes_true(lambda: "the answer is not what was asked for" in w.reflector.problem)
            w.server.fails = lambda _request: None
            assert await w.agrees()

    run(act)


def test_an_object_that_cannot_be_kept_is_told_and_ends_nothing(tmp_path: Path) -> None:
    async def act() -> None:
        async with watched(tmp_path, "a") as w:
            await w.server.put(PODS, {"metadata": {"name": "b", "namespace": "shop"}, "value": "none"})
            assert await comes_true(lambda: "shop/b: " in w.reflector.problem)
            await w.server.put(PODS, pod("b", 2))
            await w.server.forget()
            assert await w.agrees()

    run(act)


def test_watches_that_end_at_once_are_asked_for_ever_less_often(tmp_path: Path) -> None:
    async def act() -> None:
        async with watched(tmp_path, "a") as w:
            w.server.fails = lambda _request: web.Response(text="")
            await w.server.break_off()
            asked = len(w.server.requests)
            assert await comes_true(lambda: len(w.server.requests) >= asked + 3)
            began, asked = time.monotonic(), len(w.server.requests)
            assert await comes_true(lambda: len(w.server.requests) >= asked + 20)
            assert time.monotonic() - began > 20 * 0.05 / 2, "twenty waits of half the longest one at least"

    run(act)


def _watches(server: FakeServer) -> int:
    return sum("watch" in query for _, _, query in server.requests)


def test_a_silent_watch_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "SILENCE_S", 0.2)

    async def act() -> None:
        async with watched(tmp_path, "a") as w:
            async with w.server.changed:
                w.server.version += 1
                w.server.collections[PODS]["b"] = pod("b", 3, str(w.server.version))  # no event will tell
            await w.server.forget()
            assert await w.agrees()
            watches = _watches(w.server)
            assert await comes_true(lambda: _watches(w.server) >= watches + 2), "nothing happens, and yet it asks again"

    run(act)


def test_a_renewed_token_is_used_from_then_on(tmp_path: Path) -> None:
    async def act() -> None:
        async with watched(tmp_path, "a") as w:
            w.server.token = "another"
            await w.server.break_off()
            assert await comes_true(lambda: "401" in w.reflector.problem)
            assert "secret" not in w.reflector.problem
            (tmp_path / "token").write_text("another\n")
            await w.server.put(PODS, pod("b"))
            assert await w.agrees()

    run(act)


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_in_whichever_order_both_agree_in_the_end(tmp_path: Path, seed: int) -> None:
    async def act() -> None:
        chance = random.Random(seed)
        async with watched(tmp_path, "p0", "p1") as w:
            for _ in range(60):
                what, name = chance.random(), f"p{chance.randrange(6)}"
                if what < 0.5:
                    await w.server.put(PODS, pod(name, chance.randrange(100)))
                elif what < 0.75 and name in w.server.collections[PODS]:
                    await w.server.remove(PODS, name)
                elif what < 0.85:
                    await w.server.break_off()
                elif what < 0.9:
                    await w.server.forget()
                else:
                    broken = chance.random() < 0.5
                    w.server.fails = (lambda _request: refusal(500, "away")) if broken else (lambda _request: None)
                if chance.random() < 0.3:
                    await asyncio.sleep(0)
            w.server.fails = lambda _request: None
            assert await w.agrees()

    run(act)


def test_a_pod_knows_where_the_server_is_and_others_are_told() -> None:
    assert (
        in_cluster({"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}).url
        == "https://[fd00::1]:443"
    )
    with pytest.raises(ApiError, match="--policy DIR"):
        in_cluster({})


def test_a_refusal_says_what_was_asked_and_what_to_do(tmp_path: Path) -> None:
    async def act() -> None:
        server = FakeServer(collections={PODS: {}}, fails=lambda _request: refusal(403, "pods is forbidden"))
        async with serving(server, str(tmp_path / "token")) as access, Client(access) as client:
            with pytest.raises(
                ApiError, match=r"GET /api/v1/pods: 403: pods is forbidden; give the service account the right"
            ) as told:
                await client.get(PODS)
            assert told.value.status == 403

    run(act)


def test_without_a_server_or_token_it_is_told(tmp_path: Path) -> None:
    async def act() -> None:
        async with serving(FakeServer(), str(tmp_path / "token")) as access:
            pass
        async with Client(access) as client:
            with pytest.raises(ApiError, match="cannot be reached"):
                await client.get(PODS)
            (tmp_path / "token").unlink()
            with pytest.raises(ApiError, match="mount the service account's token"):
                await client.get(PODS)

    run(act)
