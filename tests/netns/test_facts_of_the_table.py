"""What the kernel does with tables, sets, rules and routes. Each test names the fact it shows."""

from __future__ import annotations

import ipaddress
import os
import selectors
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import msgspec
import pytest

from pellucid_cli.lab.topology import Namespace
from pellucid_policy.plan import KernelGroup
from pellucid_proxy.kernel import routing
from pellucid_proxy.kernel.apply import KernelError, load
from pellucid_proxy.kernel.ruleset import change, ruleset
from pellucid_proxy.kernel.state import KernelState

from .peers import ask, readable
from .test_facts_of_interception import SHORT_S, WEB
from .world import ALLOW_REST, OPEN, PORT, SETTINGS, World, eventually, in_a_user_namespace, packed, rule

IP_RECVORIGDSTADDR = 20


def test_the_table_is_replaced_under_connections_and_none_fails(world: World) -> None:
    """Fact 11."""
    world.stand_in()
    groups = [OPEN, KernelGroup((rule("other", "203.0.113.0/24"),), (ALLOW_REST,), closed=True, reject_quic=True)]
    asked = 0
    for number in range(40):
        world.group(groups[number % 2])
        for _ in range(10):
            assert ask(world.a, *WEB, payload=b"x").startswith("web ")
            asked += 1
    print(f"{asked} connections during 40 replacements")


def test_only_our_table_is_touched(world: World) -> None:
    """Fact 11: never flush, never list or change others'."""

    def others() -> str:
        said = world.node.run(["nft", "list", "ruleset"]).stdout
        tables = ("table " + part for part in said.split("table ")[1:])
        return "".join(table for table in tables if not table.startswith("table inet pellucid"))

    before = others()
    world.group(OPEN)
    world.apply(KernelState(SETTINGS, drain=True))
    assert others() == before
    world.node.call(world.kernel.remove)
    assert others() == before
    assert "pellucid" not in world.node.run(["nft", "list", "tables"]).stdout


def test_ten_thousand_rules_and_a_hundred_thousand_pods_load(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Fact 11. An ordinary user may send less at once: that is said with its cure, and the state before stays."""
    rules, pods = 10_000, 100_000
    if in_a_user_namespace():
        with pytest.raises(
            KernelError, match=r"Message too long; .* run as root, or raise `sysctl net\.core\.wmem_max`"
        ):
            world.apply(large(4 * rules, 4 * pods))
        assert ask(world.a, *WEB).startswith("web ")
        rules, pods = 200, 1000  # pod a among them
    state = large(rules, pods)
    times = [time.monotonic()]
    text = ruleset(state)
    times.append(time.monotonic())
    world.apply(state)
    times.append(time.monotonic())
    gone = packed("10.244.0.7")[0]
    world.apply(replace(state, members={a: g for a, g in state.members.items() if a != gone}))
    times.append(time.monotonic())
    assert world.count("r77") == 0
    times.append(time.monotonic())
    rendered, applied, churned, read = (after - before for before, after in pairwise(times))
    with capsys.disabled():
        print(
            f"\n{2 * rules} rules, {pods} pods: rendered in {rendered:.2f} s ({len(text) >> 10} KiB), "
            f"rendered and loaded in {applied:.2f} s, a pod removed in {churned:.2f} s, counters read in {read:.2f} s"
        )
    assert ask(world.a, *WEB).startswith("web ")
    for number, reached in ((77, False), (78, True)):
        address = f"203.0.{number}.1"
        world.web.run(["ip", "address", "add", f"{address}/32", "dev", "lo"])
        if reached:
            assert ask(world.a, address, PORT).startswith("web ")
        else:
            with pytest.raises(ConnectionRefusedError):
                ask(world.a, address, PORT)
        assert world.count(f"r{number}") == 1


def large(rules: int, pods: int) -> KernelState:
    """A state with rules for TCP and as many for the rest, alternately allow and block, and pods in one group."""
    own = tuple(
        rule(f"r{i}", f"{203 + (i >> 16)}.{i >> 8 & 255}.{i & 255}.0/24", allow=i % 2 == 0) for i in range(rules)
    )
    group = KernelGroup(own, (*own, ALLOW_REST), closed=False, reject_quic=False)
    firsts: list[ipaddress.IPv4Address | ipaddress.IPv6Address] = [
        ipaddress.IPv4Address("10.244.0.0"),
        ipaddress.IPv6Address("fd00:244:1::"),
    ]
    return KernelState(SETTINGS, (group,), {(first + i).packed: 0 for first in firsts for i in range(pods // 2)})


def test_pods_come_and_go_as_elements(world: World) -> None:
    """Fact 11: no chain is loaded anew, and each pod is decided as the new state says."""
    stand_in = world.stand_in()
    both = dict.fromkeys([*world.state.members, *world.state.direct], 0)
    states = [
        KernelState(SETTINGS, (OPEN, OPEN), both),
        KernelState(SETTINGS, (OPEN, OPEN), dict.fromkeys(both, 1)),
        KernelState(SETTINGS, (OPEN, OPEN), {}, frozenset(both)),
        KernelState(SETTINGS, (OPEN, OPEN), {}),
        KernelState(SETTINGS, (OPEN, OPEN), dict.fromkeys(world.state.members, 1), world.state.direct),
    ]
    world.apply(states[-1])
    previous = states[-1]
    for state in states:
        text = change(previous, state)
        assert text
        assert all(" element inet pellucid " in line for line in text.splitlines())
        world.apply(state)
        previous = state
        for pod in (world.a, world.b):
            stand_in.taken.clear()
            for address in world.web.addresses:
                ask(pod, address, PORT, payload=b"x")
            assert len(stand_in.taken) == sum(ipaddress.ip_address(a).packed in state.members for a in pod.addresses)


def test_a_foreign_change_of_elements_is_survived(world: World) -> None:
    """Fact 11: where the elements are not as we left them, the table is loaded whole."""
    stand_in = world.stand_in()
    everyone, own = frozenset([*world.state.members, *world.state.direct]), world.state.members
    world.node.nft("flush map inet pellucid member4\nflush map inet pellucid member6")
    world.apply(KernelState(SETTINGS, world.state.groups, {}, everyone))
    assert ask(world.a, *WEB) == "web 192.0.2.1"
    world.node.nft("delete table inet pellucid")
    world.apply(KernelState(SETTINGS, world.state.groups, own, everyone - own.keys()))
    assert [ask(pod, *WEB) for pod in (world.a, world.b)] == ["web 10.244.1.10", "web 192.0.2.1"]
    assert len(stand_in.taken) == 1


def test_a_foreign_flush_is_reported(world: World) -> None:
    """Fact 12: by nft monitor for tables, by netlink for ip rules."""
    with watch(world.node, ["nft", "monitor"]) as tables, watch(world.node, ["ip", "monitor", "rule"]) as rules:
        assert tables.sees("probe", lambda: world.node.nft("add table inet probe\ndelete table inet probe"))
        assert rules.sees("60000", lambda: world.node.run(["ip", "rule", "add", "pref", "60000", "lookup", "main"]))
        assert routing_missing(world) == []
        assert tables.sees("delete table inet pellucid", lambda: world.node.nft("flush ruleset"))
        assert rules.sees("Deleted 101", lambda: world.node.run(["ip", "rule", "del", "pref", "101"], check=False))
    assert routing_missing(world) == ["ip rule pref 101 from 10.244.1.0/24 fwmark 0x1000/0x1040 lookup 15001"]
    world.node.call(routing.install, SETTINGS)
    assert routing_missing(world) == []


def test_each_rule_and_route_that_is_deleted_is_missed_and_put_back(world: World) -> None:
    """Fact 12: rules and routes are state of their own."""
    for family in ("-4", "-6"):
        before = world.node.run(["ip", family, "rule"]).stdout
        for deletion in (
            "rule del pref 100",
            "rule del pref 101",
            "rule del pref 101",
            "rule del pref 102",
            "route del local default table 15001",
        ):
            world.node.run(["ip", family, *deletion.split()])
        assert len(routing_missing(world)) == 5
        world.node.call(routing.install, SETTINGS)
        assert routing_missing(world) == []
        assert sorted(world.node.run(["ip", family, "rule"]).stdout.splitlines()) == sorted(before.splitlines())
    assert world.node.run(["ip", "-d", "rule"]).stdout.count("proto kernel") >= 4


@pytest.mark.parametrize(
    "scope",
    [("10.244.1.0/24", "10.244.3.0/24"), ("0.0.0.0/0", "::/0"), ("10.244.0.0/16", "10.244.1.0/24", "fd00:244:1::7")],
)
def test_routes_are_installed_once_for_any_scope(world: World, scope: tuple[str, ...]) -> None:
    """Fact 12: installing is repairing, and leaves nothing of an earlier scope."""
    settings = msgspec.structs.replace(SETTINGS, scope=scope)
    for _ in range(2):
        world.node.call(routing.install, settings)
        assert world.node.call(routing.missing, settings) == []
        ours = [
            line
            for line in world.node.run(["ip", "rule"]).stdout.splitlines()
            if line.startswith(("100:", "101:", "102:"))
        ]
        assert len(ours) == 3 * sum(":" not in cidr for cidr in scope) + 1
    world.node.call(routing.remove, settings)
    assert len(world.node.run(["ip", "rule"]).stdout.splitlines()) == 3


def test_elements_with_a_timeout_are_a_dead_mans_switch(world: World) -> None:
    """Fact 13: when nobody refreshes them, pods pass directly."""
    world.node.call(world.kernel.remove)
    world.node.nft(
        "table inet switch { set alive { type ipv4_addr; timeout 400ms; elements = { 10.244.1.10 }; }; chain c { "
        "type filter hook prerouting priority mangle; policy accept; meta l4proto tcp socket transparent 1 meta mark set 0x1000 accept; "
        "ip saddr @alive tcp flags & (syn|ack) == syn tproxy ip to 127.0.0.1:15001 meta mark set 0x1000 accept; }; }"
    )
    stand_in = world.stand_in(source="Node")
    ask(world.a, *WEB, payload=b"x")
    assert len(stand_in.taken) == 1

    def passes() -> bool:
        stand_in.taken.clear()
        ask(world.a, *WEB, payload=b"x")
        return stand_in.taken == []

    assert eventually(passes, 2.0)


def test_udp_keeps_its_original_destination_but_answers_may_find_their_address_taken(world: World) -> None:
    """Fact 14."""
    world.node.call(world.kernel.remove)
    world.node.nft(
        "table inet datagrams { chain c { type filter hook prerouting priority mangle; policy accept; "
        "ip saddr 10.244.1.10 udp dport 5353 tproxy ip to 127.0.0.1:15001 meta mark set 0x1000 accept; }; }"
    )
    listener = transparent_udp(world.node, ("127.0.0.1", 15001))
    with listener, world.a.open_socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(5)
        client.sendto(b"question", ("192.0.2.10", 5353))
        assert readable(listener, 5)
        data, extra, _, source = listener.recvmsg(100, 100)
        (destination,) = (struct.unpack_from("!2xH4s", value) for _, kind, value in extra if kind == IP_RECVORIGDSTADDR)
        assert (data, destination) == (b"question", (5353, socket.inet_aton("192.0.2.10")))
        with transparent_udp(world.node, ("192.0.2.10", 5353)) as answer:
            answer.sendto(b"answer", source)
        assert client.recvfrom(100) == (b"answer", ("192.0.2.10", 5353))
        with world.node.open_socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
            host.bind(("0.0.0.0", 5353))
            with pytest.raises(OSError, match="Address already in use"):
                transparent_udp(world.node, ("192.0.2.10", 5353))


@pytest.mark.parametrize("family", [4, 6])
def test_quic_is_rejected_at_once_so_that_clients_fall_back(world: World, family: int) -> None:
    """Fact 14: an ICMP error, not silence."""
    world.group(KernelGroup((), (ALLOW_REST,), closed=False, reject_quic=True))
    reached = world.tap("web", "udp dport 443")
    before = time.monotonic()
    with pytest.raises(ConnectionRefusedError):
        send_datagram(world.a, world.web.ipv6 if family == 6 else world.web.ipv4, 443)
    assert time.monotonic() - before < SHORT_S
    assert (reached(), world.event("quic_rejected")) == (0, 1)


def test_the_kernel_says_what_it_refuses_and_the_cure(world: World) -> None:
    with pytest.raises(KernelError, match=r"^nft: syntax error.*; this nft does not know our syntax: 1\.0 or later"):
        load("table inet pellucid { nonsense }\n")


def test_totals_never_go_backwards(world: World) -> None:
    """Counters of a replaced table are kept."""
    for expected in range(1, 5):
        ask(world.a, *WEB, payload=b"x")
        world.group(KernelGroup((), (ALLOW_REST,), closed=False, reject_quic=expected % 2 == 0))
        assert world.event("bypassed") == expected
    world.node.call(world.kernel.remove)
    assert world.event("bypassed") == 4


def routing_missing(world: World) -> list[str]:
    return world.node.call(routing.missing, SETTINGS)


def send_datagram(pod: Namespace, address: str, port: int, timeout_s: float = 5.0) -> bytes:
    """What comes back for a datagram. Raises ConnectionRefusedError, PermissionError and the like for an ICMP error, TimeoutError."""
    with pod.open_socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as opened:
        opened.settimeout(timeout_s)
        opened.connect((address, port))
        opened.send(b"datagram")
        return opened.recv(100)


def transparent_udp(node: Namespace, address: tuple[str, int]) -> socket.socket:
    opened = node.open_socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        opened.setsockopt(socket.IPPROTO_IP, 19, 1)
        opened.setsockopt(socket.IPPROTO_IP, IP_RECVORIGDSTADDR, 1)
        opened.bind(address)
    except OSError:
        opened.close()
        raise
    return opened


class watch:  # noqa: N801 - reads as a verb in `with`
    """The output of a monitor in namespace."""

    def __init__(self, namespace: Namespace, command: list[str]) -> None:
        self._child = namespace.popen(["stdbuf", "-oL", *command], stdout=subprocess.PIPE)
        self._said = b""

    def __enter__(self) -> watch:
        return self

    def __exit__(self, *error: object) -> None:
        self._child.kill()
        assert self._child.stdout is not None
        self._child.stdout.close()

    def sees(self, text: str, action: Callable[[], object], timeout_s: float = 5.0) -> bool:
        """Whether text is printed after action, which is repeated until it is: the monitor may not have begun."""
        stream = self._child.stdout
        assert stream is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            deadline = time.monotonic() + timeout_s
            action()
            while time.monotonic() < deadline:
                if selector.select(0.3):
                    self._said += os.read(stream.fileno(), 65536)
                    if text.encode() in self._said:
                        return True
                else:
                    action()
        return False
