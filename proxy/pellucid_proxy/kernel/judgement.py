"""What the kernel rules make of a flow, said by their state instead: for what passed while they were not there, or were others. Pure."""

from __future__ import annotations

import enum
import functools
import ipaddress
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pellucid_policy.facts import ICMP, ICMPV6, TCP, UDP
from pellucid_policy.plan import AddressRule, KernelGroup, Pod, same_pod

from .state import KernelState

_QUIC = 443
_KNOWN_SOURCES = 65536
"""Addresses whose answer is kept while one table is read."""


def in_scope(state: KernelState, address: bytes) -> bool:
    """Whether the packed address is a pod's."""
    return _within(address, state.settings.scope)


def lets_pass(state: KernelState, source: bytes, target: bytes, protocol: int, port: int, *, local: bool) -> bool:
    """Whether the rules alone let a new flow pass that was not taken to a worker; what they would take or refuse they do not.

    source: packed, in scope. local: target is the node's own address.
    """
    if source in state.direct or _within(target, state.settings.exclude):
        return True
    number = state.members.get(source, state.strangers)
    if state.hold or number is None:
        return not state.hold
    group = state.groups[number]
    if protocol == TCP and not local:
        rule = _matching(group.leading, target, protocol, port)
        return rule is not None and rule.allow
    if protocol == UDP and port == _QUIC and group.reject_quic:
        return False
    rule = _matching(group.nameless, target, protocol, port)
    return rule is None or rule.allow


@dataclass(frozen=True, slots=True)
class Era:
    """What was in force from since_ns (of the epoch) on, until the next one. owners: the pods, by packed address."""

    state: KernelState
    owners: Mapping[bytes, Pod] = field(default_factory=dict)
    since_ns: int = 0


class Fate(enum.Enum):
    """What becomes of a live flow that the kernel had let pass. KEPT: it goes on whatever policies come."""

    GOES_ON = "goes_on"
    KEPT = "kept"
    POLICY_CHANGED = "policy_changed"
    POD_CHANGED = "pod_changed"


def concerned(eras: Sequence[Era]) -> Callable[[bytes], bool]:
    """Asks whether flows from a packed address may be decided otherwise by the last era than by one before it, or were another pod's."""
    now = eras[-1]
    compared: dict[tuple[int, int | None, int | None], bool] = {}  # rules are thousands, groups are few

    def changed(at: int, source: bytes) -> bool:
        era = eras[at]
        key = at, _group(era.state, source), _group(now.state, source)
        if key not in compared:
            compared[key] = _rules_for(era.state, source) != _rules_for(now.state, source)
        return compared[key] or not same_pod(era.owners.get(source), now.owners.get(source))

    @functools.lru_cache(_KNOWN_SOURCES)
    def asked(source: bytes) -> bool:
        return in_scope(now.state, source) and any(changed(at, source) for at in range(len(eras) - 1))

    return asked


def alike(one: Era, other: Era) -> bool:
    """Whether no flow at all can be decided otherwise by the one than by the other."""
    return one.owners == other.owners and all(
        getattr(one.state, each) == getattr(other.state, each) for each in ("groups", "members", "direct", "strangers")
    )


def fate(
    eras: Sequence[Era], source: bytes, target: bytes, protocol: int, port: int, began_ns: int, *, local: bool
) -> Fate:
    """What becomes of a flow now that the last of eras is in force. eras: in their order; the first one is what flows were judged by last.

    began_ns: when its first packet came, 0: before the first. Between the first and the last era no other decides again.
    """
    now = eras[-1]
    begun = next((era for era in reversed(eras) if era.since_ns <= began_ns), eras[0])
    if not same_pod(begun.owners.get(source), now.owners.get(source)):
        return Fate.POD_CHANGED
    rule = _rule(begun.state, source, target, protocol, port, local=local)
    if rule is not None and rule.allow and rule.keep and begun is not now:
        return Fate.KEPT
    if lets_pass(now.state, source, target, protocol, port, local=local):
        return Fate.GOES_ON
    rules = _rules_for(now.state, source)
    if rules is None or protocol != TCP or local or _matching(rules.leading, target, protocol, port) is not None:
        return Fate.POLICY_CHANGED
    # A worker would decide, which cannot be given a connection in its middle: as of one whose name was never read, it counts as absent.
    nameless = _matching(rules.nameless, target, protocol, port)
    return Fate.GOES_ON if nameless is None or nameless.allow else Fate.POLICY_CHANGED


def _group(state: KernelState, source: bytes) -> int | None:
    return None if source in state.direct else state.members.get(source, state.strangers)


def _rules_for(state: KernelState, source: bytes) -> KernelGroup | None:
    number = _group(state, source)
    return None if number is None else state.groups[number]


def _rule(
    state: KernelState, source: bytes, target: bytes, protocol: int, port: int, *, local: bool
) -> AddressRule | None:
    """The rule by which the kernel alone decides; None where it does not, or needs none."""
    rules = _rules_for(state, source)
    if rules is None or _within(target, state.settings.exclude):
        return None
    if protocol == UDP and port == _QUIC and rules.reject_quic:
        return None
    return _matching(rules.leading if protocol == TCP and not local else rules.nameless, target, protocol, port)


def closed(state: KernelState, source: bytes) -> bool:
    """Whether a policy of the pod with that address fails closed."""
    number = state.members.get(source, state.strangers)
    return number is not None and state.groups[number].closed


def _matching(rules: Iterable[AddressRule], target: bytes, protocol: int, port: int) -> AddressRule | None:
    kind = ICMP if protocol == ICMPV6 else protocol
    for rule in rules:
        if rule.networks is not None and not _within(target, rule.networks):
            continue
        if rule.ports is None or any(
            each.protocol == kind and (kind == ICMP or each.first <= port <= each.last) for each in rule.ports
        ):
            return rule
    return None


def _within(address: bytes, networks: tuple[str, ...]) -> bool:
    number = int.from_bytes(address, "big")
    return any(size == len(address) and number & mask == first for size, mask, first in _parsed(networks))


@functools.lru_cache(maxsize=4096)
def _parsed(networks: tuple[str, ...]) -> tuple[tuple[int, int, int], ...]:
    made = (ipaddress.ip_network(text) for text in networks)
    return tuple((n.max_prefixlen // 8, int(n.netmask), int(n.network_address)) for n in made)
