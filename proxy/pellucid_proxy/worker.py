"""A worker process: accepts, decides, relays. One loop, no other thread, no rights but NET_RAW's.

python -m pellucid_proxy.worker --config-fd N
"""

from __future__ import annotations

import argparse
import array
import codecs
import gc
import logging
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback

import msgspec

from pellucid_policy.compile import PolicySet

from .capacity import within
from .control import (
    MAX_MESSAGE,
    Applied,
    GetStats,
    RecordFlows,
    Refused,
    Review,
    Series,
    SetAddresses,
    SetPolicy,
    Stats,
    ToWorker,
)
from .engine import relay
from .rights.confine import NotConfined, confine, filter_calls
from .rights.table import WORKER
from .session.desk import Desk
from .session.judge import Enforced, Judge
from .worker_config import WorkerConfig, die_with_parent, read_config, read_memfd, sealed_memfd

log = logging.getLogger("pellucid.worker")

FLUSH_S = 0.1
"""How old a flow record gets before it is handed to the agent."""


class Worker:
    """Joins engine and desk, hands records on, and does what the agent asks for."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        settings, most_pipes = within(config.settings, descriptors)
        if settings.max_connections < config.settings.max_connections:
            log.warning(
                "%d descriptors are enough for %d connections, of a pod for %d; for %d raise the limit of open files (ulimit -Hn)",
                descriptors,
                settings.max_connections,
                settings.max_connections_per_pod,
                config.settings.max_connections,
            )
        self.most = settings.max_connections
        self.judge = Judge(settings, config.node_addresses)
        self.desk = Desk(self.judge, config.node, 0, self.on_records, self.tick)
        self.engine = relay.Engine(_epoll().fileno(), True, self.desk, settings, _roomy_pipes(config), most_pipes)
        self._pending = b""
        self._drain_until: float | None = None
        self.confined: tuple[str, ...] = ()

    def on_records(self, full: bool) -> None:
        """A first record waits, or enough of them (full)."""
        if full:
            self._flush()
        self.engine.tick_within(FLUSH_S)

    def tick(self) -> None:
        self.desk.adjust_clock()
        self._flush()
        if self._drain_until is not None:
            self._drain()

    def _flush(self) -> None:
        """Hand what is waiting to the agent, as much as its pipe takes."""
        self._pending += self.desk.take()
        try:
            while self._pending:
                self._pending = self._pending[os.write(self.config.flows, self._pending) :]
        except BlockingIOError:
            self.engine.tick_within(FLUSH_S)
        except BrokenPipeError:  # the agent is gone; its successor gets a new pipe
            self._pending = b""
        self.desk.left(len(self._pending))

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
        gc.collect()  # the only time: connections leave no cycles behind, and a collection would delay some of them
        return Applied(message.revision)

    def record_flows(self, on: bool) -> None:
        self.desk.keep_up_to(self.config.settings.flow_buffer_bytes if on and self.config.flows >= 0 else 0)

    def stats(self) -> bytes:
        found = [
            *self.desk.series(self.engine.connections, self.engine.quick),
            Series("connections_limit", "gauge", (), self.most),
            Series("held_bytes", "gauge", (), self.engine.held_bytes),
            Series("accept_pauses", "counter", (), self.engine.times_paused),
            *(Series("workers_confined", "gauge", (by,), 1) for by in self.confined),
        ]
        return msgspec.msgpack.encode(found)

    def start_drain(self, seconds: float) -> None:
        self.engine.refuse_more()
        self._drain_until = time.monotonic() + seconds
        self._drain()

    def _drain(self) -> None:
        assert self._drain_until is not None
        late = time.monotonic() >= self._drain_until
        if late:
            self.engine.close_all()  # a reset: the client shall not take what it got for the whole
        if late or self.engine.connections == 0:
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
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
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

    def _handle(self, message: ToWorker, descriptors: list[int]) -> None:
        if isinstance(message, SetPolicy):
            self._send(self.worker.set_policy(message, descriptors[0] if descriptors else -1))
        elif isinstance(message, Review):
            self.worker.engine.review()
        elif isinstance(message, SetAddresses):
            self.worker.judge.set_node_addresses(message.addresses)
        elif isinstance(message, GetStats):
            content = self.worker.stats()
            try:
                fd = sealed_memfd("pellucid-stats", content)
            except OSError as err:  # no descriptor, no memory: the agent does without, and says so
                log.warning("counters are not told: %s", err.strerror)
                return
            try:
                self._send(Stats(message.request, len(content)), fd)
            finally:
                os.close(fd)
        elif isinstance(message, RecordFlows):
            self.worker.record_flows(message.on)
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


def _roomy_pipes(config: WorkerConfig) -> int:
    """Half of the pages that a user without rights may have in pipes, which all workers share: beyond them pipes of 8 KiB are all there
    is, for everybody (pipe(7): pipe-user-pages-soft)."""
    try:
        with open("/proc/sys/fs/pipe-user-pages-soft", encoding="ascii") as file:
            pages = int(file.read())
    except (OSError, ValueError):
        return 0
    if not pages:  # no limit
        return config.settings.max_connections * 2
    roomy: int = pages * resource.getpagesize() // 2 // relay.pipe_bytes // config.settings.workers
    return roomy


def _raise_file_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _confined(config: WorkerConfig) -> tuple[str, ...]:
    """Nothing of a client has been read yet, and from now on no file is opened: whatever Python loads late is loaded here."""
    _load_what_comes_late()
    confined = confine(WORKER, config.user)
    die_with_parent(config.parent)  # once more: who changes its user loses it
    return confined + filter_calls()


def _load_what_comes_late() -> None:
    """What logging an exception needs, and the clock's zone. Source lines are left out of tracebacks: they would have to be read."""
    try:
        raise LookupError
    except LookupError:
        traceback.format_exc()
    time.strftime("%Z", time.localtime())
    for name in ("ascii", "latin-1", "utf-8"):
        codecs.lookup(name)


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
    gc.disable()
    worker = Worker(config)
    signal.signal(signal.SIGTERM, lambda *_: worker.engine.stop())
    channel = socket.socket(fileno=config.control)
    channel.setblocking(False)
    _kept.append(Control(worker, channel))
    try:
        worker.confined = _confined(config)
    except NotConfined as err:
        log.error("%s: ending rather than to go on with more rights than a worker has", err)
        return 1
    worker.engine.run()
    channel.close()  # left to Python it would be asked for its peer, which a worker may not
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
