"""The agent's end of the workers' control channels (control.py)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable

import msgspec

from ..control import (
    MAX_MESSAGE,
    Applied,
    Drain,
    GetStats,
    RecordFlows,
    Refused,
    Review,
    Series,
    SetAddresses,
    SetPolicy,
    Stats,
    ToAgent,
    ToWorker,
)
from ..worker_config import read_memfd, sealed_memfd
from .collector import merged

log = logging.getLogger(__name__)

MAX_STATS_BYTES = 16 << 20  # what a worker may have the agent read
STATS_TIMEOUT_S = 0.5
POLICY_TIMEOUT_S = 5.0

_message = msgspec.msgpack.Decoder(ToAgent)
_series = msgspec.msgpack.Decoder(list[Series])


class WorkerLink:
    """One worker. It is not trusted: whatever it sends, the agent neither waits nor fails."""

    def __init__(
        self,
        index: int,
        control: socket.socket,
        ended: Callable[[WorkerLink], None],
        ends: int = 0,
        leaving: bool = False,
    ) -> None:
        """control: SOCK_SEQPACKET, non-blocking; closed by close() or when the worker's end is. ended: called once, then.

        ends: how many workers of that index ended before. leaving: of an instance before this one; it accepts nothing more."""
        self.index = index
        self.ends = ends
        self.leaving = leaving
        self.counted: list[Series] = []  # the last that it said
        self.revision: str | None = None  # by which new connections are decided
        self._control = control
        self._ended = ended
        self._answers: dict[str | int, asyncio.Future[str | list[Series]]] = {}
        self._requests = 0
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(control.fileno(), self._on_readable)

    @property
    def alive(self) -> bool:
        return self._control.fileno() >= 0

    async def set_policy(self, revision: str, content: bytes) -> str:
        """Have new connections decided by content (a PolicySet as msgpack). Returns "", or why the worker did not take it."""
        memfd = sealed_memfd("pellucid-policy", content)  # one each: descriptors of one file would share their offset
        try:
            why = await self._ask(revision, SetPolicy(revision, len(content)), POLICY_TIMEOUT_S, [memfd])
        finally:
            os.close(memfd)
        if why is None:
            return f"worker {self.index} did not answer within {POLICY_TIMEOUT_S:g} s"
        assert isinstance(why, str)
        return f"worker {self.index}: {why}" if why else ""

    def review(self) -> None:
        """Have the worker decide live connections again."""
        with contextlib.suppress(OSError):  # it has ended, or does not read: then it did not take the policy either
            self._send(Review())

    async def stats(self) -> list[Series] | None:
        """What the worker counted so far; None if it does not answer in time."""
        self._requests += 1
        answer = await self._ask(self._requests, GetStats(self._requests), STATS_TIMEOUT_S)
        assert not isinstance(answer, str)
        if answer is not None:
            self.counted = answer
        return answer

    def set_addresses(self, addresses: tuple[bytes, ...]) -> None:
        """The worker knows the node's own addresses."""
        try:
            self._send(SetAddresses(addresses))
        except OSError as err:
            log.error("worker %d: it is not told of the node's %d addresses: %s", self.index, len(addresses), err)

    def record_flows(self, on: bool) -> None:
        """Have the worker make flow records, or not."""
        with contextlib.suppress(OSError):
            self._send(RecordFlows(on))

    def drain(self, seconds: float) -> None:
        """Have the worker accept nothing more and end with its last connection, or after seconds."""
        with contextlib.suppress(OSError):
            self._send(Drain(seconds))

    def close(self) -> None:
        """Lets go of the worker; may be called twice."""
        if not self.alive:
            return
        self._loop.remove_reader(self._control.fileno())
        self._control.close()
        for answer in self._answers.values():
            answer.cancel()
        self._ended(self)

    async def _ask(
        self, key: str | int, message: ToWorker, timeout_s: float, descriptors: list[int] | None = None
    ) -> str | list[Series] | None:
        """The answer that bears key; None if none comes in time, or ever."""
        answer: asyncio.Future[str | list[Series]] = self._loop.create_future()
        self._answers[key] = answer
        try:
            self._send(message, descriptors)
            done, _ = await asyncio.wait([answer], timeout=timeout_s)
            return answer.result() if done and not answer.cancelled() else None
        except OSError:  # it has ended, or its queue is full: it does not read
            return None
        finally:
            answer.cancel()
            if self._answers.get(key) is answer:
                del self._answers[key]

    def _send(self, message: ToWorker, descriptors: list[int] | None = None) -> None:
        socket.send_fds(self._control, [msgspec.msgpack.encode(message)], descriptors or [])

    def _on_readable(self) -> None:
        try:
            packet, descriptors, _, _ = socket.recv_fds(self._control, MAX_MESSAGE, 4)
        except BlockingIOError:
            return
        except ConnectionError:
            packet, descriptors = b"", []
        try:
            if packet:
                self._on_message(_message.decode(packet), descriptors)
            else:
                self.close()
        except (msgspec.MsgspecError, ValueError, OSError) as err:
            log.error("worker %d: a message that cannot be read: %s", self.index, err)
        finally:
            for fd in descriptors:
                os.close(fd)

    def _on_message(self, message: ToAgent, descriptors: list[int]) -> None:
        match message:
            case Applied(revision=revision):
                self.revision = revision
                self._answer(revision, "")
            case Refused(revision=revision, why=why):
                self._answer(revision, why or "refused without a reason")
            case Stats(request=request, size=size):
                if len(descriptors) != 1 or not 0 <= size <= MAX_STATS_BYTES:
                    raise ValueError(f"Stats with {len(descriptors)} descriptors and {size} bytes")
                self._answer(request, _series.decode(read_memfd(descriptors[0], size)))

    def _answer(self, key: str | int, value: str | list[Series]) -> None:
        answer = self._answers.get(key)
        if answer is not None and not answer.done():
            answer.set_result(value)


class Workers:
    """All workers of the node. past: what workers that ended had counted, as far as they said; it stays in the sums."""

    def __init__(self, left: Callable[[int], object] = int) -> None:
        """left: called with the index of a leaving worker that has ended; by default nobody hears."""
        self.links: list[WorkerLink] = []
        self._left = left
        self.past: list[Series] = []
        self._addresses: tuple[bytes, ...] | None = None
        self._all_ended = asyncio.Event()
        self._all_ended.set()

    @property
    def staying(self) -> list[WorkerLink]:
        """Those of this run."""
        return [link for link in self.links if not link.leaving]

    def add(self, index: int, control: socket.socket, ends: int = 0, leaving: bool = False) -> WorkerLink:
        """Takes over control. A worker of that index that was there before has ended."""
        for link in self.links:
            if link.index == index:
                link.close()
        self._all_ended.clear()
        added = WorkerLink(index, control, self._on_end, ends, leaving)
        if self._addresses is not None:
            added.set_addresses(self._addresses)
        self.links = sorted([*(link for link in self.links if link.index != index), added], key=lambda link: link.index)
        return added

    def set_addresses(self, addresses: tuple[bytes, ...]) -> None:
        """All workers know the node's own addresses, and so do those that are started later."""
        self._addresses = addresses
        for link in self._live():
            link.set_addresses(addresses)

    async def set_policy(self, revision: str, content: bytes) -> list[str]:
        """Give all workers a policy; returns why each that did not take it did not. A leaving one may be too old to know it: it goes on
        by the one that it has."""
        links = self._live()
        answers = await asyncio.gather(*(link.set_policy(revision, content) for link in links))
        for link, why in zip(links, answers, strict=True):
            if why and link.leaving and link.alive:
                log.warning("leaving %s; its connections go on by the policy that it has", why)
        return [why for link, why in zip(links, answers, strict=True) if why and not link.leaving]

    async def stats(self) -> dict[int, list[Series] | None]:
        """What each worker counted, by index; None for one that did not answer in time."""
        links = list(self.links)
        return {
            link.index: answer
            for link, answer in zip(links, await asyncio.gather(*(link.stats() for link in links)), strict=True)
        }

    def review(self) -> None:
        for link in self._live():
            link.review()

    def record_flows(self, on: bool) -> None:
        for link in self._live():
            link.record_flows(on)

    def drain(self, seconds: float) -> None:
        for link in self._live():
            link.drain(seconds)

    async def all_ended(self) -> None:
        await self._all_ended.wait()

    def close(self) -> None:
        for link in self.links:
            link.close()

    def _live(self) -> list[WorkerLink]:
        return [link for link in self.links if link.alive]

    def _on_end(self, link: WorkerLink) -> None:
        self.past = merged([*self.past, *(each for each in link.counted if each.kind != "gauge")])
        if link.leaving and link in self.links:
            self.links.remove(link)
            self._left(link.index)
        if not self._live():
            self._all_ended.set()
