"""Where flow records go from the agent: to the file, into a bounded memory of the last ones, and to whoever watches.

Workers make records only while somebody wants them: the file, or a first observer (docs/adr/0019). A slow observer
loses records, which it is told, and delays nobody: neither traffic nor the other observers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import msgspec

from ..control import Series
from ..settings import NodeSettings
from .flows import FlowFile
from .status import PATIENCE_S, VERSION, refusal


class FlowsRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """get: flows. history: first the records that are kept. follow: then those to come, until one side closes the connection.

    The answer: a line with Observing, then records, a line each; between them Lost where records are missing, and Live once behind
    the history."""

    get: str = "flows"
    version: int = VERSION
    history: bool = False
    follow: bool = False


class Observing(msgspec.Struct, frozen=True):
    """observing: True. recorded: records were made before this question already; else they begin now. kept: how many there are.

    file: where all of them are appended to."""

    observing: bool
    recorded: bool
    kept: int
    file: str | None


class Lost(msgspec.Struct, frozen=True):
    """So many records were dropped here, because the observer did not read in time."""

    lost: int


class Live(msgspec.Struct, frozen=True):
    """live: True. What follows happens now."""

    live: bool


class Observer:
    """The records that wait for one observer, at most limit bytes of them. lost: how many did not find room."""

    def __init__(self, limit: int) -> None:
        self.lost = 0
        self._limit = limit
        self._chunks: deque[bytes] = deque()
        self._bytes = 0
        self._missing = 0  # not told yet
        self._some = asyncio.Event()

    def put(self, lines: bytes) -> int:
        """Have lines wait; how many of them were lost instead."""
        if self._bytes + len(lines) > self._limit:
            count = lines.count(b"\n")
            self.lost += count
            self._missing += count
            return count
        if self._missing:
            self._chunks.append(msgspec.json.encode(Lost(self._missing)) + b"\n")
            self._missing = 0
        self._chunks.append(lines)
        self._bytes += len(lines)
        self._some.set()
        return 0

    async def next(self) -> bytes:
        """What waits, as soon as something does."""
        await self._some.wait()
        self._some.clear()
        chunks, self._chunks = self._chunks, deque()
        self._bytes = 0
        return b"".join(chunks)


class FlowHub:
    """All the records of a node pass here. wanted_changed(wanted) is called whenever records begin or cease to be wanted.

    settings: None until they are known; nobody can observe before."""

    def __init__(self, file: FlowFile | None, wanted_changed: Callable[[bool], None]) -> None:
        self.settings: NodeSettings | None = None
        self.lost_by_observers = 0
        self._file = file
        self._wanted_changed = wanted_changed
        self._observers: set[Observer] = set()
        self._kept: deque[bytes] = deque()
        self._kept_bytes = 0

    @property
    def wanted(self) -> bool:
        """Whether workers are to make records."""
        return self._file is not None or bool(self._observers)

    def put(self, lines: bytes) -> None:
        """Hand whole lines on. Never waits."""
        if self._file is not None:
            self._file.put(lines)
        self._keep(lines)
        for observer in self._observers:
            self.lost_by_observers += observer.put(lines)

    def count_lost(self, lines: int) -> None:
        """So many records were lost on the way here."""
        if self._file is not None:
            self._file.count_lost(lines)

    def kept(self) -> list[bytes]:
        """The last records in chunks of whole lines, oldest first, at most settings.flow_history_bytes."""
        return list(self._kept)

    def series(self) -> Iterator[Series]:
        yield Series("observers", "gauge", (), len(self._observers))
        yield Series("events_dropped", "counter", ("observer",), self.lost_by_observers)

    async def answer(self, line: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """status.Answer."""
        try:
            asked = msgspec.json.decode(line, type=FlowsRequest)
        except (msgspec.MsgspecError, UnicodeDecodeError) as err:
            writer.write(refusal(f"{err}", "ask as pellucid_proxy.agent.flow_hub.FlowsRequest says") + b"\n")
            return
        if self.settings is None:
            writer.write(refusal("no policy is enforced yet", "ask again when `pellucid status` says so") + b"\n")
        elif asked.follow and len(self._observers) >= self.settings.max_observers:
            writer.write(refusal(f"{len(self._observers)} observers watch already", "end one of them") + b"\n")
        else:
            await self._tell(asked, self.settings.observer_buffer_bytes, reader, writer)

    async def _tell(
        self, asked: FlowsRequest, limit: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        chunks = self.kept() if asked.history else []
        path = self._file.path if self._file is not None else None
        said = Observing(True, self.wanted, sum(chunk.count(b"\n") for chunk in chunks), path)
        observer = self._subscribed(limit) if asked.follow else None  # from here on nothing is missed
        try:
            writer.write(msgspec.json.encode(said) + b"\n")
            for chunk in chunks:
                writer.write(chunk)
                async with asyncio.timeout(PATIENCE_S):
                    await writer.drain()
            writer.write(msgspec.json.encode(Live(True)) + b"\n")
            if observer is not None:
                await _until_either(_pump(observer, writer), reader.read())
        finally:
            if observer is not None:
                self._unsubscribe(observer)

    def _subscribed(self, limit: int) -> Observer:
        wanted, observer = self.wanted, Observer(limit)
        self._observers.add(observer)
        if not wanted:
            self._wanted_changed(True)
        return observer

    def _unsubscribe(self, observer: Observer) -> None:
        self._observers.discard(observer)
        if not self.wanted:
            self._wanted_changed(False)

    def _keep(self, lines: bytes) -> None:
        limit = self.settings.flow_history_bytes if self.settings is not None else 0
        self._kept.append(lines)
        self._kept_bytes += len(lines)
        while self._kept_bytes > limit:
            self._kept_bytes -= len(self._kept.popleft())


async def _pump(observer: Observer, writer: asyncio.StreamWriter) -> None:
    """For as long as the connection stands. A reader that hangs makes drain wait; meanwhile observer loses and counts."""
    with contextlib.suppress(OSError):
        while True:
            writer.write(await observer.next())
            await writer.drain()


async def _until_either(*both: Coroutine[Any, Any, object]) -> None:
    """Runs both until one has ended; the other is cancelled."""
    tasks = [asyncio.create_task(each) for each in both]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
