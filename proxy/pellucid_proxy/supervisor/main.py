"""Start, watch and end the processes of a node."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from .. import __version__
from ..control import Drain, RecordFlows
from ..rights.users import Separation
from ..settings import NodeSettings
from ..worker_config import WorkerConfig
from . import logs
from .backoff import Backoff
from .children import Child, flow_pipe, how_it_ended, seqpacket_pair, spawn
from .giving_up import give_up_rights
from .guardian import CRASHED, Ward, guard
from .handover import Inheritance, take_over
from .legacy import Found, Policy
from .listeners import open_listeners
from .lock import holder, let_go, locked, sign
from .messages import (
    MAX_PACKET,
    UNREADABLE,
    AgentConfig,
    Configured,
    Enforced,
    Left,
    Pong,
    Ready,
    ReopenFlows,
    Stop,
    ToAgent,
    ToSupervisor,
    WorkerStarted,
)
from .notify import Manager, from_environment
from .options import BAD_POLICY, FAILED, REFUSED, STOPPED, Refusal, RunOptions
from .signals import name, signals_to
from .slot import Slot
from .successor import Successor
from .superseded import supersede, wait_while_superseded
from .watchdog import Watchdog
from .what_stays import what_stays

log = logging.getLogger(__name__)

AGENT_GRACE_S = 10.0  # beyond the drain time, for taking the rules away
AGENT_LATER_S = 0.25
NAMED_S = 0.5  # for a predecessor to name this run to its service manager, who hears nothing of strangers
WORKER_GRACE_S = 2.0  # from SIGTERM to SIGKILL, once the agent is gone

_decoder = msgspec.msgpack.Decoder(ToSupervisor)


@dataclass(frozen=True, slots=True)
class Parts:
    """What the supervisor starts and opens; tests give others."""

    agent: str = "pellucid_proxy.agent"
    worker: str = "pellucid_proxy.worker"
    open_listeners: Callable[[NodeSettings], tuple[socket.socket, ...]] = open_listeners


def run(options: RunOptions, parts: Parts = Parts()) -> int:
    """Enforce the policy until SIGTERM or SIGINT, or until it turns out that it cannot be; returns the exit status (options.py).

    Once it is enforced, a process that ends is started again: what returns then is a child of the process that called (guardian.py), which
    ends with that status. The first signal drains: live connections go on for options.drain_s; the second ends at once. SIGHUP reopens
    the flow file. To be called in the main thread, where there is no other.
    """
    logs.start("guardian", options.log_level)
    ward = guard()
    logs.start("supervisor", options.log_level)
    try:
        return _supervise(options, parts, ward)
    except Refusal as refusal:
        log.error("%s", refusal)
        return refusal.status
    except Exception:
        log.exception("a fault of the supervisor")
        return CRASHED


def _supervise(options: RunOptions, parts: Parts, ward: Ward) -> int:
    with contextlib.ExitStack() as stack:
        found = ward.deposit.find()
        if found is not None:
            stack.callback(os.close, found.lock)
            if holder(found.lock) != ward.run:
                log.info("another instance has taken over meanwhile")
                return STOPPED
            return Supervisor(options, parts, give_up_rights(options), found.lock, ward, found=found).run()
        wait_while_superseded(options)
        inheritance = take_over(options.state, __version__, ward.guardian) if options.takeover else None
        if inheritance is None:
            lock = stack.enter_context(locked(options.state, ward.run))
        else:
            lock = inheritance.lock
            stack.callback(os.close, lock)
        return Supervisor(options, parts, give_up_rights(options), lock, ward, inheritance).run()


class Supervisor:
    """One run. State changes only in the methods named on_*, each called by the loop for one event."""

    def __init__(
        self,
        options: RunOptions,
        parts: Parts,
        separation: Separation,
        lock: int,
        ward: Ward,
        inheritance: Inheritance | None = None,
        found: Found | None = None,
    ) -> None:
        """lock: of the state folder, the caller's. found: what a supervisor of this run before this one has left."""
        self._options = options
        self._separation = separation
        self._parts = parts
        self._lock = lock
        self._ward = ward
        self._inheritance = inheritance  # until it is ours for good
        self._successor: Successor | None = None  # who may take it over in turn, once there is something to take
        self._handed_over = False  # it did: what is left are workers with connections
        self._selector = selectors.DefaultSelector()
        self._channel: socket.socket | None = None  # to the agent
        given = inheritance or found
        self._listeners = tuple(socket.socket(fileno=fd) for fd in given.listeners) if given else ()
        self._agent: Child | None = None
        self._agent_backoff = Backoff()
        self._configured = found.configured if found else None
        self._policy = found.policy if found else None  # what was enforced last
        self._knows_workers = False  # the agent at hand has been told of them
        self._serving = False  # the agent at hand is ready
        self._slots: list[Slot] = []
        self._starts: list[tuple[float, Callable[[], None]]] = []  # when, and of what
        self._ready = found is not None  # enforced, once
        self._asked_to_stop = 0
        self._stop_later: Stop | None = None  # for an agent that is not ready again yet
        self._spare = True  # an agent that somebody else kills while it stops has a successor, once
        self._status: int | None = None  # set: the run is ending
        self._kill_at = float("inf")
        self._manager = from_environment(ward.guardian, ward.relay)
        if found is not None:
            self._manager.adopt(found.manager)
        elif inheritance is not None and inheritance.manager.address:
            self._manager.adopt(inheritance.manager)
        self._watchdog = Watchdog(self._manager)

    def run(self) -> int:
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            stack.enter_context(signals_to(self._selector, self._on_signal))
            if self._inheritance is not None:
                self._selector.register(self._inheritance.connection, selectors.EVENT_READ, self._on_predecessor)
            if self._configured is None:
                self._start_agent()
            else:
                self._start_again(self._configured.settings.workers)
            for number in self._ward.asked:
                self._on_signal(number)
            while self._children() or self._starts or self._lingers():
                for key, _ in self._selector.select(self._patience()):
                    key.data()
                now = time.monotonic()
                if self._successor is not None:
                    self._successor.check(now)
                due, self._starts = [s for s in self._starts if s[0] <= now], [s for s in self._starts if s[0] > now]
                for _, start in due:
                    start()
                if now >= self._watchdog.due:
                    self._feed_watchdog(now)
                if now >= self._kill_at:
                    self._kill_all()
        self._ward.deposit.withdraw()
        return FAILED if self._status is None else self._status

    def _lingers(self) -> bool:
        """Whoever starts a pod's container again when it ends, before the pod is deleted, need not."""
        return self._handed_over and self._options.cluster and not self._asked_to_stop

    # Events

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGHUP:
            self._manager.reloading()
            self._tell_agent(ReopenFlows())
            self._manager.ready("Flow file reopened")
            return
        if self._successor is not None and self._successor.holds:
            log.info("%s: heeded when the hand-over is through", name(number))
            self._successor.afterwards(lambda: self._on_signal(number))
            return
        self._asked_to_stop += 1
        if self._handed_over:
            self._on_signal_afterwards(number)
            return
        drain_s = self._options.drain_s if self._asked_to_stop == 1 and self._ready else 0.0
        if self._asked_to_stop == 1:
            log.info(
                "%s: stopping; live connections may go on for %g s, a second signal ends them", name(number), drain_s
            )
        self._stop(STOPPED, Stop(drain_s))

    def _on_signal_afterwards(self, number: int) -> None:
        """The rules are the successor's: a service manager that ends the old instance now shall not cut its connections."""
        if self._asked_to_stop == 1:
            log.info(
                "%s: live connections may go on, as they may since the hand-over; a second signal ends them",
                name(number),
            )
            return
        self._kill_at = time.monotonic() + WORKER_GRACE_S
        for slot in self._slots:
            if slot.child is not None:
                slot.child.send_signal(signal.SIGTERM)

    def _on_predecessor(self) -> None:
        """It says nothing any more: it has ended, or takes up its work again."""
        assert self._inheritance is not None
        log.error("the instance that was to be replaced has taken its work back")
        self._drop_inheritance()
        self._stop(FAILED, Stop(0.0, keep_rules=True, keep_workers=True))

    def _on_channel(self) -> None:
        assert self._channel is not None
        try:
            packet, descriptors, _, _ = socket.recv_fds(self._channel, MAX_PACKET, 1)
        except (BlockingIOError, ConnectionError):
            return
        if not packet:  # the agent's end is closed: its pidfd tells the rest
            self._close_channel()
            return
        try:
            message = _decoder.decode(packet)
        except UNREADABLE as err:
            log.error("the agent sent what is no message: %s", err)
            return
        match message:
            case Configured() as configured:
                self._on_configured(configured)
            case Ready(revision=revision):
                self._on_ready(revision)
            case Enforced() as enforced if descriptors:
                self._on_enforced(enforced, descriptors[0])
            case Left(index=index):
                for slot in [slot for slot in self._slots if slot.leaving and slot.index == index]:
                    slot.let_go()
                    self._slots.remove(slot)
            case Pong() as pong:
                serving = [slot.index for slot in self._slots if not slot.leaving]
                self._watchdog.answered(pong, serving if self._status is None else ())

    def _on_configured(self, configured: Configured) -> None:
        if self._knows_workers or (self._status is not None and self._stop_later is None):
            return
        self._knows_workers = True
        try:
            if self._configured is not None:
                self._configured = configured  # the node's addresses may be others
                for slot in self._slots:
                    if (
                        slot.child is None and not slot.leaving
                    ):  # waits for its next start, or has drained: the agent waits for all
                        self._start_worker(slot)
                    else:
                        self._introduce(slot)
                return
            self._configured = configured
            if self._inheritance is None:
                self._listeners = self._parts.open_listeners(configured.settings)
            for index in range(configured.settings.workers):
                self._slots.append(Slot(index))
                self._start_worker(self._slots[-1])
            for index, worker in enumerate(
                self._inheritance.workers if self._inheritance else (), configured.settings.workers
            ):
                self._slots.append(Slot(index, worker))
                self._introduce(self._slots[-1])
        except Refusal as refusal:
            log.error("%s", refusal)
            self._stop(refusal.status, Stop(0.0, keep_rules=True))  # the agent has not touched the kernel
        except OSError as err:
            log.error("workers cannot be started: %s", err)
            self._stop(FAILED, Stop(0.0))

    def _on_ready(self, revision: str) -> None:
        self._ready = self._serving = True
        named = False  # by a predecessor, to its service manager
        log.info("ready: enforcing revision %s", revision)
        if self._successor is None:  # before Taken, after which the predecessor's name leads nowhere
            self._await_successor()
        if self._inheritance is not None:
            self._inheritance.taken()
            named = bool(self._inheritance.manager.address)
            self._drop_inheritance()
            sign(self._lock, self._ward.run)
            log.info("the instance before this one has handed over; its live connections go on")
        self._leave_legacy()
        if named:
            self._start_later(NAMED_S, lambda: self._tell_ready(revision))
        else:
            self._tell_ready(revision)
        if self._stop_later is not None:
            stop, self._stop_later = self._stop_later, None
            self._tell_agent(stop)

    def _on_enforced(self, enforced: Enforced, memfd: int) -> None:
        os.set_inheritable(memfd, False)
        if self._policy is not None:
            self._policy.close()
        self._policy = Policy(enforced, memfd)
        if self._serving:
            self._leave_legacy()

    def _feed_watchdog(self, now: float) -> None:
        if self._handed_over:
            self._watchdog.feed(now)
        else:
            self._tell_agent(self._watchdog.ask(now))

    def _tell_ready(self, revision: str) -> None:
        if self._status is None:
            self._manager.ready(f"Enforcing revision {revision}")
            self._watchdog.start(time.monotonic())

    def _on_agent_end(self) -> None:
        assert self._agent is not None
        agent, self._agent = self._agent, None
        status = self._reap(agent)
        self._close_channel()
        self._knows_workers = self._serving = False
        if self._successor is not None and self._successor.holds:
            self._successor.yielded()
            return
        if self._ready and self._status is None:
            wait_s = self._agent_backoff.ended(time.monotonic())
            log.error(
                "agent %d %s; it is started again%s. Meanwhile workers and kernel go on by the policy in force",
                agent.process.pid,
                how_it_ended(status),
                f" in {wait_s:g} s" if wait_s else "",
            )
            self._start_later(wait_s, self._start_agent)
            return
        if self._status == STOPPED and self._ready and status < 0 and self._stop_later is None and self._spare:
            log.error("agent %d %s while it stopped; another one goes on", agent.process.pid, how_it_ended(status))
            self._spare = False
            self._stop_later = Stop(max(0.0, self._kill_at - AGENT_GRACE_S - time.monotonic()))
            self._start_agent()
            return
        if self._status is None:
            told = status in (FAILED, BAD_POLICY, REFUSED)  # it has said why
            self._status = status if told else FAILED
            if not told:
                log.error("agent %d %s; %s", agent.process.pid, how_it_ended(status), what_stays(self._ready))
        elif status != 0 and self._status == STOPPED:
            log.error(
                "agent %d %s while it stopped; %s", agent.process.pid, how_it_ended(status), what_stays(self._ready)
            )
            self._status = FAILED
        for slot in self._slots:
            if slot.child is not None:
                slot.child.send_signal(signal.SIGTERM)
        self._starts.clear()
        self._kill_at = time.monotonic() + WORKER_GRACE_S

    def _on_worker_end(self, slot: Slot) -> None:
        assert slot.child is not None
        worker, slot.child = slot.child, None
        status = self._reap(worker)
        slot.let_go()
        if self._status is not None:
            if self._handed_over:
                log.info("%s, process %d, has ended its last connection", worker.name, worker.process.pid)
            return
        if status == 0 and not self._ready:
            self._stop(None, Stop(0.0, keep_rules=True))  # the agent ended it, and says by its own end why
        elif not self._ready:
            log.error(
                "%s, process %d, %s; %s", worker.name, worker.process.pid, how_it_ended(status), what_stays(self._ready)
            )
            self._stop(FAILED, Stop(0.0, keep_rules=True))
        else:
            wait_s = slot.backoff.ended(time.monotonic())
            log.error(
                "%s, process %d, %s; it is started again%s. Its connections are lost, new ones wait for it or go to others",
                worker.name,
                worker.process.pid,
                how_it_ended(status),
                f" in {wait_s:g} s" if wait_s else "",
            )
            self._start_later(wait_s, lambda: self._start_worker(slot))

    # Effects

    def _start_agent(self) -> None:
        self._channel, agent_end = seqpacket_pair()
        self._selector.register(self._channel, selectors.EVENT_READ, self._on_channel)
        running = self._configured.settings if self._configured else None
        takes_over = running is None and self._inheritance is not None
        if running is None and self._inheritance is not None:
            running = self._inheritance.settings
        config = AgentConfig(
            options=self._options,
            channel=agent_end.fileno(),
            parent=os.getpid(),
            running=running,
            takes_over=takes_over,
            ends=self._agent_backoff.ends,
            separation=self._separation,
            run=self._ward.guardian,
            supervisor_ends=self._ward.ends,
        )
        with agent_end:
            self._agent = spawn("agent", self._parts.agent, config, [agent_end.fileno()])
        self._selector.register(self._agent.pidfd, selectors.EVENT_READ, self._on_agent_end)

    def _start_again(self, workers: int) -> None:
        """As far as the supervisor before this one was. Connections wait for workers, and nothing for an agent, which takes the CPU for
        longer than they do."""
        for index in range(workers):
            self._slots.append(Slot(index))
            self._start_worker(self._slots[-1])
        self._start_later(AGENT_LATER_S, self._start_agent)

    def _start_worker(self, slot: Slot) -> None:
        if slot.child is not None:
            return
        assert self._configured is not None
        listeners = tuple(listener.fileno() for listener in self._listeners)
        with contextlib.ExitStack() as stack:
            slot.control, worker_control = seqpacket_pair()
            stack.enter_context(worker_control)
            slot.flows, flows = flow_pipe()
            stack.callback(os.close, flows)
            to_worker = [*listeners, worker_control.fileno(), flows]
            config = WorkerConfig(
                settings=self._configured.settings,
                listeners=listeners,
                control=worker_control.fileno(),
                flows=flows,
                node=self._configured.node,
                index=slot.index,
                node_addresses=self._configured.node_addresses,
                parent=os.getpid(),
                user=self._separation.user,
            )
            slot.child = spawn(f"worker {slot.index}", self._parts.worker, config, to_worker)
        self._selector.register(slot.child.pidfd, selectors.EVENT_READ, lambda: self._on_worker_end(slot))
        if self._knows_workers:
            self._introduce(slot)
        if not self._serving and self._policy is not None:
            self._bring_up(slot.control, self._policy)

    def _bring_up(self, control: socket.socket, policy: Policy) -> None:
        """The worker need not wait for an agent, which takes a while to start."""
        with contextlib.suppress(ConnectionError):  # it has ended: its pidfd tells
            control.send(msgspec.msgpack.encode(RecordFlows(self._options.flows is not None)))
            policy.give(control)

    def _introduce(self, slot: Slot) -> None:
        """Tell the agent of a worker; one that is not there is told of when it is."""
        if slot.control is not None:
            descriptors = [slot.control.fileno(), *([slot.flows] if slot.flows >= 0 else [])]
            started = WorkerStarted(slot.index, slot.flows >= 0, slot.backoff.ends, slot.leaving)
            self._tell_agent(started, descriptors)

    def _start_later(self, wait_s: float, start: Callable[[], None]) -> None:
        self._starts.append((time.monotonic() + wait_s, start))

    def _stop(self, status: int | None, stop: Stop) -> None:
        """Have the agent end; whatever lives after its time is killed. The first status stays; None: the agent's own."""
        if self._status is None:
            self._status = status
        self._kill_at = time.monotonic() + stop.drain_s + AGENT_GRACE_S
        self._manager.stopping(f"Stopping, live connections may go on for {stop.drain_s:g} s")
        if self._ready and not self._serving:  # only an agent that knows the rules can take them away
            self._stop_later = stop
            self._starts = [(0.0, self._start_agent)] if self._agent is None else []
        else:
            self._starts.clear()
            self._tell_agent(stop)

    def _tell_agent(self, message: ToAgent, descriptors: list[int] | None = None) -> None:
        if self._channel is None:
            return
        with contextlib.suppress(
            ConnectionError, BlockingIOError
        ):  # it has ended: its pidfd tells; or hangs: _kill_at ends it
            socket.send_fds(self._channel, [msgspec.msgpack.encode(message)], descriptors or [])

    def _leave_legacy(self) -> None:
        """Should this process be killed, the next one goes on with it. Only now: from here on the rules are this run's."""
        assert self._configured is not None
        listeners = (each.fileno() for each in self._listeners)
        try:
            self._ward.deposit.leave(self._configured, self._manager.manager, self._lock, self._policy, listeners)
        except OSError as err:
            log.warning("the end of this process alone would end the run: %s", err)

    # Handing over to a successor (successor.py asks for these)

    def _await_successor(self) -> None:
        try:
            self._successor = Successor(self._options.state, self._selector, self)
        except OSError as err:
            log.warning("--state: no hand-over to a new version is possible: %s", err.strerror)

    @property
    def serving(self) -> bool:
        """Whether there is an agent that enforces, and nobody has asked for the end."""
        return self._serving and self._status is None

    def estate(self) -> tuple[NodeSettings, list[int], list[tuple[int, int]]]:
        """Settings; descriptors of lock and listeners; of each worker the agent's ends of its channel and pipe (-1: none)."""
        assert self._configured is not None
        workers = [(slot.control.fileno(), slot.flows) for slot in self._slots if slot.control is not None]
        return self._configured.settings, [self._lock, *(each.fileno() for each in self._listeners)], workers

    def yield_rules(self) -> None:
        """Have the agent end; workers and rules stay as they are. An agent that does not is killed: that is safe at any time."""
        self._tell_agent(Stop(0.0, keep_rules=True, keep_workers=True))

    def kill_agent(self) -> None:
        if self._agent is not None:
            self._agent.send_signal(signal.SIGKILL)

    def take_back(self) -> None:
        """There is no successor after all: go on as after a crash of the agent."""
        if self._agent is None and self._status is None:
            self._start_later(0.0, self._start_agent)

    @property
    def manager(self) -> Manager:
        """Who is told of this run."""
        return self._manager.manager

    def hand_over(self, main: int | None) -> None:
        """The rules are another's. Live connections may end in peace. main: whose the service is from now on; None: it stays this one's."""
        self._handed_over = True
        supersede(self._options)
        let_go(self._lock)
        if main is None:
            self._manager.status("Handed over; live connections go on")
        else:
            self._manager.hand_over(main)
            self._watchdog.stop()
        self._ward.deposit.withdraw()
        self._status = STOPPED
        self._starts.clear()
        for slot in self._slots:
            if slot.child is not None and slot.control is not None:
                with contextlib.suppress(OSError):
                    slot.control.send(msgspec.msgpack.encode(Drain(self._options.handover_drain_s)))
            slot.let_go()
        self._kill_at = time.monotonic() + self._options.handover_drain_s + WORKER_GRACE_S
        for listener in self._listeners:
            listener.close()

    def _drop_inheritance(self) -> None:
        if self._inheritance is not None:
            with contextlib.suppress(KeyError):  # the run ended before it was registered
                self._selector.unregister(self._inheritance.connection)
            self._inheritance.connection.close()
            self._inheritance = None

    def _close_channel(self) -> None:
        if self._channel is not None:
            self._selector.unregister(self._channel)
            self._channel.close()
            self._channel = None

    def _reap(self, child: Child) -> int:
        self._selector.unregister(child.pidfd)
        return child.close()

    def _kill_all(self) -> None:
        for child in self._children():
            log.warning("%s, process %d, does not end; killing it", child.name, child.process.pid)
            child.send_signal(signal.SIGKILL)
        self._starts.clear()
        self._spare = False
        self._kill_at = float("inf")

    def _close(self) -> None:
        """An error on the way here must not leave processes behind."""
        for child in self._children():
            child.send_signal(signal.SIGKILL)
            child.close()
        for slot in self._slots:
            slot.let_go()
        self._close_channel()
        self._drop_inheritance()
        if self._successor is not None:
            self._successor.close()
        if self._policy is not None:
            self._policy.close()
        for listener in self._listeners:
            listener.close()
        self._selector.close()
        self._manager.close()

    # Answers

    def _children(self) -> list[Child]:
        workers = [slot.child for slot in self._slots if slot.child is not None]
        return [*workers, *([self._agent] if self._agent else [])]

    def _patience(self) -> float | None:
        successor = self._successor.due if self._successor else float("inf")
        due = min([self._kill_at, self._watchdog.due, successor, *(at for at, _ in self._starts)])
        return None if due == float("inf") else max(0.0, due - time.monotonic())
