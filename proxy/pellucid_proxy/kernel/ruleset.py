"""KernelState → nftables text. Pure: equal states give equal text, whatever was loaded before.

Only packed addresses, parsed CIDRs, integers and names made here reach the text, never a user's string.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from pellucid_policy.verdict import RuleKey

from .. import __version__
from ..settings import Marks, NodeSettings
from .address_rules import address_text, ranges, statements
from .state import KernelState

_TYPES = {4: "ipv4_addr", 6: "ipv6_addr"}
_IP = {4: "ip", 6: "ip6"}
_SIZES = {4: 4, 6: 16}
_SYN = "tcp flags & (syn|ack) == syn"  # with FIN or RST as well: some stacks open a connection on SYN+FIN
# Neighbour discovery and multicast membership: without them there is no IPv6 link. Beyond it they would be a tunnel: they are for the node,
# or, on a bridge that asks us, for another pod on it.
_ON_LINK = ("ip6 daddr { fe80::/10, ff02::/16 }", "fib daddr type local", "fib daddr . iif oif exists")
_CANARY_PORT = 80
_STRANGER_MEMORY = "10m"
_ADOPTION = "60s"
_MAX_STRANGERS = 65536
_MAX_RATES = 65536  # addresses; beyond them new ones are not limited
_ZONE = 15001  # of connection tracking; other owners of zones (OVN, Antrea) number theirs from 1 or above 65,000
_TABLE_NAME = re.compile(r"[a-z][a-z0-9_]{0,30}")

EVENTS = ("intercepted", "bypassed", "refused", "held", "orphaned", "quic_rejected", "rate_limited", "ended")
"""Counters that no rule of a policy owns, each also an nft counter of that name:
intercepted: connections (SYNs) given to the listener. bypassed: let past because no listener was there and the policies fail open.
refused: reset because no listener was there and a policy fails closed. held: dropped because there was no policy yet.
orphaned: packets of closed pods in the middle of a connection that nobody tracks: their socket is gone.
quic_rejected: UDP 443 by names.quic: Reject. rate_limited: SYNs for the listener that were dropped, since their address sent too many.
ended: packets of either side in flows that were ended after a change (chain ended)."""


class CounterKey(NamedTuple):
    """What a counter counts: a rule (None: the default action) for one group of pods. reason: of verdict.Reason."""

    group: int
    rule: RuleKey | None
    reason: str


def counter_keys(state: KernelState) -> dict[str, CounterKey]:
    """The name of every rule's counter in state's rule set, and what it counts. Several may count the same."""
    keys: dict[str, CounterKey] = {}
    for number, group in enumerate(state.groups):
        for which, rules in (("leading", group.leading), ("nameless", group.nameless)):
            for position, rule in enumerate(rules):
                keys[counter_name(which, number, position)] = CounterKey(number, rule.rule, rule.reason)
    return keys


def counter_name(rules: str, group: int, position: int) -> str:
    """The name of the counter of one of a group's rules. rules: leading or nameless, the list in which it has that position."""
    return f"{'lead' if rules == 'leading' else 'last'}{group}_{position}"


def ruleset(state: KernelState) -> str:
    """One transaction after which the table holds state and nothing else, whether it was there or not."""
    name = table_name(state.settings)
    lines = "\n".join(body(state))
    return f"{removal(state.settings)}table inet {name} {{\n{lines}\n}}\n"


def marker(state: KernelState) -> str:
    """The name of the empty chain that says what the table holds: of the revision, the settings and these rules' own text.

    `adopt` has no part in it, for that ends by itself.
    """
    plain = "\n".join(_rules(KernelState(state.settings, hold=state.hold, drain=state.drain)))
    return f"state_{hashlib.sha256(f'{__version__} {state.revision} {plain}'.encode()).hexdigest()[:16]}"


def removal(settings: NodeSettings) -> str:
    """One transaction after which there is no table of ours, whether it was there or not."""
    name = table_name(settings)
    return f"add table inet {name}\ndelete table inet {name}\n"


def change(old: KernelState, new: KernelState) -> str:
    """One transaction from old to new: "" if nothing differs, elements alone if only pods came, went or changed their group."""
    if old.settings != new.settings or (new.adopt and not old.adopt):
        return ruleset(new)
    if (old.groups, old.strangers, old.hold, old.drain) != (new.groups, new.strangers, new.hold, new.drain):
        return renewal(old, new)
    table, gone, come = f"inet {table_name(new.settings)}", marker(old), marker(new)
    renamed = [f"delete chain {table} {gone}", f"add chain {table} {come}"] if gone != come else []
    return "".join(f"{line}\n" for line in (*_elements("delete", old, new), *_elements("add", old, new), *renamed))


def _elements(verb: str, old: KernelState, new: KernelState) -> Iterator[str]:
    """The elements to delete from sets that are in both states, or those to add."""
    if new.drain:
        return
    table = f"inet {table_name(new.settings)}"
    gone, come = dict(old.members.items() - new.members.items()), dict(new.members.items() - old.members.items())
    members = gone if verb == "delete" else come
    direct = old.direct - new.direct if verb == "delete" else new.direct - old.direct
    # A pod that only changes its group stays in the set of those that may call themselves.
    own = [address for address in members if (address in gone) != (address in come)]
    for version in _versions(new.settings):
        for name, elements in (
            ("member", _verdicts(version, members)),
            ("direct", _addresses(version, direct)),
            ("self", _pairs(version, own)),
        ):
            if elements:
                yield f"{verb} element {table} {name}{version} {{ {', '.join(elements)} }}"


def renewal(old: KernelState, new: KernelState) -> str:
    """One transaction from a table that holds old to one that holds new, for equal settings. What both have stays and is filled anew.

    Replaced, a chain would be at its hook twice for a moment, once without rules yet and once with rules no longer, and a set would be
    empty for those that still look into it: a packet on its way just then would pass unjudged. A counter that counts the same in both
    goes on: what comes between its last reading and this transaction is not lost.
    """
    table = f"inet {table_name(old.settings)}"
    lines_of_new = list(body(new))
    before, after = declared(body(old)), declared(lines_of_new)
    counted, to_count = counter_keys(old), counter_keys(new)
    stay = {name for kind, name in before & after if kind == "counter" and counted.get(name) == to_count.get(name)}
    counters = [name for kind, name in before if kind == "counter" and name not in stay]
    gone = [(kind, name) for kind, name in before if kind != "counter" and (kind, name) not in after]
    lines = [
        f"flush table {table}",
        *_elements("delete", old, new),
        *(f"delete {kind} {table} {name}" for kind, name in sorted(gone, key=lambda each: each[0] == "chain")),
        *(f"delete counter {table} {name}" for name in counters),
        f"table {table} {{",
        *map(_without_elements, lines_of_new),
        "}",
        *_elements("add", old, new),
    ]
    return "".join(f"{line}\n" for line in lines)


def _without_elements(line: str) -> str:
    declared, elements, _ = line.partition(" elements = ")
    return f"{declared} }}" if elements else line


def declared(lines: Iterable[str]) -> set[tuple[str, str]]:
    """(kind, name) of everything in a table's body: set, map, chain, counter."""
    return {(_kind(line), line.split()[1]) for line in lines if _kind(line)}


def _kind(line: str) -> str:
    kind = line.partition(" ")[0]
    return kind if kind in ("set", "map", "chain", "counter") else ""


def body(state: KernelState) -> Iterator[str]:
    """What stands between the braces of the table, a line each."""
    yield from _rules(state)
    yield from _chain(marker(state), None, [])


def _rules(state: KernelState) -> Iterator[str]:
    settings, marks = state.settings, state.settings.marks
    versions = _versions(settings)
    for version in versions:
        kind = _TYPES[version]
        yield _set(f"scope{version}", f"type {kind}; flags interval", ranges(version, settings.scope))
        # Pods that may reach themselves through a service; strangers enter as they connect.
        yield _set(f"self{version}", f"type {kind} . {kind}", _pairs(version, state.members))
        yield _set(f"stranger{version}", f"type {kind} . {kind}; size {_MAX_STRANGERS}; flags dynamic,timeout", [])
    yield "counter ended { }"
    yield from _chain("ended", None, _ended(marks))
    yield from _egress(marks, versions)
    yield from _chain("replies", None, _replies(marks))
    if state.drain:
        yield from _raw(settings, versions, [])
        yield from _chain("prerouting", "type filter hook prerouting priority mangle", _divert(settings, versions))
        return
    for version in versions:
        kind = _TYPES[version]
        yield _set(f"exclude{version}", f"type {kind}; flags interval", ranges(version, settings.exclude))
        yield _set(f"direct{version}", f"type {kind}", _addresses(version, state.direct))
    yield _set(
        "adopting", "type nf_proto; flags timeout", [f"ipv{v} timeout {_ADOPTION}" for v in versions if state.adopt]
    )
    for name in (*EVENTS, *counter_keys(state)):
        if name != "ended":
            yield f"counter {name} {{ }}"
    if settings.connection_rate_per_pod:
        for v in versions:
            yield _set(f"rate{v}", f"type {_TYPES[v]}; size {_MAX_RATES}; flags dynamic,timeout", [])
    yield from _chain("deliver", None, _deliver(settings, versions))
    yield from _chain("passed", None, [f"{_is(marks, marks.ended)} {_mark('ct', marks, 0)}", "accept"])
    yield from _chain("kept", None, [_mark("ct", marks, marks.kept), "accept"])
    yield from _chain("marked", None, _marked(marks))
    for number, group in enumerate(state.groups):
        yield from _group(number, group.closed, group.reject_quic, state)
    for version in versions:
        yield _set(
            f"member{version}", f"type {_TYPES[version]} : verdict", _verdicts(version, state.members), what="map"
        )
    # Who it is, the workers will know before it is decided; without one the pod may be any
    yield from _chain("unknown", None, [*_remembered(versions), "jump deliver", "counter name bypassed accept"])
    yield from _chain("judge", None, _judge(state, versions))
    ours = f"meta mark & {marks.mask:#x} == {marks.egress:#x} accept"  # what we send ourselves never comes back to us
    yield from _chain("canary", None, ["jump deliver", "drop"])  # nobody else has the address
    canaries = [
        f"{_IP[v]} daddr {address} tcp dport {_CANARY_PORT} goto canary"
        for v in versions
        for address in settings.canary
        if (":" in address) == (v == 6)
    ]
    yield from _chain("syns", None, [ours, *canaries, *_excluded(versions), "goto judge"])
    marked = f"ct mark & {marks.mask:#x} != 0 jump marked"
    yield from _chain("others", None, [*_forgotten(settings, versions), marked, ours, *_others(versions)])
    yield from _raw(settings, versions, [f"{_SYN} goto syns"])
    yield from _chain(
        "prerouting",
        "type filter hook prerouting priority mangle",
        [
            f"meta mark & {marks.mask:#x} == {marks.intercept:#x} accept",
            "ct direction reply goto replies",
            *(f"{_in_scope(v, 'saddr', settings)} goto others" for v in versions),
            *_forgotten(settings, versions),
        ],
    )


def _raw(settings: NodeSettings, versions: Iterable[int], new: list[str]) -> Iterator[str]:
    """Packets of connections that the proxy has taken, found by their socket. Untracked: to conntrack such a connection and the proxy's
    own, which bears the pod's address towards the same server, could be one and the same; and there is nothing to translate.

    new: what becomes of the other packets of pods. No `socket wildcard 0` here: it does not match request sockets, and the ACK of the
    handshake would be lost. SYNs go on to tproxy, which alone knows what to do where the connection before with the same ports is in
    TIME_WAIT.
    """
    marks = settings.marks
    for v in versions:
        # From pod to pod it may as well be the answer to a socket of ours that bears a pod's address.
        answered = (
            f"{_IP[v]} daddr @scope{v} socket transparent 1 socket mark & {marks.mask:#x} == {marks.egress:#x} accept"
        )
        yield from _chain(f"found{v}", None, [answered, f"{_mark('meta', marks, marks.intercept)} notrack accept"])
        yield from _chain(f"pods{v}", None, [f"tcp flags & (syn|ack) != syn socket transparent 1 goto found{v}", *new])
    from_pods = [f"{_in_scope(v, 'saddr', settings)} goto pods{v}" for v in versions]
    yield from _chain("taken", "type filter hook prerouting priority raw", from_pods)


def _divert(settings: NodeSettings, versions: Iterable[int]) -> Iterator[str]:
    """Packets that are for the proxy's sockets."""
    yield f"meta mark & {settings.marks.mask:#x} == {settings.marks.intercept:#x} accept"
    yield "ct direction reply goto replies"
    yield from _forgotten(settings, versions)


def _replies(marks: Marks) -> Iterator[str]:
    """What is sent to sockets that bear a pod's address; all other replies are to pods as clients or servers.

    By connection mark: where the service's address is still that of a backend, no socket can be found by address."""
    yield f"{_is(marks, marks.egress)} {_mark('meta', marks, marks.reply)} accept"
    yield f"{_is(marks, marks.ended)} goto ended"
    yield "accept"


def _ended(marks: Marks) -> Iterator[str]:
    """What is sent to a pod in a flow that was ended. Of TCP it is led to this machine, whose stack has no socket for it and resets the
    server, which tracking sees and soon forgets the connection."""
    yield "counter name ended"
    yield f"meta l4proto tcp {_mark('meta', marks, marks.reply)} accept"
    yield "reject with icmpx type port-unreachable"


def _marked(marks: Marks) -> Iterator[str]:
    """What a pod sends in a flow that was ended, or kept. A SYN opens a new one with the same ports, and was judged already; what is no TCP
    is judged each time, and makes the flow a living one again where it may pass (chain passed)."""
    yield f"meta l4proto != tcp {_is(marks, marks.kept)} accept"
    yield f"{_is(marks, marks.ended)} {_SYN} {_mark('ct', marks, 0)} accept"
    yield f"{_is(marks, marks.ended)} meta l4proto tcp counter name ended reject with tcp reset"
    yield f"{_is(marks, marks.ended)} ct state related counter name ended drop"


def _forgotten(settings: NodeSettings, versions: Iterable[int]) -> Iterator[str]:
    """The same, of a connection that tracking forgot (conntrack -F) and then saw anew from the server's side: no reply to it any more."""
    reply = _mark("meta", settings.marks, settings.marks.reply)
    for v in versions:
        yield f"tcp flags & (syn|ack) != syn {_in_scope(v, 'daddr', settings)} socket transparent 1 {reply} accept"


def _in_scope(version: int, end: str, settings: NodeSettings) -> str:
    """That the address at this end (saddr or daddr) is a pod's. One network is compared in place: a set costs every packet a look-up."""
    networks = [network for network in settings.scope if (":" in network) == (version == 6)]
    alone = len(networks) == 1 and not networks[0].endswith("/0")
    return f"{_IP[version]} {end} {networks[0] if alone else f'@scope{version}'}"


def _excluded(versions: Iterable[int]) -> list[str]:
    return [f"{_IP[v]} daddr @exclude{v} accept" for v in versions]


def _others(versions: Iterable[int]) -> list[str]:
    """Packets from addresses in scope that open no TCP connection and belong to none of the proxy's."""
    return [
        "meta l4proto tcp ct state established,related,untracked accept",  # live ones are as they were decided
        *_excluded(versions),
        *([f"icmpv6 type {{ 130-137, 143 }} {on_link} accept" for on_link in _ON_LINK] if 6 in versions else []),
        "meta l4proto { icmp, ipv6-icmp } ct state related accept",  # errors about flows that were judged
        f"{_SYN} accept",  # judged in chain taken
        "meta l4proto tcp meta nfproto @adopting accept",
        "goto judge",
    ]


def _judge(state: KernelState, versions: Iterable[int]) -> Iterator[str]:
    """TCP SYNs and whatever is not TCP, from addresses in scope."""
    for v in versions:
        yield f"{_IP[v]} saddr @direct{v} goto passed"
    for v in versions:
        yield f"{_IP[v]} saddr vmap @member{v}"
    if state.hold:
        yield "meta l4proto != tcp ct state established accept"
        yield f"{_SYN} fib daddr type != local jump deliver"
        yield "counter name held drop"
        return
    if state.settings.unknown_pod_hold_s:
        yield f"{_SYN} fib daddr type != local goto unknown"
        if state.settings.unknown_pod_action == "Block":
            yield "counter name held drop"
            return
    if state.strangers is not None:
        yield from _remembered(versions)
        yield f"goto group{state.strangers}"
    else:
        yield "goto passed"


def _remembered(versions: Iterable[int]) -> list[str]:
    """A stranger may call itself through a service, as pods may."""
    return [f"update @stranger{v} {{ {_IP[v]} saddr . {_IP[v]} saddr timeout {_STRANGER_MEMORY} }}" for v in versions]


def _group(number: int, closed: bool, reject_quic: bool, state: KernelState) -> Iterator[str]:
    group = state.groups[number]
    reset = "reject with tcp reset"
    unserved = f"counter name refused {reset}" if closed else "counter name bypassed accept"
    # In the middle of a connection that nobody tracks: one of the proxy's whose socket is gone, or no connection at all.
    orphan = f"counter name orphaned {reset}" if closed else "accept"
    yield from _chain(
        f"lead{number}",
        None,
        [
            *statements(group.leading, [f"lead{number}_{i}" for i in range(len(group.leading))]),
            "jump deliver",
            unserved,  # tproxy without a listener breaks out of its rule
        ],
    )
    yield from _chain(
        f"group{number}",
        None,
        [
            f"{_SYN} fib daddr type != local goto lead{number}",
            f"tcp flags & (syn|ack) != syn {orphan}",
            *(
                ["udp dport 443 counter name quic_rejected reject with icmpx type port-unreachable"]
                if reject_quic
                else []
            ),
            *statements(
                group.nameless,
                [f"last{number}_{i}" for i in range(len(group.nameless))],
                passed="goto passed",
                kept="goto kept",
            ),
        ],
    )


def _deliver(settings: NodeSettings, versions: Iterable[int]) -> Iterator[str]:
    """SYNs for the proxy. Returns where no socket listens. Marks come after tproxy: before it, they would black-hole such a SYN."""
    marks = settings.marks
    rate = settings.connection_rate_per_pod
    for v in versions:
        if rate:  # dropped, not reset: who tries again at once would cost as much as who is served
            over = f"limit rate over {rate}/second burst {max(rate, 5)} packets"
            yield f"update @rate{v} {{ {_IP[v]} saddr timeout 10s {over} }} counter name rate_limited drop"
        listener = f"ip to 127.0.0.1:{settings.listen_port}" if v == 4 else f"ip6 to [::1]:{settings.listen_port}"
        yield (
            f"meta nfproto ipv{v} meta l4proto tcp tproxy {listener} "
            f"{_mark('meta', marks, marks.intercept)} notrack counter name intercepted accept"
        )


def _egress(marks: Marks, versions: Iterable[int]) -> Iterator[str]:
    ours = f"meta mark & {marks.mask:#x} == {marks.egress:#x}"
    snat: list[str] = []
    known = _is(marks, marks.egress)
    # Nothing to do for most packets: those of taken connections, and those of ours but for the first.
    output = [f"meta mark & {marks.mask:#x} == {marks.intercept:#x} accept", f"{ours} {known} accept"]
    for v in versions:
        ip = _IP[v]
        # A server on this node answers the pod's address: the answer belongs to our socket, not to the pod. Not so what we say to the
        # pod in a far server's name: it may share a connection's addresses and ports with what we say to that server in the pod's.
        output.append(
            f"ct direction reply {known} {ip} daddr @scope{v} fib saddr type local {_mark('meta', marks, marks.reply)}"
        )
        output.append(f"{ours} {ip} saddr @scope{v} {_mark('ct', marks, marks.egress)}")
        output.append(
            f"ct direction reply {_is(marks, marks.ended)} {ip} daddr @scope{v} fib saddr type local goto ended_here"
        )
        # A pod drops packets that bear its own address: a service that leads back to it is called from the node's.
        snat.append(f"{ours} {ip} saddr . {ip} daddr @self{v} masquerade")
        snat.append(f"{ours} {ip} saddr . {ip} daddr @stranger{v} masquerade")
        snat.append(f"{ours} {ip} saddr @scope{v} snat {ip} to {ip} saddr")  # before the CNI's masquerade
    # What accepted sockets send bears their listener's mark.
    raw = [f"meta mark & {marks.mask:#x} == {marks.intercept:#x} notrack accept"]
    # A connection that the pod made past us may have the ports that ours has, towards the same server. Tracked in a zone of its own, ours
    # is not taken for it; replies stay in the common zone, where NAT finds the clash and gives whichever came second another port.
    raw += [f"{ours} {_IP[v]} saddr @scope{v} ct original zone set {_ZONE}" for v in versions]
    yield from _chain("ended_here", None, _ended_here())
    yield from _chain("untracked", "type filter hook output priority raw", raw)
    yield from _chain("egress", "type route hook output priority mangle", output)
    yield from _chain("own_snat", "type nat hook postrouting priority srcnat - 1", snat)


def _ended_here() -> Iterator[str]:
    """What a server of the node itself sends to a pod in a flow that was ended, or the node to tell the pod so."""
    yield "tcp flags & rst == rst accept"
    yield "ct state related accept"
    yield "counter name ended"
    yield "meta l4proto tcp reject with tcp reset"
    yield "drop"


def _is(marks: Marks, value: int) -> str:
    """That the connection's mark has value in our field."""
    return f"ct mark & {marks.mask:#x} == {value:#x}"


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


def table_name(settings: NodeSettings) -> str:
    """The table's name. Raises ValueError where it is none."""
    if not _TABLE_NAME.fullmatch(settings.table):
        raise ValueError(
            f"settings.table: {settings.table!r} is no table name; use a-z, 0-9 and _, a letter first, at most 31"
        )
    return settings.table
