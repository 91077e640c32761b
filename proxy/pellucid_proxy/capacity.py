"""How much of its limits a worker can keep to, by the descriptors that it may have."""

from __future__ import annotations

import msgspec

from .settings import NodeSettings

RESERVED = 64
"""Descriptors for all else: listeners, channels, epoll, what Python opens now and then."""


def within(settings: NodeSettings, descriptors: int) -> tuple[NodeSettings, int]:
    """Return the settings with limits of connections that descriptors (a number, RLIMIT_NOFILE) suffices for, and how many pipes it does.

    A connection takes two. At least a quarter is for pipes, of two each, through which bulk goes; without one, bytes are copied. Where
    connections must be fewer, no pod has more than a quarter of them, nor an eighth of them pending.
    """
    usable = max(8, descriptors - RESERVED)
    most = settings.max_connections
    connections = min(most, usable * 3 // 8)
    if connections < most:
        settings = msgspec.structs.replace(
            settings,
            max_connections=connections,
            max_connections_per_pod=min(settings.max_connections_per_pod, max(1, connections // 4)),
            max_pending_per_pod=min(settings.max_pending_per_pod, max(1, connections // 8)),
        )
    return settings, usable // 2 - connections
