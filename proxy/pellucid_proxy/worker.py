"""A worker process: accepts, decides, relays. One loop, no other thread, no rights but NET_RAW's.

python -m pellucid_proxy.worker --config-fd N
"""

from __future__ import annotations

import argparse
import array
import gc
import logging
import os
import resource
import select
import signal
import socket
import sys
import time

import msgspec

from pellucid_policy.compile import PolicySet

from .control import MAX_MESSAGE, Applied, Drain, GetStats, Refused, SetPolicy, Stats, ToWorker
from .engine import relay
from .session.judge import Enforced, Judge
from .session.record import Clock, Counts, flow_line
from .session.session import Session
from .worker_config import WorkerConfig, die_with_parent, read_config, read_memfd, sealed_memfd

log = logging.getLogger("pellucid.worker")

FLUSH_S = 0.1
"""How old a flow record gets before it is handed to the agent."""
FLUSH_BYTES = 65536


class Worker:
    """What the engine calls (session, closed, failed, lagged, tick), and what the agent asks for."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.judge = Judge(config.settings, config.node_addresses)
        self.counts = Counts(self.judge.tallies)
        self.engine = relay.Engine(_epoll().fileno(), True, self, config.settings)
        self._clock = Clock(time.time_ns() - time.monotonic_ns())
        self._node = f'"node":{msgspec.json.encode(config.node).decode()}'
        self._records: list[str] = []
        self._pending = b""
        self._waiting_bytes = 0
        self._drain_until: float | None = None

    # The engine calls these

    def session(self, source: bytes, destination: bytes, port: int) -> Session:
        self.counts.opened += 1
        return Session(self.judge, source, destination, port)

    def closed(
        self,
        session: Session,
        source_port: int,
        why: int,
        opened: int,
        connected: int,
        answered: int,
        now: int,
        up: int,
        down: int,
    ) -> None:
        """Times in monotonic nanoseconds, 0 for what never was; up and down in bytes."""
        self.counts.closed(session, why, opened, connected, answered, now, up, down)
        session.guard = None  # it refers back to the session
        if self.config.flows < 0:
            return
        if self._waiting_bytes >= self.config.settings.flow_buffer_bytes:
            self.counts.dropped_records += 1
            return
        line = flow_line(
            session,
            source_port,
            why,
            self._clock.text(opened),
            self._node,
            now - opened,
            answered - opened if answered else 0,
            up,
            down,
        )
        self._records.append(line)
        self._waiting_bytes += len(line)
        if self._waiting_bytes >= FLUSH_BYTES:
            self._flush()
        self.engine.tick_within(FLUSH_S)

    def failed(self) -> None:
        """Something raised where the engine cannot let it through."""
        self.counts.failed += 1
        log.exception("a connection was refused because deciding about it failed")

    def lagged(self, nanoseconds: int) -> None:
        self.counts.lag.add(nanoseconds * 1e-9)

    def tick(self) -> None:
        self._clock.offset_ns = time.time_ns() - time.monotonic_ns()
        self._flush()
        if self._drain_until is not None:
            self._drain()

    # Flow records

    def _flush(self) -> None:
        """Hand what is waiting to the agent, as much as its pipe takes."""
        if self._records:
            self._pending += "".join(self._records).encode()
            self._records.clear()
        try:
            while self._pending:
                self._pending = self._pending[os.write(self.config.flows, self._pending) :]
        except BlockingIOError:
            self.engine.tick_within(FLUSH_S)
        except BrokenPipeError:  # the agent is gone; its successor gets a new pipe
            self._pending = b""
        self._waiting_bytes = len(self._pending)

    # The agent's messages

    def set_policy(self, message: SetPolicy, fd: int) -> Applied | Refused:
        try:
            policy = msgspec.msgpack.decode(read_memfd(fd, message.size), type=PolicySet)
            enforced = Enforced(policy)
        except (OSError, ValueError, msgspec.MsgspecError, LookupError) as err:
            return Refused(message.revision, f"{type(err).__name__}: {err}")
        first = not hasattr(self.judge, "enforced")
        self.judge.enforced = enforced
        self.judge.tallies.forget_objects()
        if first:
            self.engine.listen(self.config.listeners)
        gc.collect()
        gc.freeze()  # the policy lives long: no collection need look at it
        return Applied(message.revision)

    def stats(self) -> bytes:
        return msgspec.msgpack.encode(self.counts.series(self.engine.connections, self.engine.quick))

    def start_drain(self, seconds: float) -> None:
        self.engine.refuse_more()
        self._drain_until = time.monotonic() + seconds
        self._drain()

    def _drain(self) -> None:
        assert self._drain_until is not None
        if self.engine.connections == 0 or time.monotonic() >= self._drain_until:
            self._flush()
            self.engine.stop()
        else:
            self.engine.tick_within(0.02)


class Control(relay.Handler):
    """The agent's channel. When the agent is gone the worker goes on by its last policy."""

    def __init__(self, worker: Worker, channel: socket.socket) -> None:
        self.worker = worker
        self.channel = channel
        self._decoder = msgspec.msgpack.Decoder(ToWorker)
        self.set_fd(channel.fileno())  # type: ignore[no-untyped-call]  # the engine's types are Cython's
        worker.engine.watch(self, select.EPOLLIN)

    def on_event(self, events: int) -> int:
        try:
            data, descriptors = self._receive()
            if data:
                self._handle(self._decoder.decode(data), descriptors)
            else:
                self.worker.engine.forget(self)
            for fd in descriptors:
                os.close(fd)
        except BlockingIOError:
            pass
        except (OSError, msgspec.MsgspecError):
            log.exception("the agent's channel failed; going on with the policy in force")
            self.worker.engine.forget(self)
        return 0

    def _receive(self) -> tuple[bytes, list[int]]:
        data, ancillary, _, _ = self.channel.recvmsg(MAX_MESSAGE, socket.CMSG_SPACE(4 * 4))
        descriptors = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
        return data, list(descriptors)

    def _handle(self, message: SetPolicy | GetStats | Drain, descriptors: list[int]) -> None:
        if isinstance(message, SetPolicy):
            self._send(self.worker.set_policy(message, descriptors[0] if descriptors else -1))
        elif isinstance(message, GetStats):
            content = self.worker.stats()
            fd = sealed_memfd("pellucid-stats", content)
            try:
                self._send(Stats(message.request, len(content)), fd)
            finally:
                os.close(fd)
        else:
            self.worker.start_drain(message.seconds)

    def _send(self, message: Applied | Refused | Stats, fd: int = -1) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []
        self.channel.sendmsg([msgspec.msgpack.encode(message)], ancillary)


_kept: list[object] = []


def _epoll() -> select.epoll:
    """Kept for the life of the process: the engine has its descriptor only."""
    epoll = select.epoll()
    _kept.append(epoll)
    return epoll


def _raise_file_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="pellucid-worker", description="A worker of pellucid run; the supervisor starts it."
    )
    parser.add_argument("--config-fd", type=int, required=True)
    config = read_config(parser.parse_args().config_fd, WorkerConfig)
    die_with_parent(config.parent)
    logging.basicConfig(
        level=logging.INFO, format=f"pellucid worker {config.index}: %(levelname)s %(message)s", stream=sys.stderr
    )
    _raise_file_limit()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # splice has no MSG_NOSIGNAL
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the supervisor says what to do
    worker = Worker(config)
    signal.signal(signal.SIGTERM, lambda *_: worker.engine.stop())
    channel = socket.socket(fileno=config.control)
    channel.setblocking(False)
    _kept.append(Control(worker, channel))
    worker.engine.run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
