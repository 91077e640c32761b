"""The messages between agent and workers, on a SOCK_SEQPACKET pair that the supervisor makes.

A message is one packet: msgpack of a tagged struct, at most MAX_MESSAGE bytes. What can be larger (a policy) travels as a sealed
memfd beside its message (SCM_RIGHTS); the receiver closes it.
"""

from __future__ import annotations

import msgspec

MAX_MESSAGE = 65536


class SetPolicy(msgspec.Struct, tag=True, frozen=True):
    """Agent to worker, with a memfd of size bytes: msgpack of pellucid_policy.compile.PolicySet. Decide new connections by it."""

    revision: str
    size: int


class Review(msgspec.Struct, tag=True, frozen=True):
    """Agent to worker: the policy that you have is in force on the whole node: decide live connections again by it."""


class GetStats(msgspec.Struct, tag=True, frozen=True):
    """Agent to worker: answer with Stats, as a memfd beside it."""

    request: int


class SetAddresses(msgspec.Struct, tag=True, frozen=True):
    """Agent to worker: the node's own addresses are these now, packed; they are never dialled for a pod."""

    addresses: tuple[bytes, ...]


class Drain(msgspec.Struct, tag=True, frozen=True):
    """Agent to worker: accept nothing more, end when the last connection has ended, or after seconds."""

    seconds: float


class RecordFlows(msgspec.Struct, tag=True, frozen=True):
    """Agent to worker: make a flow record of each connection that ends from now on, or do not. A worker begins without."""

    on: bool


class Applied(msgspec.Struct, tag=True, frozen=True):
    """Worker to agent: new connections are decided by revision."""

    revision: str


class Refused(msgspec.Struct, tag=True, frozen=True):
    """Worker to agent: revision could not be taken; the previous one stays in force."""

    revision: str
    why: str


class Stats(msgspec.Struct, tag=True, frozen=True):
    """Worker to agent, with a memfd of size bytes: msgpack of list[Series]."""

    request: int
    size: int


ToWorker = SetPolicy | SetAddresses | RecordFlows | Review | GetStats | Drain
ToAgent = Applied | Refused | Stats


class Series(msgspec.Struct, frozen=True):
    """One time series as a worker counts it. kind: counter, gauge or histogram.

    name without the pellucid_ prefix and without _total. labels: values in the order of metrics.LABELS[name].
    buckets: (upper bound inclusive, count in this bucket alone), the last bound is inf; histograms only, value is then the sum.
    The agent adds up the series of all workers with equal name and labels.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    value: float
    buckets: tuple[tuple[float, int], ...] = ()
