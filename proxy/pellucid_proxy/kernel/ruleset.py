"""KernelState → nftables text. Pure: equal states give equal text, whatever was loaded before.

Only packed addresses, parsed CIDRs, integers and names made here reach the text, never a user's string.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from pellucid_policy.verdict import RuleKey

from ..settings import Marks, NodeSettings
from .address_rules import address_text, ranges, statements
from .state import KernelState

_TYPES = {4: "ipv4_addr", 6: "ipv6_addr"}
_IP = {4: "ip", 6: "ip6"}
_SIZES = {4: 4, 6: 16}
_SYN = "tcp flags & (syn|ack) == syn"  # with FIN or RST as well: some stacks open a connection on SYN+FIN
_STRANGER_MEMORY = "10m"
_MAX_STRANGERS = 65536
_ZONE = 15001  # of connection tracking; other owners of zones (OVN, Antrea) number theirs from 1 or above 65,000
_TABLE_NAME = re.compile(r"[a-z][a-z0-9_]{0,30}")

EVENTS = ("intercepted", "bypassed", "refused", "held", "orphaned", "quic_rejected")
"""Counters that no rule of a policy owns, each also an nft counter of that name:
intercepted: connections (SYNs) given to the listener. bypassed: let past because no listener was there and the policies fail open.
refused: reset because no listener was there and a policy fails closed. held: dropped because there was no policy yet.
orphaned: packets of intercepted connections whose socket is gone. quic_rejected: UDP 443 by names.quic: Reject."""


class CounterKey(NamedTuple):
    """What a counter counts: a rule (None: the default action) for one group of pods. reason: of verdict.Reason."""

    group: int
    rule: RuleKey | None
    reason: str


def counter_keys(state: KernelState) -> dict[str, CounterKey]:
    """The name of every rule's counter in state's rule set, and what it counts. Several may count the same."""
    keys: dict[str, CounterKey] = {}
    for number, group in enumerate(state.groups):
        for prefix, rules in (("lead", group.leading), ("last", group.nameless)):
            for position, rule in enumerate(rules):
                keys[f"{prefix}{number}_{position}"] = CounterKey(number, rule.rule, rule.reason)
    return keys


def ruleset(state: KernelState) -> str:
    """One transaction after which the table holds state and nothing else, whether it was there or not."""
    name = _table(state.settings)
    body = "\n".join(_body(state))
    return f"{removal(state.settings)}table inet {name} {{\n{body}\n}}\n"


def removal(settings: NodeSettings) -> str:
    """One transaction after which there is no table of ours, whether it was there or not."""
    name = _table(settings)
    return f"add table inet {name}\ndelete table inet {name}\n"


def change(old: KernelState, new: KernelState) -> str:
    """One transaction from old to new: "" if nothing differs, elements alone if only pods came, went or changed their group."""
    shape = (old.settings, old.groups, old.strangers, old.hold, old.drain)
    if shape != (new.settings, new.groups, new.strangers, new.hold, new.drain):
        return ruleset(new)
    if new.drain:
        return ""
    table = f"inet {_table(new.settings)}"
    before, after = old.members.items(), new.members.items()
    gone, come = dict(before - after), dict(after - before)
    lines: list[str] = []
    for version in _versions(new.settings):
        for verb, members, direct in (
            ("delete", gone, old.direct - new.direct),
            ("add", come, new.direct - old.direct),
        ):
            # A pod that only changes its group stays in the set of those that may call themselves.
            own = [a for a in members if (a in gone) != (a in come)]
            for name, elements in (
                ("member", _verdicts(version, members)),
                ("direct", _addresses(version, direct)),
                ("self", _pairs(version, own)),
            ):
                if elements:
                    lines.append(f"{verb} element {table} {name}{version} {{ {', '.join(elements)} }}")
    return "".join(f"{line}\n" for line in lines)


def _body(state: KernelState) -> Iterator[str]:
    settings, marks = state.settings, state.settings.marks
    versions = _versions(settings)
    for version in versions:
        kind = _TYPES[version]
        yield _set(f"scope{version}", f"type {kind}; flags interval", ranges(version, settings.scope))
        # Pods that may reach themselves through a service; strangers enter as they connect.
        yield _set(f"self{version}", f"type {kind} . {kind}", _pairs(version, state.members))
        yield _set(f"stranger{version}", f"type {kind} . {kind}; size {_MAX_STRANGERS}; flags dynamic,timeout", [])
    yield from _egress(marks, versions)
    yield "counter orphaned { }"
    # After srcnat (100), which nft names in postrouting only: there the addresses are those of the socket again.
    yield from _chain("orphans", "type filter hook input priority 110", _orphans(marks))
    if state.drain:
        yield from _chain("prerouting", "type filter hook prerouting priority mangle", _divert(marks))
        yield from _chain("divert", None, _delivered(marks, versions))
        return
    for version in versions:
        kind = _TYPES[version]
        yield _set(f"exclude{version}", f"type {kind}; flags interval", ranges(version, settings.exclude))
        yield _set(f"direct{version}", f"type {kind}", _addresses(version, state.direct))
    for name in (*(event for event in EVENTS if event != "orphaned"), *counter_keys(state)):
        yield f"counter {name} {{ }}"
    yield from _chain("deliver", None, _deliver(settings, versions))
    for number, group in enumerate(state.groups):
        yield from _group(number, group.closed, group.reject_quic, state)
    for version in versions:
        yield _set(
            f"member{version}", f"type {_TYPES[version]} : verdict", _verdicts(version, state.members), what="map"
        )
    yield from _chain("judge", None, _judge(state, versions))
    yield from _chain("pods", None, _pods(versions))
    yield from _chain(
        "prerouting",
        "type filter hook prerouting priority mangle",
        [
            *_divert(marks),
            "ct direction reply accept",  # pods as servers
            f"meta mark & {marks.mask:#x} == {marks.egress:#x} accept",  # what we send ourselves never comes back to us
            *(f"{_IP[v]} saddr @scope{v} goto pods" for v in versions),
        ],
    )
    yield from _chain("divert", None, _delivered(marks, versions))
    yield from _chain(
        "own_dnat",
        "type nat hook prerouting priority dstnat - 10",
        (
            # The first NAT decision binds: kube-proxy's, which comes next, would turn the destination into a backend.
            f"meta mark & {marks.mask:#x} == {marks.intercept:#x} dnat {_IP[v]} to {_IP[v]} daddr"
            for v in versions
        ),
    )


def _divert(marks: Marks) -> list[str]:
    """Packets of connections that the proxy holds: replies to sockets that bear a pod's address, and those of taken connections."""
    return [
        # By connection mark: where the service's address is still that of a backend, no socket can be found by address.
        f"ct direction reply ct mark & {marks.mask:#x} == {marks.egress:#x} {_mark('meta', marks, marks.reply)} accept",
        # SYNs go on to tproxy, which alone knows what to do where the connection before with the same ports is in TIME_WAIT.
        # By connection mark, for NAT may have given the connection another port on its way to the socket (_egress).
        f"tcp flags & (syn|ack) != syn ct direction original ct mark & {marks.mask:#x} == {marks.intercept:#x} goto divert",
        # What connection tracking forgot (conntrack -F). No `socket wildcard 0` here: it does not match request sockets, and the ACK of
        # the handshake would be lost.
        "tcp flags & (syn|ack) != syn socket transparent 1 goto divert",
    ]


def _orphans(marks: Marks) -> list[str]:
    """Packets of taken connections whose socket is gone: the node's TCP would not answer in a far server's name."""
    taken = f"meta l4proto tcp ct direction original ct mark & {marks.mask:#x} == {marks.intercept:#x}"
    return [
        f"{taken} socket transparent 1 accept",
        f"{taken} tcp flags & (syn|ack) != syn counter name orphaned reject with tcp reset",
    ]


def _delivered(marks: Marks, versions: Iterable[int]) -> Iterator[str]:
    for v in versions:
        yield f"{_IP[v]} saddr @scope{v} {_mark('meta', marks, marks.intercept)} accept"
        yield f"{_IP[v]} daddr @scope{v} {_mark('meta', marks, marks.reply)} accept"


def _pods(versions: Iterable[int]) -> list[str]:
    """Packets from addresses in scope that belong to no connection of the proxy: what is new, or not TCP, is judged."""
    return [
        *(f"{_IP[v]} daddr @exclude{v} accept" for v in versions),
        # Neighbour discovery and multicast membership: without them there is no IPv6 link.
        *(["icmpv6 type { 130-137, 143 } accept"] if 6 in versions else []),
        "meta l4proto { icmp, ipv6-icmp } ct state related accept",  # errors about flows that were judged
        f"{_SYN} goto judge",
        "meta l4proto tcp accept",  # live connections stay as they were decided
        "goto judge",
    ]


def _judge(state: KernelState, versions: Iterable[int]) -> Iterator[str]:
    """TCP SYNs and whatever is not TCP, from addresses in scope."""
    for v in versions:
        yield f"{_IP[v]} saddr @direct{v} accept"
    for v in versions:
        yield f"{_IP[v]} saddr vmap @member{v}"
    if state.hold:
        yield "meta l4proto != tcp ct state established accept"
        yield "meta l4proto tcp fib daddr type != local jump deliver"
        yield "counter name held drop"
    elif state.strangers is not None:
        for v in versions:
            yield f"update @stranger{v} {{ {_IP[v]} saddr . {_IP[v]} saddr timeout {_STRANGER_MEMORY} }}"
        yield f"goto group{state.strangers}"


def _group(number: int, closed: bool, reject_quic: bool, state: KernelState) -> Iterator[str]:
    group, marks = state.groups[number], state.settings.marks
    if closed:
        unserved = ["counter name refused meta l4proto tcp reject with tcp reset"]
    else:
        # An earlier SYN of this connection may have been taken: what follows must not be diverted.
        unserved = [f"counter name bypassed {_mark('ct', marks, 0)} accept"]
    yield from _chain(
        f"lead{number}",
        None,
        [
            *statements(group.leading, [f"lead{number}_{i}" for i in range(len(group.leading))]),
            "jump deliver",
            *unserved,  # tproxy without a listener breaks out of its rule
        ],
    )
    yield from _chain(
        f"group{number}",
        None,
        [
            f"meta l4proto tcp fib daddr type != local goto lead{number}",
            *(
                ["udp dport 443 counter name quic_rejected reject with icmpx type port-unreachable"]
                if reject_quic
                else []
            ),
            *statements(group.nameless, [f"last{number}_{i}" for i in range(len(group.nameless))]),
        ],
    )


def _deliver(settings: NodeSettings, versions: Iterable[int]) -> Iterator[str]:
    """SYNs for the proxy. Returns where no socket listens. Marks come after tproxy: before it, they would black-hole such a SYN."""
    marks = settings.marks
    for v in versions:
        listener = f"ip to 127.0.0.1:{settings.listen_port}" if v == 4 else f"ip6 to [::1]:{settings.listen_port}"
        yield (
            f"meta nfproto ipv{v} meta l4proto tcp tproxy {listener} {_mark('ct', marks, marks.intercept)} "
            f"{_mark('meta', marks, marks.intercept)} counter name intercepted accept"
        )


def _egress(marks: Marks, versions: Iterable[int]) -> Iterator[str]:
    ours = f"meta mark & {marks.mask:#x} == {marks.egress:#x}"
    output, snat = [], []
    for v in versions:
        ip = _IP[v]
        # A server on this node answers the pod's address: the answer belongs to our socket, not to the pod. Not so what we say to the
        # pod in a far server's name: it may share a connection's addresses and ports with what we say to that server in the pod's.
        output.append(
            f"ct direction reply ct mark & {marks.mask:#x} == {marks.egress:#x} {ip} daddr @scope{v} "
            f"fib saddr type local {_mark('meta', marks, marks.reply)}"
        )
        output.append(f"{ours} {ip} saddr @scope{v} {_mark('ct', marks, marks.egress)}")
        # A pod drops packets that bear its own address: a service that leads back to it is called from the node's.
        snat.append(f"{ours} {ip} saddr . {ip} daddr @self{v} masquerade")
        snat.append(f"{ours} {ip} saddr . {ip} daddr @stranger{v} masquerade")
        snat.append(f"{ours} {ip} saddr @scope{v} snat {ip} to {ip} saddr")  # before the CNI's masquerade
    # A pod's own port and the one of our socket that bears its address may be the same, towards the same server: two connections
    # of equal addresses and ports. In zones of their own they are tracked apart. Replies stay in the common zone, where NAT finds the
    # clash and gives whichever came second another port.
    apart = [f"{ours} {_IP[v]} saddr @scope{v} ct original zone set {_ZONE}" for v in versions]
    yield from _chain("apart", "type filter hook output priority raw", apart)
    yield from _chain("egress", "type route hook output priority mangle", output)
    yield from _chain("own_snat", "type nat hook postrouting priority srcnat - 1", snat)


def _mark(which: str, marks: Marks, value: int) -> str:
    """Set our field of the packet's (meta) or the connection's (ct) mark to value, and leave the other bits alone."""
    kept = f"{which} mark set {which} mark & {marks.mask ^ 0xFFFFFFFF:#x}"
    return f"{kept} | {value:#x}" if value else kept


def _chain(name: str, hook: str | None, rules: Iterable[str]) -> Iterator[str]:
    yield f"chain {name} {{"
    if hook is not None:
        yield f"  {hook}; policy accept;"
    for rule in rules:
        yield f"  {rule}"
    yield "}"


def _set(name: str, spec: str, elements: list[str], what: str = "set") -> str:
    held = f" elements = {{ {', '.join(elements)} }};" if elements else ""
    return f"{what} {name} {{ {spec};{held} }}"


def _versions(settings: NodeSettings) -> tuple[int, ...]:
    return (4, 6) if settings.ipv6 else (4,)


def _addresses(version: int, addresses: Iterable[bytes]) -> list[str]:
    return [address_text(address) for address in sorted(addresses) if len(address) == _SIZES[version]]


def _verdicts(version: int, members: Mapping[bytes, int]) -> list[str]:
    return [
        f"{address_text(a)} : goto group{group}" for a, group in sorted(members.items()) if len(a) == _SIZES[version]
    ]


def _pairs(version: int, addresses: Iterable[bytes]) -> list[str]:
    return [f"{text} . {text}" for text in _addresses(version, addresses)]


def _table(settings: NodeSettings) -> str:
    if not _TABLE_NAME.fullmatch(settings.table):
        raise ValueError(
            f"settings.table: {settings.table!r} is no table name; use a-z, 0-9 and _, a letter first, at most 31"
        )
    return settings.table
