"""How much of its limits a worker can keep to, by the descriptors that it may have."""

from __future__ import annotations

import msgspec

from .settings import NodeSettings

RESERVED = 64
"""Descriptors for all else: listeners, channels, epoll, what Python opens now and then."""


FEW = 1024
"""Connections of which all may be pending at once."""


def within(settings: NodeSettings, descriptors: int) -> tuple[NodeSettings, int]:
    """Return the settings with limits of connections that descriptors (a number, RLIMIT_NOFILE) suffices for, and how many pipes it does.

    A connection takes two. At least a quarter is for pipes, of two each, through which bulk goes; without one, bytes are copied. The
    limits of a pod that are left open (0) are settled: so that one pod, or two, cannot use up what all need.
    """
    usable = max(8, descriptors - RESERVED)
    connections = min(settings.max_connections, usable * 3 // 8)
    of_pod = min(settings.max_connections_per_pod or -(-connections // 4), connections)
    settings = msgspec.structs.replace(
        settings,
        max_connections=connections,
        max_connections_per_pod=of_pod,
        max_pending_per_pod=min(settings.max_pending_per_pod or max(FEW, of_pod // 2), of_pod),
    )
    return settings, usable // 2 - connections
