"""Start, watch and end the processes of a node."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

import msgspec

from ..settings import NodeSettings
from ..worker_config import WorkerConfig
from . import logs
from .children import Child, flow_pipe, how_it_ended, seqpacket_pair, spawn
from .listeners import open_listeners
from .lock import locked
from .messages import (
    MAX_PACKET,
    AgentConfig,
    Configured,
    Ready,
    ReopenFlows,
    Stop,
    ToAgent,
    ToSupervisor,
    WorkerStarted,
)
from .options import BAD_POLICY, FAILED, REFUSED, STOPPED, Refusal, RunOptions

log = logging.getLogger(__name__)

AGENT_GRACE_S = 10.0  # beyond the drain time, for taking the rules away
WORKER_GRACE_S = 2.0  # from SIGTERM to SIGKILL, once the agent is gone

_decoder = msgspec.msgpack.Decoder(ToSupervisor)


@dataclass(frozen=True, slots=True)
class Parts:
    """What the supervisor starts and opens; tests give others."""

    agent: str = "pellucid_proxy.agent"
    worker: str = "pellucid_proxy.worker"
    open_listeners: Callable[[NodeSettings], tuple[socket.socket, ...]] = open_listeners


def run(options: RunOptions, parts: Parts = Parts()) -> int:
    """Enforce the policy until SIGTERM or SIGINT, or until a process of the node ends; returns the exit status (options.py).

    The first signal drains: live connections go on for options.drain_s; the second ends at once. SIGHUP reopens the flow file.
    To be called in the main thread.
    """
    try:
        logs.start("supervisor", options.log_level)
        with locked(options.state):
            return Supervisor(options, parts).run()
    except Refusal as refusal:
        log.error("%s", refusal)
        return refusal.status


class Supervisor:
    """One run. State changes only in the methods named on_*, each called by the loop for one event."""

    def __init__(self, options: RunOptions, parts: Parts) -> None:
        self._options = options
        self._parts = parts
        self._selector = selectors.DefaultSelector()
        self._channel, self._agent_end = seqpacket_pair()
        self._listeners: tuple[socket.socket, ...] = ()
        self._agent: Child | None = None
        self._workers: list[Child] = []
        self._ready = False
        self._asked_to_stop = 0
        self._status: int | None = None  # set: the run is ending
        self._kill_at = float("inf")

    def run(self) -> int:
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            stack.enter_context(_signals_to(self._selector, self._on_signal))
            self._selector.register(self._channel, selectors.EVENT_READ, self._on_channel)
            self._start_agent()
            while self._children():
                for key, _ in self._selector.select(self._patience()):
                    key.data()
                if time.monotonic() >= self._kill_at:
                    self._kill_all()
        return FAILED if self._status is None else self._status

    # Events

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGHUP:
            self._tell_agent(ReopenFlows())
            return
        self._asked_to_stop += 1
        drain_s = self._options.drain_s if self._asked_to_stop == 1 and self._ready else 0.0
        if self._asked_to_stop == 1:
            log.info(
                "%s: stopping; live connections may go on for %g s, a second signal ends them", _name(number), drain_s
            )
        self._stop(STOPPED, Stop(drain_s))

    def _on_channel(self) -> None:
        try:
            packet = self._channel.recv(MAX_PACKET)
        except (BlockingIOError, ConnectionError):
            return
        if not packet:  # the agent's end is closed: its pidfd tells the rest
            self._selector.unregister(self._channel)
            return
        try:
            message = _decoder.decode(packet)
        except msgspec.MsgspecError as err:
            log.error("the agent sent what is no message: %s", err)
            return
        match message:
            case Configured() as configured:
                self._on_configured(configured)
            case Ready(revision=revision):
                self._ready = True
                log.info("ready: enforcing revision %s", revision)

    def _on_configured(self, configured: Configured) -> None:
        if self._status is not None or self._workers:
            return
        try:
            self._listeners = self._parts.open_listeners(configured.settings)
            for index in range(configured.settings.workers):
                self._start_worker(index, configured)
        except Refusal as refusal:
            log.error("%s", refusal)
            self._stop(refusal.status, Stop(0.0, keep_rules=True))  # the agent has not touched the kernel
        except OSError as err:
            log.error("workers cannot be started: %s", err)
            self._stop(FAILED, Stop(0.0))

    def _on_agent_end(self) -> None:
        assert self._agent is not None
        agent, self._agent = self._agent, None
        status = self._reap(agent)
        if self._status is None:
            told = status in (FAILED, BAD_POLICY, REFUSED)  # it has said why
            self._status = status if told and not self._ready else FAILED
            if self._ready or not told:
                log.error("agent %d %s; %s", agent.process.pid, how_it_ended(status), self._what_stays())
        elif status != 0 and self._status == STOPPED:
            log.error("agent %d %s while it stopped; %s", agent.process.pid, how_it_ended(status), self._what_stays())
            self._status = FAILED
        for worker in self._workers:
            worker.send_signal(signal.SIGTERM)
        self._kill_at = time.monotonic() + WORKER_GRACE_S

    def _on_worker_end(self, worker: Child) -> None:
        self._workers.remove(worker)
        status = self._reap(worker)
        if self._status is None and status == 0 and not self._ready:
            self._stop(None, Stop(0.0, keep_rules=True))  # the agent ended it, and says by its own end why
        elif self._status is None:
            log.error(
                "%s, process %d, %s; %s", worker.name, worker.process.pid, how_it_ended(status), self._what_stays()
            )
            self._stop(FAILED, Stop(0.0, keep_rules=True))

    # Effects

    def _start_agent(self) -> None:
        config = AgentConfig(self._options, self._agent_end.fileno(), os.getpid())
        self._agent = spawn("agent", self._parts.agent, config, [self._agent_end.fileno()])
        self._agent_end.close()
        self._selector.register(self._agent.pidfd, selectors.EVENT_READ, self._on_agent_end)

    def _start_worker(self, index: int, configured: Configured) -> None:
        listeners = tuple(listener.fileno() for listener in self._listeners)
        with contextlib.ExitStack() as stack:
            agent_control, worker_control = (stack.enter_context(end) for end in seqpacket_pair())
            to_agent, to_worker, flows = [agent_control.fileno()], [*listeners, worker_control.fileno()], -1
            if self._options.flows is not None:
                read_end, flows = flow_pipe()
                stack.callback(os.close, read_end)
                stack.callback(os.close, flows)
                to_agent.append(read_end)
                to_worker.append(flows)
            config = WorkerConfig(
                settings=configured.settings,
                listeners=listeners,
                control=worker_control.fileno(),
                flows=flows,
                node=configured.node,
                index=index,
                node_addresses=configured.node_addresses,
                parent=os.getpid(),
            )
            worker = spawn(f"worker {index}", self._parts.worker, config, to_worker)
            self._workers.append(worker)
            self._selector.register(worker.pidfd, selectors.EVENT_READ, lambda: self._on_worker_end(worker))
            self._tell_agent(WorkerStarted(index, has_flows=flows >= 0), to_agent)

    def _stop(self, status: int | None, stop: Stop) -> None:
        """Have the agent end; whatever lives after its time is killed. The first status stays; None: the agent's own."""
        if self._status is None:
            self._status = status
        self._kill_at = time.monotonic() + stop.drain_s + AGENT_GRACE_S
        self._tell_agent(stop)

    def _tell_agent(self, message: ToAgent, descriptors: list[int] | None = None) -> None:
        with contextlib.suppress(
            ConnectionError, BlockingIOError
        ):  # it has ended: its pidfd tells; or hangs: _kill_at ends it
            socket.send_fds(self._channel, [msgspec.msgpack.encode(message)], descriptors or [])

    def _reap(self, child: Child) -> int:
        self._selector.unregister(child.pidfd)
        return child.close()

    def _kill_all(self) -> None:
        for child in self._children():
            log.warning("%s, process %d, does not end; killing it", child.name, child.process.pid)
            child.send_signal(signal.SIGKILL)
        self._kill_at = float("inf")

    def _close(self) -> None:
        """An error on the way here must not leave processes behind."""
        for child in self._children():
            child.send_signal(signal.SIGKILL)
            child.close()
        for end in (self._channel, self._agent_end, *self._listeners):
            end.close()
        self._selector.close()

    # Answers

    def _children(self) -> list[Child]:
        return [*self._workers, *([self._agent] if self._agent else [])]

    def _patience(self) -> float | None:
        return None if self._kill_at == float("inf") else max(0.0, self._kill_at - time.monotonic())

    def _what_stays(self) -> str:
        if not self._ready:
            return "it was not enforcing yet; rules that it had made stay until `pellucid run` or `nft delete table inet pellucid`"
        return (
            "stopping. The kernel rules stay: pods with failureMode Closed are refused, all others pass without policy. "
            "Cure: start `pellucid run` again; to give up the rules instead, `nft delete table inet pellucid`"
        )


@contextlib.contextmanager
def _signals_to(selector: selectors.BaseSelector, handle: Callable[[int], None]) -> Iterator[None]:
    """SIGTERM, SIGINT and SIGHUP become events of the selector; the previous handlers come back at the end."""
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    previous = {number: signal.signal(number, _noted) for number in numbers}
    previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def read() -> None:
        for number in reader.recv(64):
            if number in numbers:
                handle(number)

    selector.register(reader, selectors.EVENT_READ, read)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_fd)
        for number, handler in previous.items():
            signal.signal(number, handler)
        selector.unregister(reader)
        reader.close()
        writer.close()


def _noted(number: int, frame: FrameType | None) -> None:
    """The wakeup descriptor carries the signal; a handler must exist for it to be written."""


def _name(number: int) -> str:
    return signal.Signals(number).name
