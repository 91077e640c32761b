"""What the kernel rules make of a connection, said by their state instead: for what passed while they were not there. Pure."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Iterable

from pellucid_policy.facts import ICMP, ICMPV6, TCP, UDP
from pellucid_policy.plan import AddressRule

from .state import KernelState

_QUIC = 443


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
        return _allowed(group.leading, target, protocol, port, otherwise=False)
    if protocol == UDP and port == _QUIC and group.reject_quic:
        return False
    return _allowed(group.nameless, target, protocol, port, otherwise=True)


def closed(state: KernelState, source: bytes) -> bool:
    """Whether a policy of the pod with that address fails closed."""
    number = state.members.get(source, state.strangers)
    return number is not None and state.groups[number].closed


def _allowed(rules: Iterable[AddressRule], target: bytes, protocol: int, port: int, *, otherwise: bool) -> bool:
    kind = ICMP if protocol == ICMPV6 else protocol
    for rule in rules:
        if rule.networks is not None and not _within(target, rule.networks):
            continue
        if rule.ports is None or any(
            each.protocol == kind and (kind == ICMP or each.first <= port <= each.last) for each in rule.ports
        ):
            return rule.allow
    return otherwise


def _within(address: bytes, networks: tuple[str, ...]) -> bool:
    number = int.from_bytes(address, "big")
    return any(size == len(address) and number & mask == first for size, mask, first in _parsed(networks))


@functools.lru_cache(maxsize=4096)
def _parsed(networks: tuple[str, ...]) -> tuple[tuple[int, int, int], ...]:
    made = (ipaddress.ip_network(text) for text in networks)
    return tuple((n.max_prefixlen // 8, int(n.netmask), int(n.network_address)) for n in made)
