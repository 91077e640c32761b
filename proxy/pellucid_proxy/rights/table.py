"""The kinds of process of `pellucid run`, and the rights that each keeps. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Capability(enum.IntEnum):
    """capabilities(7); the numbers of linux/capability.h."""

    KILL = 5
    SETGID = 6
    SETUID = 7
    SETPCAP = 8
    NET_ADMIN = 12
    NET_RAW = 13


@dataclass(frozen=True, slots=True)
class Rights:
    """What a kind of process keeps. Every kind sets no_new_privs.

    capabilities: permitted, effective and bounding; no more than what it was started with. executes: it starts programs, which get
    what it has. own_user: it leaves the user that started it. filtered: it gets the seccomp filter of syscalls.py, is not dumpable,
    leaves no core and starts no process.
    """

    capabilities: frozenset[Capability]
    executes: bool = False
    own_user: bool = False
    filtered: bool = False


AGENT = Rights(frozenset({Capability.NET_ADMIN, Capability.NET_RAW}), executes=True)  # nft
WORKER = Rights(
    frozenset({Capability.NET_RAW}), own_user=True, filtered=True
)  # IP_TRANSPARENT, SO_MARK, a pod's address
SUPERVISOR = Rights(
    AGENT.capabilities
    | WORKER.capabilities
    # What it takes to give the others less, and to end a process of another user
    | {Capability.SETUID, Capability.SETGID, Capability.SETPCAP, Capability.KILL},
    executes=True,
)

KINDS: dict[str, Rights] = {"supervisor": SUPERVISOR, "agent": AGENT, "worker": WORKER}
"""A kind that opens TLS would stand here with no capability at all."""
