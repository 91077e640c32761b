"""Where recorded flows come from: a running node's agent, or a file of flow records."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import click

from .fault import Fault

if TYPE_CHECKING:
    import socket

_LOOK_S = 0.1
_CONNECT_S = 5.0
_LARGEST_ANSWER = 1 << 20  # of one line; a record has a few hundred bytes


class Line(NamedTuple):
    """A line of JSON. kind: flow, or live: what follows happens now."""

    kind: str
    text: bytes


def from_file(path: str, *, follow: bool) -> Iterator[Line]:
    """The records of a file; - is standard input. follow: and those that are appended, without end. Raises Fault."""
    try:
        with click.open_file(path, "rb") as file:
            rest = b""
            while True:
                for text in file:
                    rest += text
                    if rest.endswith(b"\n"):
                        yield Line("flow", rest.rstrip(b"\n"))
                        rest = b""
                if not follow:
                    break
                yield Line("live", b"")
                time.sleep(_LOOK_S)
    except OSError as err:
        raise Fault(
            "--file", f"{path}: {err.strerror}", "give a file of flow records, as `run --flows FILE` writes it"
        ) from err


def from_node(
    state: str, *, history: bool, follow: bool, said: Callable[[bool, str | None], None], lost: Callable[[int], None]
) -> Iterator[Line]:
    """The records that a node keeps (history) and those to come (follow).

    said(recorded, file): called first: whether records were made before, and where all of them are. lost(count): so many are missing here.
    Raises NotRunning, also where the agent ends, and Fault where it refuses."""
    import msgspec

    from pellucid_proxy.agent.flow_hub import FlowsRequest, Observing
    from pellucid_proxy.agent.status import NotRunning, connected, translated

    with connected(state, _CONNECT_S) as client, translated(state):
        client.sendall(msgspec.json.encode(FlowsRequest(history=history, follow=follow)) + b"\n")
        lines = _lines(client, follow)
        first = next(lines, b"")
        if not first:
            raise NotRunning(f"{state}: pellucid ended while it was asked")
        if first.startswith(b'{"error"'):
            refused = msgspec.json.decode(first)
            raise Fault("observe", str(refused["error"]), str(refused.get("cure") or "see `pellucid status`"))
        observing = msgspec.json.decode(first, type=Observing)
        said(observing.recorded, observing.file)
        for text in lines:
            if text.startswith(b'{"lost"'):
                lost(int(msgspec.json.decode(text)["lost"]))
            elif text.startswith(b'{"live"'):
                yield Line("live", b"")
            else:
                yield Line("flow", text)
        if follow:
            raise NotRunning(
                f"{state}: the agent has ended", "see `pellucid status`; an agent that ends is started again"
            )


def _lines(client: socket.socket, follow: bool) -> Iterator[bytes]:
    rest = b""
    while True:
        data = client.recv(1 << 16)
        if not data:
            return
        *whole, rest = (rest + data).split(b"\n")
        yield from whole
        if len(rest) > _LARGEST_ANSWER:
            raise Fault(
                "observe", "the agent sends what are no flow records", "use the `pellucid` of the version that runs"
            )
        if follow:
            client.settimeout(None)  # nothing may come for hours
