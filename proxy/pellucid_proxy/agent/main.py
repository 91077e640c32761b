"""The agent's life: find a good policy, bring the node under it, follow the folder, and leave in order when told to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from pellucid_policy.compile import PolicySet, encode

from ..kernel.apply import KernelError
from ..kube.access import ApiError, in_cluster
from ..settings import NodeSettings
from ..supervisor.messages import AgentConfig, Configured, Enforced, Left, Ping, Pong, Ready, Stop, WorkerStarted
from ..supervisor.options import BAD_POLICY, FAILED, REFUSED, STOPPED, Refusal, RunOptions
from ..worker_config import sealed_memfd
from . import last_good, report
from .channel import SupervisorChannel
from .data_path import DataPath, node_addresses
from .enforcer import Enforcer, Rules
from .explanations import Explanations
from .flow_hub import FlowHub
from .flows import FlowFile, FlowPipe
from .metrics_server import MetricsServer
from .node_settings import differences, fixed_differences, node_settings
from .policy import Accepted, BadPolicy
from .repairs import Repairs
from .source import Source
from .status import remove_socket, serve_status
from .workers import Workers

log = logging.getLogger(__name__)

RETRY_S = 5.0  # after workers or kernel did not take a policy that is good in itself
FIRST_PATIENCE_S = 2.0  # for a source that may have to be asked, where the last good policy can stand in
WORKERS_GRACE_S = 1.0  # beyond the drain time, for workers to end
FLOW_FILE_GRACE_S = 2.0


def source_of(options: RunOptions) -> Source:
    """Where the node's policy comes from. Raises Refusal."""
    if not options.cluster:
        from .source_folder import FolderSource  # either one's libraries are some megabytes

        return FolderSource(options.policy)
    from .source_cluster import ClusterSource, daemon_set_of

    try:
        return ClusterSource(in_cluster(), options.node, daemon_set_of())
    except ApiError as err:
        raise Refusal(f"--cluster: {err}") from err


@dataclass(frozen=True, slots=True)
class Node:
    """This machine; tests give another. preflight: raises Refusal if it cannot carry settings."""

    preflight: Callable[[NodeSettings], None]
    addresses: Callable[[], tuple[bytes, ...]] = node_addresses
    rules: Callable[[NodeSettings, str], Rules] = DataPath
    source: Callable[[RunOptions], Source] = source_of


async def serve(config: AgentConfig, node: Node) -> int:
    """Enforce the folder until the supervisor says stop; returns the exit status."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            agent = await Agent.open(config, node, stack)
        except Refusal as refusal:
            log.error("%s", refusal)
            return refusal.status
        return await agent.run()


class Agent:
    """One run. What it opens is closed by the stack that open() was given, the last first."""

    def __init__(self, config: AgentConfig, node: Node, source: Source, flows: FlowFile | None) -> None:
        self._options = config.options
        self._running = config.running
        self._takes_over = config.takes_over
        self._node = node
        self._name = config.options.node or socket.gethostname()
        self._flows = flows
        self._pipes: list[FlowPipe] = []
        self._workers = Workers(self._on_worker_left)
        self._worker_started = asyncio.Event()
        self._bringing_up: set[asyncio.Task[None]] = set()  # the loop itself holds no task
        self._hub = FlowHub(flows, self._workers.record_flows)
        self._channel = SupervisorChannel(config.channel, self._on_worker_started, self._on_reopen_flows, self._on_ping)
        self._report = report.Report(config, self._name, self._workers, flows, self._hub)
        self._explanations = Explanations(self._report, self._hub, node.addresses)
        self._answering: asyncio.Task[None] | None = None
        self._source = source
        self._enforcer: Enforcer | None = None
        self._settings: NodeSettings | None = None
        self._first: Accepted | None = None
        self._addresses: tuple[bytes, ...] = ()

    @classmethod
    async def open(cls, config: AgentConfig, node: Node, stack: contextlib.AsyncExitStack) -> Agent:
        """An agent that reports itself already. Raises Refusal."""
        options = config.options
        try:
            flows = None if options.flows is None else FlowFile(options.flows)
        except OSError as err:
            raise Refusal(f"--flows: {options.flows}: {err.strerror}; give a file that can be written, or -") from err
        agent = cls(config, node, node.source(options), flows)
        stack.callback(agent._close)
        if options.metrics is not None:
            try:
                server = MetricsServer(options.metrics, agent._report.scrape, agent._report.healthy)
            except ValueError as err:
                raise Refusal(f"--metrics: {err}", BAD_POLICY) from err
            except OSError as err:
                cure = "give an address of this machine and a free port"
                raise Refusal(f"--metrics: {options.metrics}: {err.strerror or err}; {cure}") from err
            stack.push_async_callback(asyncio.to_thread, server.close)
        try:
            questions = {"explain": agent._explanations.answer, "flows": agent._hub.answer}
            status = await serve_status(options.state, agent._report.status, questions)
        except OSError as err:
            raise Refusal(
                f"--state: no socket can be made in {options.state}: {err.strerror}; give another folder"
            ) from err
        stack.callback(remove_socket, options.state)
        stack.callback(status.close)
        return agent

    async def run(self) -> int:
        """From the first policy to the last rule taken away; returns the exit status."""
        refused: Refusal | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                work = tasks.create_task(self._work(), name="work")
                tasks.create_task(self._cancel_when_asked(work), name="wait for stop")
        except* Refusal as group:
            refused = _first_of(group)
        if refused is not None:
            log.error("%s", refused)
            if self._running is None:
                await self._leave(Stop(0.0, keep_rules=True))
            return refused.status
        assert self._channel.stop is not None
        return STOPPED if await self._leave(self._channel.stop) else FAILED

    async def _cancel_when_asked(self, work: asyncio.Task[None]) -> None:
        await self._channel.stop_asked.wait()
        work.cancel()

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._source.run(), name="notice changes")
            tasks.create_task(self._source.tell(self._report), name="tell what became of it")
            accepted = self._first = await self._first_policy()
            await self._configure(accepted)
            await self._enforce_first(accepted)
            assert self._report.repairs is not None
            tasks.create_task(self._follow(), name="follow the source")
            tasks.create_task(self._report.repairs.run(), name="repair rules")

    # Start

    async def _first_policy(self) -> Accepted:
        """The source's policy, or the last good one where it is bad or away. Raises Refusal."""
        while True:
            try:
                await self._source.first(FIRST_PATIENCE_S)
                return await asyncio.to_thread(self._source.read)
            except BadPolicy as bad:
                if tuple(bad.problems) != self._report.problems:
                    self._refuse(bad.problems)
            try:
                accepted = await asyncio.to_thread(last_good.load, self._options.state)
            except last_good.Unusable as err:
                if self._source.comes_later:
                    continue
                why = f"--policy: {self._options.policy} is refused for the reasons above, and no last good policy can stand in: {err}"
                raise Refusal(why, BAD_POLICY) from err
            log.warning("enforcing the last good policy, revision %s, instead", accepted.policy.revision)
            self._report.source = report.LAST_GOOD
            return accepted

    async def _configure(self, accepted: Accepted) -> None:
        """Have the workers started. Nothing in the kernel is touched before they are: if another pellucid has the port, its rules stay."""
        wished = node_settings(self._options, accepted.wishes)
        settings = self._running or wished
        if self._running is None:
            await asyncio.to_thread(self._node.preflight, settings)
        elif self._takes_over:
            if fixed := fixed_differences(self._running, wished):
                raise Refusal("\n".join(fixed))
            settings = wished
        elif changed := differences(settings, wished):
            self._refuse(changed)
        self._settings = self._report.settings = self._hub.settings = settings
        try:
            rules = self._node.rules(settings, self._options.state)
        except KernelError as err:
            raise Refusal(str(err)) from err
        self._enforcer = self._report.enforcer = Enforcer(self._workers, rules, settings)
        self._addresses = await asyncio.to_thread(self._node.addresses)
        self._channel.send(Configured(settings, self._name, self._addresses))
        while len(self._workers.staying) < settings.workers:
            await self._worker_started.wait()
            self._worker_started.clear()

    async def _enforce_first(self, accepted: Accepted) -> None:
        assert self._enforcer is not None
        assert self._settings is not None
        try:
            if self._running is None:
                await self._enforcer.hold(await self._last_enforced())
            else:
                await self._enforcer.resume(await self._last_enforced(), self._running)
        except KernelError as err:
            raise Refusal(f"kernel rules: {err}", REFUSED) from err
        problems = await self._enforcer.enforce(accepted.policy)
        if problems:
            raise Refusal("; ".join(problems))
        self._tell_enforced(accepted.policy)
        self._report.repairs = Repairs(
            self._enforcer,
            self._settings.repairs_a_minute,
            self._settings.audit_interval_s,
            self._on_addresses_changed,
        )
        self._report.phase = report.ENFORCING
        await self._keep(accepted)
        self._channel.send(Ready(accepted.policy.revision))

    def _tell_enforced(self, policy: PolicySet) -> None:
        """The supervisor has what workers need that start without an agent."""
        content = encode(policy)
        memfd = sealed_memfd("pellucid-policy", content)
        try:
            self._channel.send(Enforced(policy.revision, len(content)), [memfd])
        finally:
            os.close(memfd)

    async def _on_addresses_changed(self) -> None:
        addresses = await asyncio.to_thread(self._node.addresses)
        if addresses != self._addresses:
            self._addresses = addresses
            self._workers.set_addresses(addresses)
            log.info("the node has other addresses: workers know them")

    async def _last_enforced(self) -> PolicySet | None:
        """What the agent before this one enforced, as far as the disk knows."""
        try:
            return (await asyncio.to_thread(last_good.load, self._options.state)).policy
        except last_good.Unusable:
            return None

    # Following the source

    async def _follow(self) -> None:
        patience: float | None = None
        while True:
            written = await self._source.changed(patience)
            patience = None if await self._take(written) else RETRY_S

    async def _take(self, written: float) -> bool:
        """Enforce what the source holds now, or say why not and leave all as it is. False: to be tried again though nothing changes."""
        assert self._settings is not None
        assert self._enforcer is not None
        assert self._enforcer.enforced is not None
        try:
            accepted = await asyncio.to_thread(self._source.read)
            changed = differences(self._settings, node_settings(self._options, accepted.wishes))
        except BadPolicy as bad:
            self._refuse(bad.problems)
            return True
        except Refusal as refusal:
            self._refuse([str(refusal)])
            return True
        if changed and not self._source.comes_later:
            self._refuse(changed)
            return True
        if accepted.policy.revision != self._enforcer.enforced.revision:
            problems = await self._enforcer.enforce(accepted.policy)
            if problems:
                self._refuse(problems)
                return False
            self._tell_enforced(accepted.policy)
            self._report.applied(time.time() - written)
            log.info("enforcing revision %s", accepted.policy.revision)
        elif self._report.problems:
            log.info(
                "the %s is good again, and holds what is enforced: revision %s",
                self._source.name,
                accepted.policy.revision,
            )
        self._report.problems = (*accepted.problems, *changed)
        self._report.source = self._source.name
        await self._keep(accepted)
        return True

    def _refuse(self, problems: list[str]) -> None:
        for problem in problems:
            log.error("%s", problem)
        if self._enforcer is not None and self._enforcer.enforced is not None:
            log.error("the change is refused as a whole; revision %s stays in force", self._enforcer.enforced.revision)
        self._report.problems = tuple(problems)

    async def _keep(self, accepted: Accepted) -> None:
        self._report.snapshot = accepted.snapshot
        self._explanations.enforced(accepted)
        try:
            await asyncio.to_thread(last_good.save, self._options.state, accepted)
        except OSError as err:
            log.warning("--state: the last good policy cannot be kept in %s: %s", self._options.state, err.strerror)

    # End

    async def _leave(self, stop: Stop) -> bool:
        """End the workers and bring the kernel's rules to where they are to stay. False if the kernel refused."""
        if not stop.keep_rules and await self._source.stays():
            log.info("another pod will come in this one's place: the rules stay, and refuse closed pods until then")
            stop = Stop(0.0, keep_rules=True)
        self._report.phase = report.DRAINING if stop.drain_s else report.STOPPING
        enforcer = self._enforcer if self._enforcer is not None and self._enforcer.touched else None
        try:
            if enforcer is not None and stop.drain_s and not stop.keep_rules:
                await enforcer.drain()
            if stop.keep_workers:
                return True
            async with self._repairing():
                await self._end_workers(stop)
            self._report.phase = report.STOPPING
            if enforcer is not None and not stop.keep_rules:
                await enforcer.remove()
                await self._source.left()
            elif enforcer is not None and enforcer.enforced is None and self._first is not None:
                await enforcer.give_up(self._first.policy)
        except KernelError as err:
            log.error("kernel rules: %s; `nft delete table inet pellucid` removes them", err)
            return False
        finally:
            for pipe in self._pipes:
                pipe.close()
        return True

    @contextlib.asynccontextmanager
    async def _repairing(self) -> AsyncIterator[None]:
        """What others change among the rules is put right meanwhile."""
        repairs = self._report.repairs
        task = None if repairs is None else asyncio.create_task(repairs.run(), name="repair rules")
        try:
            yield
        finally:
            if task is not None:
                task.cancel()
                await asyncio.wait([task])

    async def _end_workers(self, stop: Stop) -> None:
        """Returns when they have ended or their time is over; the supervisor may shorten it meanwhile."""
        while True:
            self._channel.stop_asked.clear()
            stop = self._channel.stop or stop
            self._workers.drain(stop.drain_s)
            ended = asyncio.create_task(self._workers.all_ended(), name="workers ended")
            asked = asyncio.create_task(self._channel.stop_asked.wait(), name="asked again")
            await asyncio.wait(
                {ended, asked}, timeout=stop.drain_s + WORKERS_GRACE_S, return_when=asyncio.FIRST_COMPLETED
            )
            ended.cancel()
            asked.cancel()
            if not self._channel.stop_asked.is_set():
                return

    def _close(self) -> None:
        self._workers.close()
        if self._enforcer is not None:
            self._enforcer.close()
        for pipe in self._pipes:
            pipe.close()
        if self._flows is not None:
            self._flows.close(FLOW_FILE_GRACE_S)
        self._channel.close()

    # What the supervisor sends

    def _on_worker_started(self, started: WorkerStarted, control: socket.socket, flows: int) -> None:
        link = self._workers.add(started.index, control, started.ends, started.leaving)
        link.record_flows(self._hub.wanted)
        if flows >= 0:
            self._pipes.append(FlowPipe(flows, self._hub, resumed=self._running is not None))
        self._worker_started.set()
        if self._enforcer is not None and self._enforcer.enforced is not None:
            task = asyncio.get_running_loop().create_task(self._enforcer.bring_up(link), name="policy for a new worker")
            self._bringing_up.add(task)
            task.add_done_callback(self._bringing_up.discard)

    def _on_worker_left(self, index: int) -> None:
        self._channel.send(Left(index))

    def _on_ping(self, ping: Ping) -> None:
        """One answer at a time: a worker that does not answer takes half a second."""
        if self._answering is None or self._answering.done():
            self._answering = asyncio.get_running_loop().create_task(self._answer(ping), name="answer the supervisor")

    async def _answer(self, ping: Ping) -> None:
        counted = await self._workers.stats()
        self._channel.send(Pong(ping.number, tuple(index for index, series in counted.items() if series is not None)))

    def _on_reopen_flows(self) -> None:
        if self._flows is not None:
            self._flows.reopen()


def _first_of(group: BaseExceptionGroup[Refusal]) -> Refusal:
    first = group.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first
