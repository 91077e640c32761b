"""What deciding reads: indexes in which a decision costs the same for ten rules and for ten thousand.

Made by compile.py, read by decide.py, carried as msgpack. A rank is the place of a rule in the whole order of its group, all tiers
counted on; lower wins. NONE is the rank of no rule.
"""

from __future__ import annotations

import hashlib

import msgspec

from . import plan
from .verdict import Verdict

NONE = 1 << 30


class Ports(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The lowest rank for each protocol and port. Keys are protocol << 16 | port.

    starts: first keys of segments, ascending, the first is 0. ranks: of each segment the lowest rank, or NONE.
    """

    starts: tuple[int, ...]
    ranks: tuple[int, ...]


class Prefixes(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """All prefixes of one length. table: the first `whole` bytes of the address, and one more masked by `keep` unless that is 0.

    least: the lowest rank in table.
    """

    least: int
    whole: int
    keep: int
    table: dict[bytes, Ports]


class Tier(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The rules of one tier by what they match. v4, v6: by ascending least.

    exact, suffixes: by domain; for "*.example.com" the key of suffixes is example.com. named: the first rule of any domain at all;
    mismatched, encrypted, missing: the first one whose policy refuses a flow that has no name to be trusted, by cause.
    """

    any: Ports
    v4: tuple[Prefixes, ...]
    v6: tuple[Prefixes, ...]
    exact: dict[str, Ports]
    suffixes: dict[str, Ports]
    named: Ports
    mismatched: Ports
    encrypted: Ports
    missing: Ports


class Program(msgspec.Struct, frozen=True, gc=False):
    """The rules of one group. tiers: those that have rules, in order. verdicts: by rank; None is Pass.

    mismatched, encrypted, missing: the refusals of the ranks that stand in a tier's Ports of that name.
    """

    tiers: tuple[Tier, ...]
    verdicts: tuple[Verdict | None, ...]
    default: Verdict
    mismatched: dict[int, Verdict]
    encrypted: dict[int, Verdict]
    missing: dict[int, Verdict]


class PolicyKey(msgspec.Struct, frozen=True, order=True, gc=False):
    """namespace: "" for a ClusterTransparentPolicy."""

    kind: str
    namespace: str
    name: str


class Group(msgspec.Struct, frozen=True, gc=False):
    """Pods with the same policies. audited: the program with Audit rules taken as enforced, or None where there is no such rule.

    policies: in order of evaluation. kernel: what nftables decides for the group."""

    policies: tuple[PolicyKey, ...]
    enforced: Program
    audited: Program | None
    kernel: plan.KernelGroup


class PolicySet(msgspec.Struct, frozen=True, gc=False):
    """Everything a node enforces. pods: of all nodes, sorted by namespace and name, without host-network pods.

    revision: 16 hex digits over the rest. strangers: the group of addresses in scope that no pod has, or None where no policy selects them.
    """

    revision: str
    groups: tuple[Group, ...]
    pods: tuple[plan.Pod, ...]
    strangers: int | None
    policies: tuple[PolicyKey, ...]


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(PolicySet)


def encode(policies: PolicySet) -> bytes:
    """Return the msgpack form. The same policies give the same bytes."""
    return _ENCODER.encode(policies)


def decode(data: bytes | memoryview) -> PolicySet:
    """Return what encode was given. Raises msgspec.MsgspecError or UnicodeDecodeError for anything else."""
    return _DECODER.decode(data)


def revised(policies: PolicySet) -> PolicySet:
    """Return policies with the revision of its content."""
    blank = msgspec.structs.replace(policies, revision="")
    return msgspec.structs.replace(policies, revision=hashlib.sha256(encode(blank)).hexdigest()[:16])
