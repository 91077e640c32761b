"""Workers and a kernel for the agent's tests: they remember what they were told."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from pellucid_proxy.control import MAX_MESSAGE, Applied, Drain, GetStats, Refused, Series, SetPolicy, Stats, ToWorker
from pellucid_proxy.kernel.apply import KernelError
from pellucid_proxy.kernel.judgement import Era, Fate
from pellucid_proxy.kernel.state import KernelState
from pellucid_proxy.kernel.watch import Drift
from pellucid_proxy.supervisor.children import seqpacket_pair
from pellucid_proxy.worker_config import read_memfd, sealed_memfd


async def eventually(holds: Callable[[], bool]) -> None:
    """Returns when holds() does; another thread or process is at work on it."""
    async with asyncio.timeout(10):
        for _ in itertools.count():
            if holds():
                return
            await asyncio.sleep(0.001)


class FakeWorker:
    """A worker's end of a control channel. control: the agent's. told: what happened, in a log that others may write to as well."""

    def __init__(self, log: list[str], name: str = "worker") -> None:
        self.log = log
        self.name = name
        self.refuses: Callable[[str], str] = lambda revision: ""  # why it does not take a revision
        self.answers = True
        self.policy = b""
        self.series: list[Series] = [Series("connections_active", "gauge", (), 1)]
        self.control, self._socket = seqpacket_pair()
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._on_readable)

    def send(self, message: object, descriptors: list[int] | None = None) -> None:
        socket.send_fds(self._socket, [msgspec.msgpack.encode(message)], descriptors or [])

    def send_bytes(self, packet: bytes) -> None:
        self._socket.send(packet)

    def die(self) -> None:
        if self._socket.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()

    def _on_readable(self) -> None:
        packet, descriptors, _, _ = socket.recv_fds(self._socket, MAX_MESSAGE, 4)
        if not packet:
            self.die()
        elif self.answers:
            self._answer(msgspec.msgpack.decode(packet, type=ToWorker), descriptors)
        for fd in descriptors:
            os.close(fd)

    def _answer(self, message: ToWorker, descriptors: list[int]) -> None:
        match message:
            case SetPolicy(revision=revision, size=size):
                why = self.refuses(revision)
                self.log.append(f"{self.name} {'refuses' if why else 'takes'} {revision}")
                if not why:
                    self.policy = read_memfd(descriptors[0], size)
                self.send(Refused(revision, why) if why else Applied(revision))
            case GetStats(request=request):
                content = msgspec.msgpack.encode(self.series)
                fd = sealed_memfd("stats", content)
                self.send(Stats(request, len(content)), [fd])
                os.close(fd)
            case Drain(seconds=seconds):
                self.log.append(f"{self.name} drains {seconds:g}")
                self.die()


class FakeRules:
    """A kernel. inherited: a table was there before this run. refuses: why a state is not loaded."""

    def __init__(self, log: list[str], inherited: bool = False) -> None:
        self.log = log
        self.inherited = inherited
        self.refuses: Callable[[KernelState], str] = lambda state: ""
        self.state: KernelState | None = None
        self.drifts: list[Drift] = []
        self.repair_fails = ""
        self.reviewed: list[list[str]] = []  # the revisions of each call

    def apply(self, state: KernelState) -> None:
        said = "hold" if state.hold else "drain" if state.drain else "rules"
        why = self.refuses(state)
        self.log.append(f"kernel refuses {said}" if why else f"kernel has {said}")
        if why:
            raise KernelError(why)
        self.state = state

    def recognise(self, state: KernelState) -> bool:
        self.log.append("kernel is looked at")
        return self.inherited

    def remove(self) -> None:
        self.log.append("kernel has nothing")
        self.state = None

    def present(self) -> bool:
        return self.inherited

    @property
    def descriptors(self) -> tuple[int, ...]:
        return ()

    def drifted(self) -> list[Drift]:
        drifts, self.drifts = self.drifts, []
        return drifts

    def audit(self) -> list[Drift]:
        return self.drifted()

    def repair(self, drifts: list[Drift]) -> list[Drift]:
        why = self.repair_fails
        self.log.append(f"kernel {'is not repaired' if why else 'is repaired'}")
        if why:
            raise KernelError(why)
        return drifts

    def review(self, eras: Sequence[Era]) -> Counter[Fate]:
        self.reviewed.append([era.state.revision for era in eras])
        return Counter()

    def series(self) -> list[Series]:
        return [Series("kernel_events", "counter", ("intercepted",), 3)]
