"""The objects of one kind, kept like the API server's: listed once, watched from then on, listed again when a watch cannot go on."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import msgspec

from .access import ApiError
from .client import GONE, PAGE, Client

log = logging.getLogger(__name__)

T = TypeVar("T")
S = TypeVar("S")
Key = tuple[str, str]
"""namespace ("" for what has none) and name."""

FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 10.0
QUIET_S = 5.0  # a watch that lived so long was a good one: after it the wait is as short as the first


class _Meta(msgspec.Struct, frozen=True, rename="camel"):
    """metadata of an object or a list, as far as it is read here."""

    resource_version: str
    name: str = ""
    namespace: str = ""
    rest: str = msgspec.field(default="", name="continue")


class _Page(msgspec.Struct, frozen=True):
    metadata: _Meta
    items: list[dict[str, Any]] | None = None


class _Event(msgspec.Struct, frozen=True):
    type: str
    object: dict[str, Any]


class Reflector(Generic[T]):
    """objects: what keep() made of each; complete once synced is set. problem: why they may be stale, "" if they are not.

    heard: time.monotonic() of the last word of the API server. run() is to be a task."""

    def __init__(
        self,
        client: Client,
        path: str,
        keep: Callable[[dict[str, Any]], T],
        on_change: Callable[[], None],
        parameters: Mapping[str, str] | None = None,
    ) -> None:
        """keep: called once for each version of an object; what it returns is all that stays of it; may raise msgspec.ValidationError.
        on_change: something is different."""
        self.objects: dict[Key, T] = {}
        self.synced = asyncio.Event()
        self.problem = ""
        self.heard = time.monotonic()
        self._client = client
        self._path = path
        self._keep = keep
        self._on_change = on_change
        self._parameters = dict(parameters or {})
        self._version: str | None = None  # of the last event; None: to be listed

    async def run(self) -> None:
        """Until it is cancelled."""
        wait_s = FIRST_WAIT_S
        while True:
            began = time.monotonic()
            try:
                if self._version is None:
                    await self._list()
                await self._watch()
            except ApiError as err:
                if err.status == GONE:
                    self._version = None
                    log.info("%s: listed anew, for the watch cannot go on: %s", self._path, err)
                else:
                    self._trouble(str(err))
            if time.monotonic() - began > QUIET_S:
                wait_s = FIRST_WAIT_S
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.5))
            wait_s = min(LONGEST_WAIT_S, wait_s * 2)

    def _trouble(self, why: str) -> None:
        if why != self.problem:
            log.warning("%s", why)
        self.problem = why

    def _well(self) -> None:
        self.heard = time.monotonic()
        self.problem = ""

    async def _list(self) -> None:
        found: dict[Key, T] = {}
        parameters = {**self._parameters, "limit": str(PAGE)}
        while True:
            page = self._read(await self._client.get(self._path, parameters), _Page)
            for each in page.items or ():
                found[_key(self._meta(each))] = self._kept(each)
            if not page.metadata.rest:
                break
            parameters["continue"] = page.metadata.rest
        self._well()
        changed = found != self.objects or not self.synced.is_set()
        self.objects = found
        self._version = page.metadata.resource_version
        self.synced.set()
        if changed:
            self._on_change()

    async def _watch(self) -> None:
        assert self._version is not None
        async with self._client.watch(self._path, {**self._parameters, "resourceVersion": self._version}) as events:
            self._well()
            async for event in events:
                self._well()
                self._take(self._read(event, _Event))

    def _take(self, event: _Event) -> None:
        kind, value = event.type, event.object
        if kind == "ERROR":
            raise ApiError(_code(value), f"{self._path}: {value.get('message', 'the watch failed')}")
        meta = self._meta(value)
        if kind != "BOOKMARK":
            if kind == "DELETED":
                self.objects.pop(_key(meta), None)
            else:
                self.objects[_key(meta)] = self._kept(value)
            self._on_change()
        self._version = meta.resource_version

    def _meta(self, value: Mapping[str, Any]) -> _Meta:
        return self._read(value.get("metadata"), _Meta)

    def _kept(self, value: dict[str, Any]) -> T:
        try:
            return self._keep(value)
        except msgspec.ValidationError as err:
            raise ApiError(0, f"{self._path}: {'/'.join(_key(self._meta(value)))}: {err}") from err

    def _read(self, value: object, kind: type[S]) -> S:
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as err:
            raise ApiError(0, f"{self._path}: the answer is not what was asked for: {err}") from err


def _key(meta: _Meta) -> Key:
    return meta.namespace, meta.name


def _code(status: Mapping[str, Any]) -> int:
    """Of a Status; 0 if there is none."""
    code = status.get("code")
    return code if isinstance(code, int) else 0
