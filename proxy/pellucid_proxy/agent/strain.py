"""Which limit is near, and what to do about it. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from ..control import Series

NEAR = 0.9
"""Of a limit: from here on it is told."""


def strains(tracked: int | None, most_tracked: int | None, by_worker: dict[int, list[Series]]) -> tuple[str, ...]:
    """Return a line for each limit that is near. tracked, most_tracked: entries of the connection tracking table; None: unknown.

    by_worker: what each worker counted, as metrics.METRICS names it.
    """
    found = []
    if tracked is not None and most_tracked and tracked >= NEAR * most_tracked:
        found.append(
            f"connection tracking holds {tracked:,} of {most_tracked:,} entries; once it is full the kernel drops new connections of this "
            "machine. Cure: raise net.netfilter.nf_conntrack_max, or find out who opens so many (pellucid observe)"
        )
    for index, series in sorted(by_worker.items()):
        active, most = _value(series, "connections_active"), _value(series, "connections_limit")
        if most and active >= NEAR * most:
            found.append(
                f"worker {index} holds {active:,.0f} of {most:,.0f} connections; further ones wait. Cure: more workers, a higher "
                "limits.connections (and limit of open files), or a lower limits.connectionsPerPod"
            )
    return tuple(found)


def _value(series: Iterable[Series], name: str) -> float:
    return float(sum(each.value for each in series if each.name == name))
