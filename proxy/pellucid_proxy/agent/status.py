"""What the node enforces, told to whoever may open the Unix socket in the state folder; other questions have modules of their own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping

import msgspec

NAME = "status.sock"
MAX_REQUEST_BYTES = 4096
PATIENCE_S = 2.0


VERSION = 1
"""Of the questions; an agent refuses those of another one."""


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of JSON, the only one of a connection. get: status, or one of serve_status's other questions, which have more fields."""

    get: str


class _Asked(msgspec.Struct, frozen=True):
    """What every question has."""

    get: str
    version: int = VERSION


Answer = Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
"""Answers the question in a line; the caller closes both streams."""


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
    strains: which limits are near. instance: `run --instance`, or the process id.
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
    strains: tuple[str, ...] = ()
    instance: str = ""


class NotRunning(Exception):
    """No agent answers in that state folder; says why. cure: what to do."""

    def __init__(self, why: str, cure: str = "start `pellucid run`, or name its folder with --state") -> None:
        super().__init__(why)
        self.cure = cure


def read_status(state: str, timeout_s: float = PATIENCE_S) -> NodeStatus:
    """Ask the node whose state folder this is. Raises NotRunning."""
    with connected(state, timeout_s) as client, translated(state):
        client.sendall(msgspec.json.encode(Request("status")) + b"\n")
        with client.makefile("rb") as answer:
            return msgspec.json.decode(answer.read(), type=NodeStatus)


@contextlib.contextmanager
def connected(state: str, timeout_s: float) -> Iterator[socket.socket]:
    """A connection to the agent whose state folder this is, closed at the end. Raises NotRunning."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(timeout_s)
        with translated(state), _short_path(state) as path:
            client.connect(path)
        yield client


@contextlib.contextmanager
def translated(state: str) -> Iterator[None]:
    """Whatever goes wrong in here becomes NotRunning, which says whose fault it is."""
    try:
        yield
    except FileNotFoundError as err:
        raise NotRunning(f"{state}: no pellucid runs with this state folder") from err
    except ConnectionRefusedError as err:
        raise NotRunning(f"{state}: pellucid has ended without tidying up") from err
    except PermissionError as err:
        raise NotRunning(f"{state}: you may not ask this pellucid", "ask as the user that runs it, or as root") from err
    except TimeoutError as err:
        raise NotRunning(
            f"{state}: the agent does not answer", "look into its log; is the machine out of CPU?"
        ) from err
    except OSError as err:
        raise NotRunning(f"{state}: {err.strerror or err}") from err
    except msgspec.MsgspecError as err:
        raise NotRunning(
            f"{state}: the answer cannot be read, perhaps it is of another version: {err}",
            "use the `pellucid` of the version that runs",
        ) from err


async def serve_status(
    state: str, status: Callable[[], Awaitable[NodeStatus]], others: Mapping[str, Answer] | None = None
) -> asyncio.Server:
    """Answer on a socket of mode 0600 in folder state; one that a dead agent left is replaced (the lock says that it is dead).

    others: who answers what else may be asked for, by Request.get."""
    questions = others or {}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            # Cancelled: at the agent's end; let through, asyncio.streams would log it as a fault.
            with contextlib.suppress(OSError, TimeoutError, ValueError, asyncio.CancelledError):
                async with asyncio.timeout(PATIENCE_S):
                    line = await reader.readline()
                other = questions.get(_asked(line))
                if other is not None:
                    await other(line, reader, writer)
                    return
                async with asyncio.timeout(PATIENCE_S):
                    writer.write(await _answer(line, status) + b"\n")
                    await writer.drain()
        finally:
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


def _asked(line: bytes) -> str:
    """What a question is for; "" for one that is of another version, or is none."""
    try:
        asked = msgspec.json.decode(line, type=_Asked)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return ""
    return asked.get if asked.version == VERSION else ""


def refusal(what: str, cure: str = "") -> bytes:
    """The answer to a question that has none, as a line without its end."""
    return msgspec.json.encode({"error": what, "cure": cure} if cure else {"error": what})


async def _answer(line: bytes, status: Callable[[], Awaitable[NodeStatus]]) -> bytes:
    try:
        request = msgspec.json.decode(line, type=Request)
    except (msgspec.MsgspecError, UnicodeDecodeError) as err:
        return msgspec.json.encode({"error": f'{err}; ask {{"get":"status"}}'})
    if request.get != "status":  # or what serve_status knows by that name, of another version
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
