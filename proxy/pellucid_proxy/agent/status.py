"""What the node enforces, told to whoever may open the Unix socket in the state folder."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Iterator

import msgspec

NAME = "status.sock"
MAX_REQUEST_BYTES = 4096
PATIENCE_S = 2.0


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of JSON, the only one of a connection. get: status."""

    get: str


class WorkerStatus(msgspec.Struct, frozen=True):
    """revision: by which it decides new connections; None: none yet. connections: None if it did not answer.

    confined: by what: capabilities, user, seccomp; empty if it did not answer."""

    index: int
    alive: bool
    revision: str | None
    connections: int | None
    confined: tuple[str, ...] = ()


class NodeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One moment of a node. phase: starting, enforcing, draining or stopping.

    source: folder, or last-good where the folder is bad or away. problems: why what the folder holds is not enforced; empty: it is.
    rules: what others do to the kernel rules, as far as it hinders; empty: nothing.
    policies: Kind namespace/name, in order of evaluation nowhere implied. listen: ADDR:PORT.
    worker_user: uid and gid of the workers; None: those of whoever started the run. unconfined: what workers are not confined by, and why.
    """

    version: str
    node: str
    pid: int
    phase: str
    revision: str
    source: str
    folder: str
    problems: tuple[str, ...]
    workers: tuple[WorkerStatus, ...]
    connections: int
    groups: int
    pods: int
    policies: tuple[str, ...]
    scope: tuple[str, ...]
    listen: tuple[str, ...]
    engine_form: str
    uptime_s: float
    last_apply_s: float | None
    flows: str | None
    flows_dropped: int
    metrics: str | None
    rules: tuple[str, ...] = ()
    worker_user: tuple[int, int] | None = None
    unconfined: tuple[str, ...] = ()


class NotRunning(Exception):
    """No agent answers in that state folder; says why."""


def read_status(state: str, timeout_s: float = PATIENCE_S) -> NodeStatus:
    """Ask the node whose state folder this is. Raises NotRunning."""
    try:
        with _short_path(state) as path, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(timeout_s)
            client.connect(path)
            client.sendall(msgspec.json.encode(Request("status")) + b"\n")
            with client.makefile("rb") as answer:
                return msgspec.json.decode(answer.read(), type=NodeStatus)
    except FileNotFoundError as err:
        raise NotRunning(f"{state}: no pellucid runs with this state folder") from err
    except ConnectionRefusedError as err:
        raise NotRunning(f"{state}: pellucid has ended without tidying up") from err
    except OSError as err:
        raise NotRunning(f"{state}: {err.strerror or err}") from err
    except msgspec.MsgspecError as err:
        raise NotRunning(f"{state}: the answer cannot be read, perhaps it is of another version: {err}") from err


async def serve_status(state: str, status: Callable[[], Awaitable[NodeStatus]]) -> asyncio.Server:
    """Answer on a socket of mode 0600 in folder state; one that a dead agent left is replaced (the lock says that it is dead)."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Cancelled: at the agent's end; let through, asyncio.streams would log it as a fault.
        with contextlib.suppress(OSError, TimeoutError, ValueError, asyncio.CancelledError):
            async with asyncio.timeout(PATIENCE_S):
                writer.write(await _answer(await reader.readline(), status) + b"\n")
                await writer.drain()
        writer.close()

    with _short_path(state) as path:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            mask = os.umask(0o177)
            try:
                listener.bind(path)
            finally:
                os.umask(mask)
            return await asyncio.start_unix_server(answer, sock=listener, limit=MAX_REQUEST_BYTES)
        except BaseException:
            listener.close()
            raise


def remove_socket(state: str) -> None:
    """Take the socket away: nobody answers any more."""
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(state, NAME))


async def _answer(line: bytes, status: Callable[[], Awaitable[NodeStatus]]) -> bytes:
    try:
        request = msgspec.json.decode(line, type=Request)
    except (msgspec.MsgspecError, UnicodeDecodeError) as err:
        return msgspec.json.encode({"error": f'{err}; ask {{"get":"status"}}'})
    if request.get != "status":
        return msgspec.json.encode({"error": f'get: {request.get} is unknown; ask {{"get":"status"}}'})
    return msgspec.json.encode(await status())


@contextlib.contextmanager
def _short_path(state: str) -> Iterator[str]:
    """A path to the socket that fits into sockaddr_un's 108 bytes, however long the folder's own is."""
    folder = os.open(state, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{NAME}"
    finally:
        os.close(folder)
