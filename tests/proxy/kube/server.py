"""An API server of a few kinds on loopback, which can be made to fail in every way that a real one has."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from pellucid_proxy.kube.access import Access

PODS = "/api/v1/pods"
SNAPSHOTS = "/apis/pellucid.dev/v1alpha1/transparentsnapshots"
NODES = "/api/v1/nodes"


@dataclass
class FakeServer:
    """collections: objects by path and name. fails: called with each request, may answer it instead of the server. page: objects a page."""

    collections: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    page: int = 2
    token: str = "secret"
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    bodies: list[tuple[str, str, Any]] = field(default_factory=list)
    fails: Callable[[web.Request], web.StreamResponse | None] = lambda _request: None
    version: int = 100
    history: list[tuple[int, str, str, dict[str, Any]]] = field(default_factory=list)
    oldest: int = 0
    """Watches from versions before this one are gone."""
    closing: int = 0
    """Raised: all watches end."""
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def put(self, path: str, value: dict[str, Any]) -> None:
        """The object is there, or is another one."""
        async with self.changed:
            self.version += 1
            name = value["metadata"]["name"]
            value = {**value, "metadata": {**value["metadata"], "resourceVersion": str(self.version)}}
            kind = "MODIFIED" if name in self.collections.setdefault(path, {}) else "ADDED"
            self.collections[path][name] = value
            self.history.append((self.version, path, kind, value))
            self.changed.notify_all()

    async def remove(self, path: str, name: str) -> None:
        async with self.changed:
            self.version += 1
            value = self.collections[path].pop(name)
            value = {**value, "metadata": {**value["metadata"], "resourceVersion": str(self.version)}}
            self.history.append((self.version, path, "DELETED", value))
            self.changed.notify_all()

    async def forget(self) -> None:
        """Compacted: whoever watches from before has to list again, and all watches end."""
        async with self.changed:
            self.oldest = self.version
            self.history.clear()
            self.closing += 1
            self.changed.notify_all()

    async def break_off(self) -> None:
        """All watches end."""
        async with self.changed:
            self.closing += 1
            self.changed.notify_all()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path, dict(request.query)))
        if (failure := self.fails(request)) is not None:
            return failure
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return refusal(401, "Unauthorized")
        if request.method != "GET":
            return await self._write(request)
        if request.query.get("watch"):
            return await self._watch(request)
        if request.path in self.collections:
            return self._list(request)
        path, _, name = request.path.rpartition("/")
        value = self.collections.get(path, {}).get(name)
        return refusal(404, "not found") if value is None else web.json_response(value)

    async def _write(self, request: web.Request) -> web.Response:
        text = await request.text()
        self.bodies.append((request.method, request.path, json.loads(text) if text else None))
        path, _, name = request.path.removesuffix("/status").rpartition("/")
        if request.method == "DELETE":
            if name not in self.collections.get(path, {}):
                return refusal(404, "not found")
            await self.remove(path, name)
            return web.json_response({"status": "Success"})
        value = json.loads(text)
        if request.path.endswith("/status") and name not in self.collections.get(path, {}):
            return refusal(404, "not found")
        before = self.collections.get(path, {}).get(name, {})
        await self.put(path, {**before, **value, "metadata": {**before.get("metadata", {}), **value["metadata"]}})
        return web.json_response(self.collections[path][name])

    def _list(self, request: web.Request) -> web.Response:
        items = [value for _, value in sorted(self.collections[request.path].items())]
        start, metadata = int(request.query.get("continue", "0")), {"resourceVersion": str(self.version)}
        if start + self.page < len(items):
            metadata["continue"] = str(start + self.page)
        return web.json_response({"metadata": metadata, "items": items[start : start + self.page]})

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        since, closing = int(request.query["resourceVersion"]), self.closing
        if since < self.oldest:
            return refusal(410, "too old")
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            async with self.changed:
                while self.closing == closing and not any(version > since for version, *_ in self.history):
                    await self.changed.wait()
                events = [
                    (kind, value)
                    for version, path, kind, value in self.history
                    if version > since and path == request.path
                ]
                since = self.version
            for kind, value in events:
                await response.write(json.dumps({"type": kind, "object": value}).encode() + b"\n")
            bookmark = {"kind": "X", "metadata": {"resourceVersion": str(since)}}
            await response.write(json.dumps({"type": "BOOKMARK", "object": bookmark}).encode() + b"\n")
            if self.closing != closing:
                return response


async def comes_true(holds: Callable[[], bool], patience_s: float = 20.0) -> bool:
    """Whether it does, asked again and again."""
    deadline = time.monotonic() + patience_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.01)  # between two looks
    return True


def refusal(status: int, message: str) -> web.Response:
    return web.json_response({"kind": "Status", "message": message, "code": status}, status=status)


@asynccontextmanager
async def serving(server: FakeServer, token_file: str) -> AsyncIterator[Access]:
    """It answers at Access.url."""
    with open(token_file, "w", encoding="ascii") as file:  # noqa: ASYNC230  # a test's own loop
        file.write(server.token)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    try:
        yield Access(f"http://127.0.0.1:{port}", token_file)
    finally:
        await server.break_off()
        await runner.cleanup()
