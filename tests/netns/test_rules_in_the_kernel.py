"""What the rule set decides, counted at the server and by its own counters."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator

import pytest

from pellucid_cli.lab.topology import Namespace
from pellucid_policy.facts import ICMP, TCP, UDP
from pellucid_policy.plan import AddressRule, KernelGroup, PortRange
from pellucid_policy.verdict import Response
from pellucid_proxy.kernel.state import KernelState

from .peers import ask, ping, readable, spoofing_socket
from .test_facts_of_interception import SHORT_S, WEB
from .test_facts_of_the_table import send_datagram
from .world import ALLOW_REST, BLOCK_REST, OPEN, PORT, SETTINGS, World, eventually, rule

TCP_8080 = (PortRange(TCP, 8000, 8100),)
TCP_OTHER = (PortRange(TCP, 1, 7999), PortRange(UDP, 53, 53))


@pytest.fixture
def answering(world: World) -> Iterator[World]:
    """A world whose web and mail answer UDP on port 53."""
    servers = [datagram_server(host) for host in (world.web, world.mail)]
    yield world
    for server in servers:
        server.close()


def datagram_server(host: Namespace) -> socket.socket:
    """A socket whose kernel side alone is asked: what has arrived is read from it, nothing is answered."""
    server = host.open_socket(socket.AF_INET6, socket.SOCK_DGRAM)
    server.bind(("::", 53))
    return server


def group(
    *leading: AddressRule, nameless: tuple[AddressRule, ...] = (ALLOW_REST,), closed: bool = False
) -> KernelGroup:
    return KernelGroup(leading, nameless, closed, reject_quic=False)


def test_a_leading_allow_never_enters_the_proxy(world: World) -> None:
    stand_in = world.stand_in()
    world.group(group(rule("web", "192.0.2.10/32", "2001:db8::10/128", allow=True)))
    for address in (*world.web.addresses, *world.mail.addresses):
        assert ask(world.a, address, PORT)
    assert {address for _, address, _ in stand_in.taken} == set(world.mail.addresses)
    assert world.count("web") == 2


def test_a_leading_block_ends_at_the_first_packet(world: World) -> None:
    world.stand_in()
    reached = world.tap("web", f"tcp dport {PORT}")
    world.group(group(rule("reset", "192.0.2.10/32"), rule("drop", "2001:db8::/32", response=Response.DROP)))
    before = time.monotonic()
    with pytest.raises(ConnectionRefusedError):
        ask(world.a, *WEB)
    assert time.monotonic() - before < SHORT_S
    with pytest.raises(TimeoutError):
        ask(world.a, world.web.ipv6, PORT, timeout_s=SHORT_S)
    assert reached() == 0
    assert (world.count("reset"), world.count("drop")) == (1, 1)


@pytest.mark.parametrize(
    ("rules", "reached", "counted"),
    [
        # networks within networks, one lookup
        ((rule("1", "192.0.2.10/32", allow=True), rule("2", "192.0.2.0/24")), True, "1"),
        ((rule("1", "192.0.2.0/24"), rule("2", "192.0.2.10/32", allow=True)), False, "1"),
        ((rule("1", "192.0.2.11/32"), rule("2", "192.0.0.0/16", allow=True), rule("3", "192.0.2.10/32")), True, "2"),
        ((rule("1", "203.0.113.0/24"), rule("2", "0.0.0.0/0", "::/0")), False, "2"),
        # ports: the second stands behind one that could match both
        ((rule("1", "192.0.2.0/24", ports=TCP_8080, allow=True), rule("2", "192.0.2.10/32")), True, "1"),
        ((rule("1", "192.0.2.0/24", ports=TCP_OTHER), rule("2", "192.0.2.10/32", allow=True)), True, "2"),
        (
            (
                rule("1", "192.0.2.0/24", ports=TCP_OTHER),
                rule("2", "192.0.0.0/8", ports=TCP_8080),
                rule("3", allow=True),
            ),
            False,
            "2",
        ),
        (
            (
                rule("1", "192.0.2.0/24", ports=TCP_8080),
                rule("2", "192.0.2.10/32", ports=TCP_OTHER),
                rule("3", allow=True),
            ),
            False,
            "1",
        ),
        # any destination
        ((rule("1", ports=TCP_OTHER), rule("2", allow=True), rule("3", "192.0.2.10/32")), True, "2"),
        ((rule("1"), rule("2", "192.0.2.10/32", allow=True)), False, "1"),
    ],
)
@pytest.mark.parametrize("chain", ["leading", "nameless"])
def test_the_first_matching_rule_decides_and_counts(
    world: World, rules: tuple[AddressRule, ...], reached: bool, counted: str, chain: str
) -> None:
    if chain == "leading":
        world.group(group(*rules, closed=True))
        target, port = WEB
    else:  # the node's own address, as if it were web
        world.node.run(["ip", "address", "add", "192.0.2.10/32", "dev", "lo"])
        world.group(group(nameless=(*rules, BLOCK_REST)))
        target, port = WEB
    if reached:
        assert ask(world.a, target, port)
    else:
        with pytest.raises(ConnectionRefusedError):
            ask(world.a, target, port)
    assert {name: world.count(name) for name in ("1", "2", "3")} == {
        name: int(name == counted) for name in ("1", "2", "3")
    }


def test_udp_and_icmp_follow_the_nameless_rules(answering: World) -> None:
    world = answering
    stand_in = world.stand_in()
    dns = (PortRange(UDP, 53, 53),)
    world.group(
        group(
            nameless=(
                rule("dns", "192.0.2.10/32", "2001:db8::10/128", ports=dns, allow=True),
                rule("ping", "192.0.2.10/32", "2001:db8::10/128", ports=(PortRange(ICMP, 0, 65535),), allow=True),
                rule("silent", "192.0.2.11/32", ports=dns, response=Response.DROP),
                BLOCK_REST,
            )
        )
    )
    for address in world.web.addresses:
        with pytest.raises(TimeoutError):  # reached, not answered
            send_datagram(world.a, address, 53, timeout_s=0.05)
        assert ping(world.a, address)
    assert (world.count("dns"), world.count("ping")) == (2, 2)
    with pytest.raises(TimeoutError):
        send_datagram(world.a, world.mail.ipv4, 53, timeout_s=0.05)
    for address in world.mail.addresses:
        with pytest.raises(OSError, match=r"refused|unreachable|denied|No route|not permitted"):
            ping(world.a, address)
        with pytest.raises(OSError, match=r"refused|unreachable|denied|No route|not permitted"):
            send_datagram(world.a, address, 54, timeout_s=SHORT_S)
    assert world.count("silent") == 1
    assert stand_in.taken == []


def test_answers_and_errors_of_a_pod_are_not_requests(answering: World) -> None:
    """A pod as a UDP server, and the port-unreachable that it sends, pass under a policy that blocks everything."""
    world = answering
    world.group(group(rule("all"), nameless=(BLOCK_REST,)))
    with pytest.raises(ConnectionRefusedError):
        send_datagram(world.web, world.a.ipv4, 9)
    with world.a.open_socket(socket.AF_INET6, socket.SOCK_DGRAM) as server:
        server.bind(("::", 53))
        for address in world.a.addresses:
            with world.web.open_socket(
                socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM
            ) as client:
                client.connect((address, 53))
                client.send(b"question")
                question, source = server.recvfrom(100)
                server.sendto(b"answer", source)
                assert readable(client, 5)
                assert (question, client.recv(100)) == (b"question", b"answer")


def test_a_pod_without_any_right_still_finds_its_neighbours(world: World) -> None:
    """Neighbour discovery is no traffic of the application: blocking it would cut what is allowed."""
    world.group(group(rule("web", "2001:db8::10/128", allow=True), rule("all"), nameless=(BLOCK_REST,)))
    for host in (world.a, world.node):
        host.run(["ip", "neigh", "flush", "all"])
    assert ask(world.a, world.web.ipv6, PORT)


def test_exclusions_come_before_every_policy(world: World) -> None:
    import msgspec

    stand_in = world.stand_in()
    settings = msgspec.structs.replace(SETTINGS, exclude=("192.0.2.10/32", "2001:db8::10/128"))
    world.apply(KernelState(settings, (group(rule("all"), nameless=(BLOCK_REST,), closed=True),), world.state.members))
    for address in world.web.addresses:
        assert ask(world.a, address, PORT)
        assert ping(world.a, address)
    with pytest.raises(ConnectionRefusedError):
        ask(world.a, world.mail.ipv4, PORT)
    assert stand_in.taken == []


def test_until_there_is_a_policy_connections_wait_and_the_rest_is_dropped(answering: World) -> None:
    """The boot hold: nothing is decided, nothing leaks, nothing is refused."""
    world = answering
    world.apply(KernelState(SETTINGS, hold=True))
    leaked = [world.tap(server, "meta l4proto { tcp, udp, icmp }") for server in ("web", "mail")]
    with pytest.raises(TimeoutError):  # nobody listens yet
        ask(world.a, *WEB, timeout_s=SHORT_S)
    stand_in = world.stand_in(dial=False)
    for pod in (world.a, world.b):
        with pytest.raises(TimeoutError):
            send_datagram(pod, world.web.ipv4, 53, timeout_s=0.05)
        assert not ping(pod, world.web.ipv4, 0.05)
        for address in world.mail.addresses:
            with pod.connect(address, PORT) as waiting:
                assert not readable(waiting, 0.05)
    assert eventually(lambda: len(stand_in.taken) == 4)
    assert [read() for read in leaked] == [0, 0]
    assert world.event("held") >= 5


def test_a_closed_policy_leaks_nothing_when_its_proxy_is_killed_under_load(world: World) -> None:
    world.group(group(closed=True))
    stand_in = world.stand_in()
    reached = world.tap("web", f"ip saddr 10.244.1.10 tcp dport {PORT}")
    world.node.nft(_TELL)  # the proxy's own packets from the pod's
    direct = world.tap("web", f"tcp dport {PORT} ip saddr 10.244.1.10 ip ttl != 33")
    live = [world.a.connect(*WEB) for _ in range(20)]
    for connection in live:
        assert connection.recv(100)
    stand_in.close()
    for _ in range(20):
        with pytest.raises(ConnectionRefusedError):
            world.a.connect(*WEB)
    for connection in live:
        with connection:
            try:
                connection.sendall(b"secret")
                assert connection.recv(1) == b""
            except OSError:
                pass
    assert reached() > 0
    assert direct() == 0
    assert world.event("refused") == 20


def test_packets_of_a_taken_connection_whose_socket_is_gone_are_reset_not_forwarded(world: World) -> None:
    """A worker may die with its connections; its clients must learn it, and the server must not see their bytes."""
    world.group(group(closed=True))
    stand_in = world.stand_in(dial=False)
    client = world.a.connect(*WEB)
    assert eventually(lambda: len(stand_in.taken) == 1)
    reached = world.tap("web", "ip saddr 10.244.1.10")
    world.node.nft("table inet mute { chain out { type filter hook output priority 0; ip daddr 10.244.1.10 drop; }; }")
    stand_in.vanish()
    world.node.nft("delete table inet mute")
    with client:
        client.sendall(b"secret")
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert reached() == 0
    assert world.event("orphaned") >= 1


@pytest.mark.parametrize("flags", ["SYN", "SYN FIN", "SYN RST", "SYN PSH URG", "SYN ECE CWR"])
def test_whatever_could_open_a_connection_is_judged_as_one_that_does(world: World, flags: str) -> None:
    """Some stacks take SYN+FIN for a SYN."""
    world.group(group(rule("all", response=Response.DROP), nameless=(BLOCK_REST,)))
    reached = world.tap("web", "tcp dport 9")
    bits = {"FIN": 1, "SYN": 2, "RST": 4, "PSH": 8, "URG": 32, "ECE": 64, "CWR": 128}
    header = struct.pack("!HHIIBBHHH", 12345, 9, 1, 0, 5 << 4, sum(bits[flag] for flag in flags.split()), 1000, 0, 0)
    with world.a.open_socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        pseudo = (
            socket.inet_aton(world.a.ipv4) + socket.inet_aton(world.web.ipv4) + struct.pack("!BBH", 0, TCP, len(header))
        )
        raw.sendto(header[:16] + struct.pack("!H", checksum(pseudo + header)) + header[18:], (world.web.ipv4, 0))
    assert eventually(lambda: world.count("all") == 1)
    assert reached() == 0


@pytest.mark.parametrize(
    ("family", "protocol"),
    [(socket.AF_INET, 47), (socket.AF_INET, 253), (socket.AF_INET6, 132), (socket.AF_INET6, 253)],
)
def test_other_protocols_follow_the_nameless_rules(world: World, family: int, protocol: int) -> None:
    world.group(
        group(
            nameless=(
                rule("here", "192.0.2.11/32", "2001:db8::11/128", allow=True),
                rule("silent", response=Response.DROP),
            )
        )
    )
    taps = [world.tap(server, f"meta l4proto {protocol}") for server in ("web", "mail")]
    with world.a.open_socket(family, socket.SOCK_RAW, protocol) as raw:
        for host in (world.web, world.mail):
            raw.sendto(bytes(16), (host.ipv6 if family == socket.AF_INET6 else host.ipv4, 0))
    assert eventually(lambda: taps[1]() == 1)
    assert [tap() for tap in taps] == [0, 1]
    assert (world.count("here"), world.count("silent")) == (1, 1)


def test_fragments_are_judged_whole(answering: World) -> None:
    """Connection tracking puts them together first: no port hides in a later fragment."""
    world = answering
    world.group(
        group(
            nameless=(rule("dns", ports=(PortRange(UDP, 53, 53),), allow=True), rule("silent", response=Response.DROP))
        )
    )
    reached = world.tap("web", "udp dport 54")
    for address in world.web.addresses:
        with world.a.open_socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as client:
            for port in (53, 54):
                client.sendto(b"x" * 4000, (address, port))
    assert eventually(lambda: (world.count("dns"), world.count("silent")) == (2, 2))
    assert reached() == 0


def test_ipv6_extension_headers_hide_nothing(world: World) -> None:
    """Destination options ahead of a SYN: the rule still sees TCP; an unknown header follows the nameless rules."""
    world.group(group(rule("all", response=Response.DROP), nameless=(rule("silent", response=Response.DROP),)))
    reached = world.tap("web", "ip6 saddr fd00:244:1::10 ip6 daddr 2001:db8::10 meta l4proto != ipv6-icmp")
    with world.a.open_socket(socket.AF_INET6) as client:
        client.settimeout(SHORT_S)
        client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DSTOPTS, bytes([0, 0, 1, 4, 0, 0, 0, 0]))
        with pytest.raises(TimeoutError):
            client.connect((world.web.ipv6, PORT))
    with world.a.open_socket(socket.AF_INET6, socket.SOCK_RAW, 200) as raw:
        raw.sendto(bytes(16), (world.web.ipv6, 0))
    assert (world.count("all") >= 1, world.count("silent"), reached()) == (True, 1, 0)


def test_marks_of_others_are_kept(world: World) -> None:
    """Only the bits of our mask are set and compared."""
    world.stand_in()
    world.node.nft(_OTHERS)
    assert ask(world.a, *WEB) == "web 10.244.1.10"
    said = world.node.run(["nft", "list", "counter", "inet", "others", "kept"]).stdout
    assert int(said.split("packets ")[1].split()[0]) > 3


def test_the_proxys_own_address_upstream_needs_no_nat_of_ours(world: World) -> None:
    """A socket of another program with a pod's address but without our mark is not ours to change."""
    with world.node.call(spoofing_socket, socket.AF_INET, None, 0) as plain:
        plain.connect(WEB)
        assert plain.recv(100) == b"web 192.0.2.1\n"
    assert world.state.groups == (OPEN,)


def checksum(data: bytes) -> int:
    """RFC 1071."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


_TELL = """
table inet tell {
  chain c {
    type filter hook postrouting priority 0; policy accept;
    meta mark & 0x1040 == 0x1040 ip ttl set 33
  }
}
"""
_OTHERS = """
table inet others {
  counter kept { }
  chain before {
    type filter hook prerouting priority -310; policy accept;
    iifname pod-a meta mark set 0x4100
  }
  chain after {
    type filter hook input priority 0; policy accept;
    iifname pod-a meta mark & 0xffffefbf == 0x4100 meta mark & 0x1040 == 0x1000 counter name kept
  }
}
"""
