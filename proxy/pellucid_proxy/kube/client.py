"""Requests to the API server over aiohttp, as a pod with a service account."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgspec

from .access import Access, ApiError

REQUEST_S = 20.0  # for a whole answer
CONNECT_S = 5.0
MAX_ANSWER_BYTES = 64 << 20
MAX_LINE_BYTES = 4 << 20  # of a watch: an object of etcd has at most 1.5 MB, in JSON a little more
WATCH_S = 300  # how long the server is asked to keep a watch open
SILENCE_S = 90.0  # bookmarks come every minute; a watch that is silent for longer is dead
PAGE = 500
CONFLICT, GONE, NOT_FOUND = 409, 410, 404


class Client:
    """An async context manager: one pool of connections, closed at its end. Paths begin with /api or /apis."""

    def __init__(self, access: Access) -> None:
        """Raises ApiError where the CA file cannot be read."""
        self._access = access
        try:
            tls = ssl.create_default_context(cafile=access.ca_file or None) if access.url.startswith("https") else True
        except OSError as err:
            raise ApiError(
                0, f"{access.ca_file}: {err.strerror or err}; mount the service account's token into the pod"
            ) from err
        self._tls: ssl.SSLContext | bool = tls
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(ssl=self._tls, limit=8, use_dns_cache=False)
        self._session = aiohttp.ClientSession(
            self._access.url,
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=1 << 16,
            max_line_size=1 << 16,
            trust_env=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None
        await self._session.close()

    async def get(self, path: str, parameters: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The object or list at path. Raises ApiError."""
        return await self._json("GET", path, parameters)

    async def apply(self, path: str, value: Mapping[str, Any], manager: str) -> dict[str, Any]:
        """Server-side apply as field manager, taking over fields that another one has. Raises ApiError."""
        return await self._json(
            "PATCH", path, {"fieldManager": manager, "force": "true"}, value, "application/apply-patch+yaml"
        )

    async def merge(self, path: str, value: Mapping[str, Any]) -> dict[str, Any]:
        """JSON merge patch (RFC 7386). Raises ApiError."""
        return await self._json("PATCH", path, None, value, "application/merge-patch+json")

    async def delete(self, path: str) -> None:
        """It is gone, or was not there. Raises ApiError."""
        try:
            await self._json("DELETE", path)
        except ApiError as err:
            if err.status != NOT_FOUND:
                raise

    @asynccontextmanager
    async def watch(self, path: str, parameters: Mapping[str, str]) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """Events of a watch, until the server ends it. Raises ApiError, also for a watch that has fallen silent."""
        asked = {**parameters, "watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(WATCH_S)}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
        async with self._answer("GET", path, asked, None, None, timeout) as answer:
            yield _events(path, answer)

    async def _json(
        self,
        method: str,
        path: str,
        parameters: Mapping[str, str] | None = None,
        value: Mapping[str, Any] | None = None,
        content_type: str | None = None,
    ) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=REQUEST_S, sock_connect=CONNECT_S)
        async with self._answer(method, path, parameters, value, content_type, timeout) as answer:
            return _decoded(path, await _all_of(answer, path))
        raise AssertionError  # for mypy, which cannot know that _answer suppresses nothing

    @asynccontextmanager
    async def _answer(
        self,
        method: str,
        path: str,
        parameters: Mapping[str, str] | None,
        value: Mapping[str, Any] | None,
        content_type: str | None,
        patience: aiohttp.ClientTimeout,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        assert self._session is not None
        headers = {"Accept": "application/json", "User-Agent": "pellucid-node"}
        if token := self._token():
            headers["Authorization"] = f"Bearer {token}"
        if content_type is not None:
            headers["Content-Type"] = content_type
        data = None if value is None else json.dumps(value).encode()
        with _Failures(path):
            async with self._session.request(
                method, path, params=parameters, data=data, headers=headers, timeout=patience, allow_redirects=False
            ) as answer:
                if answer.status >= 300:
                    raise _refusal(method, path, answer.status, await answer.content.read(65536))
                yield answer

    def _token(self) -> str:
        if not self._access.token_file:
            return ""
        try:
            with open(self._access.token_file, encoding="ascii") as file:
                return file.read().strip()
        except (OSError, UnicodeDecodeError) as err:
            raise ApiError(
                0, f"{self._access.token_file}: cannot be read ({err}); mount the service account's token"
            ) from err


class _Failures:
    """Whatever goes wrong below HTTP becomes an ApiError of status 0."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(value, TimeoutError):  # aiohttp's are its subclasses
            raise ApiError(0, f"{self._path}: the API server does not answer in time") from value
        if isinstance(value, aiohttp.ClientError | OSError):
            raise ApiError(
                0, f"{self._path}: the API server cannot be reached: {str(value) or type(value).__name__}"
            ) from value


async def _all_of(answer: aiohttp.ClientResponse, path: str) -> bytes:
    data = bytearray()
    async for chunk in answer.content.iter_any():
        data += chunk
        if len(data) > MAX_ANSWER_BYTES:
            raise ApiError(0, f"{path}: the answer is larger than {MAX_ANSWER_BYTES >> 20} MiB")
    return bytes(data)


async def _events(path: str, answer: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    pending = bytearray()
    async for chunk in answer.content.iter_any():
        pending += chunk
        if b"\n" in chunk:
            *lines, rest = bytes(pending).split(b"\n")
            pending = bytearray(rest)
            for line in filter(None, lines):
                yield _decoded(path, line)
        if len(pending) > MAX_LINE_BYTES:
            raise ApiError(0, f"{path}: an event is larger than {MAX_LINE_BYTES >> 20} MiB")


def _decoded(path: str, data: bytes) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as err:
        raise ApiError(0, f"{path}: the answer is no JSON: {err}") from err
    if not isinstance(found, dict):
        raise ApiError(0, f"{path}: the answer is no object")
    return found


def _refusal(method: str, path: str, status: int, body: bytes) -> ApiError:
    try:
        said = str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        said = body.decode(errors="replace")[:200]
    cure = {
        401: "; the token is not taken: is the service account still there?",
        403: "; give the service account the right (the chart's ClusterRole and Role have it)",
    }.get(status, "")
    return ApiError(status, f"{method} {path}: {status}: {said}{cure}")
