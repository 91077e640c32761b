"""The compiled shape of a policy: what parse and compile make, what the kernel renders and what decide reads.

Everything here is a frozen msgspec struct, so that it crosses from agent to workers, and later from operator to nodes, as msgpack.
"""

from __future__ import annotations

import msgspec

from .verdict import Response, RuleKey


class PortRange(msgspec.Struct, frozen=True, gc=False):
    """first and last inclusive; 0..65535 where the protocol has no ports. protocol: IANA number; 1 stands for ICMP of both families."""

    protocol: int
    first: int
    last: int


class AddressRule(msgspec.Struct, frozen=True, gc=False):
    """A rule that addresses, ports and protocol alone decide. None means any; an empty tuple never occurs.

    networks: CIDRs as text, IPv4 and IPv6 mixed. rule is None for the default action. allow False: block with response (Reset or Drop).
    keep: connections that it allowed stay when the policy changes.
    """

    rule: RuleKey | None
    reason: str
    networks: tuple[str, ...] | None
    ports: tuple[PortRange, ...] | None
    allow: bool
    response: Response = Response.RESET
    keep: bool = False


class KernelGroup(msgspec.Struct, frozen=True, gc=False):
    """What the kernel decides for the pods of one group.

    leading: rules for TCP that come before the first one which needs the proxy (a name, Route, Audit, Pass); no match: the proxy decides.
    nameless: every rule, names taken as absent, ending in the default action: for what the proxy never carries
        (UDP, ICMP, other protocols, TCP to the node's own addresses). First match wins; the last entry matches everything.
    closed: some policy of the group has failureMode Closed. reject_quic: UDP 443 is rejected ahead of nameless.
    """

    leading: tuple[AddressRule, ...]
    nameless: tuple[AddressRule, ...]
    closed: bool
    reject_quic: bool


class Pod(msgspec.Struct, frozen=True, gc=False):
    """A pod as verdicts and records name it. group: index into PolicySet.groups, or None where no policy selects it (direct)."""

    namespace: str
    name: str
    uid: str
    service_account: str
    node: str
    addresses: tuple[bytes, ...]  # packed
    group: int | None


def same_pod(one: Pod | None, other: Pod | None) -> bool:
    """Whether an address that one had, and that other has now, still belongs to whom it belonged. None: no pod, a stranger.

    A stranger may become a pod: it was one all the time, and its Pod object came later. Pods are told apart by uid, where both have one."""
    if one is None or one is other:
        return True
    if other is None:
        return False
    if one.uid and other.uid:
        return one.uid == other.uid
    return (one.namespace, one.name) == (other.namespace, other.name)
