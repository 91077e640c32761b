"""The messages between supervisor and agent, on a SOCK_SEQPACKET pair: one packet is msgpack of one tagged struct."""

from __future__ import annotations

import msgspec

from ..rights.users import Separation
from ..settings import NodeSettings
from .options import RunOptions

MAX_PACKET = 1 << 20
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError)
"""What a decoder raises: msgspec leaves broken UTF-8 to Python."""


class AgentConfig(msgspec.Struct, frozen=True):
    """What the agent gets at its start, beside its end of the pair. parent: process id of the supervisor; run: of its guardian.

    running: None at the start of a run; else an agent before this one ended, workers enforce its policy and have these settings,
    and the kernel has its rules. takes_over: that agent was a predecessor's: settings may differ from its, as far as live sockets
    do not carry them. ends: how many agents of this run ended so far, and supervisor_ends how
    many supervisors (then the count of agents begins anew). separation: of the workers."""

    options: RunOptions
    channel: int
    parent: int
    running: NodeSettings | None = None
    takes_over: bool = False
    ends: int = 0
    separation: Separation = Separation()
    run: int = 0
    supervisor_ends: int = 0


class Configured(msgspec.Struct, tag=True, frozen=True):
    """Agent to supervisor: policy and settings are good; open the listeners and start settings.workers workers, or tell of those
    that run.

    Nothing in the kernel has been changed so far. node_addresses: packed."""

    settings: NodeSettings
    node: str
    node_addresses: tuple[bytes, ...]


class Ready(msgspec.Struct, tag=True, frozen=True):
    """Agent to supervisor: revision is enforced."""

    revision: str


class Enforced(msgspec.Struct, tag=True, frozen=True):
    """Agent to supervisor, with a memfd of size bytes: the policy that is in force now, as SetPolicy has it for workers. The supervisor
    does not read it: it is for workers that are started while there is no agent."""

    revision: str
    size: int


class Left(msgspec.Struct, tag=True, frozen=True):
    """Agent to supervisor: the leaving worker of that index has ended."""

    index: int


class WorkerStarted(msgspec.Struct, tag=True, frozen=True):
    """Supervisor to agent, with descriptors: the worker's control socket, and the read end of its flow pipe if has_flows.

    ends: how many workers of that index ended so far. leaving: a predecessor's: it accepts nothing more, and ends with its last
    connection; its index is none of this run's own."""

    index: int
    has_flows: bool
    ends: int = 0
    leaving: bool = False


class Stop(msgspec.Struct, tag=True, frozen=True):
    """Supervisor to agent: end. A second one replaces the first.

    drain_s: how long live connections may go on; 0: not at all. keep_rules: the run has failed, nobody asked for its end: pods with
    failureMode Closed must stay refused. keep_workers: they go on as they are, and so do the rules: another agent will come."""

    drain_s: float
    keep_rules: bool = False
    keep_workers: bool = False


class ReopenFlows(msgspec.Struct, tag=True, frozen=True):
    """Supervisor to agent: the flow file was renamed; open its name again."""


class Ping(msgspec.Struct, tag=True, frozen=True):
    """Supervisor to agent: answer with Pong, once you know which workers answer you."""

    number: int


class Pong(msgspec.Struct, tag=True, frozen=True):
    """Agent to supervisor: workers are the indexes of those that answered in time."""

    number: int
    workers: tuple[int, ...]


ToSupervisor = Configured | Ready | Enforced | Left | Pong
ToAgent = WorkerStarted | Stop | ReopenFlows | Ping
