"""What the kernel does with packets that it should hand over. Each test names the fact it shows (numbers of the design notes)."""

from __future__ import annotations

import socket
import struct
import time

import pytest

from pellucid_cli.lab.topology import Topology
from pellucid_proxy.kernel import routing

from .peers import PATIENCE_S, Peer, StandIn, ask, converse, echo, ping, spoofing_socket
from .world import BLOCK_REST, CLOSED, OPEN, PORT, SERVICE_PORT, SETTINGS, World, eventually, rule

SO_ORIGINAL_DST = 80
SHORT_S = 0.6  # long enough for what should work here, short enough to wait for what should not
WEB = ("192.0.2.10", PORT)
BARE = """
table inet bare {{
  chain prerouting {{
    type filter hook prerouting priority mangle; policy accept;
    {divert}
    {select}
  }}
}}
"""
DIVERT = "meta l4proto tcp socket transparent 1 ip saddr 10.244.1.0/24 meta mark set 0x1000 accept"
SELECT_SYN = (
    "ip saddr 10.244.1.10 tcp flags & (fin|syn|rst|ack) == syn tproxy ip to 127.0.0.1:15001 meta mark set 0x1000 accept"
)


@pytest.fixture
def bare(topology: Topology) -> Topology:
    """Pod a, server web, our ip rules, no nft rules."""
    topology.add_pod("a")
    topology.add_server("web")
    topology.node.call(routing.install, SETTINGS)
    return topology


def table(topology: Topology, select: str = SELECT_SYN, divert: str = DIVERT) -> None:
    topology.node.nft(BARE.format(select=select, divert=divert))


@pytest.mark.parametrize(
    ("statement", "known"),
    [
        ("ip saddr 10.244.1.10 meta l4proto tcp tproxy ip to 127.0.0.1:15001", True),
        ("ip6 saddr fd00::1 meta l4proto tcp tproxy ip6 to [::1]:15001", True),
        ("ip saddr 10.244.1.10 meta l4proto tcp tproxy to :15001", False),
    ],
)
def test_tproxy_names_its_family_in_an_inet_table(bare: Topology, statement: str, known: bool) -> None:
    """Fact 1."""
    text = BARE.format(divert="", select=statement)
    assert (bare.node.run(["nft", "-c", "-f", "-"], stdin=text, check=False).returncode == 0) is known


def test_tproxy_is_not_terminal(bare: Topology) -> None:
    """Fact 1: without accept, the next rule still sees the packet, and may drop it."""
    table(bare, select=SELECT_SYN.removesuffix("accept") + "\n ip saddr 10.244.1.10 tcp flags syn drop")
    with StandIn(bare.node, SETTINGS, dial=False) as stand_in:
        with pytest.raises(TimeoutError):
            bare.pods["a"].connect(*WEB, timeout_s=SHORT_S)
        assert stand_in.taken == []


def test_without_a_listener_tproxy_lets_the_packet_go_on_to_the_server(bare: Topology) -> None:
    """Fact 2: fail-open is the default, and silent."""
    table(bare)
    with Peer(bare.servers["web"], PORT) as peer:
        assert ask(bare.pods["a"], *WEB) == "web 10.244.1.10"
        assert peer.seen == ["10.244.1.10"]


def test_a_mark_set_before_tproxy_black_holes_when_nobody_listens(bare: Topology) -> None:
    """Fact 2: the packet is then routed to this machine, where nothing answers for that address."""
    table(bare, select="ip saddr 10.244.1.10 tcp flags syn meta mark set 0x1000 tproxy ip to 127.0.0.1:15001 accept")
    with Peer(bare.servers["web"], PORT) as peer:
        with pytest.raises(OSError):  # noqa: PT011 - a time-out or a reset, by kernel
            ask(bare.pods["a"], *WEB, timeout_s=SHORT_S)
        assert peer.seen == []


def test_an_open_policy_without_a_proxy_lets_pass_and_counts(world: World) -> None:
    """Fact 2, as our rules use it."""
    assert [ask(world.a, address, PORT) for address in world.web.addresses] == [
        "web 192.0.2.1",  # as the CNI masquerades
        "web 2001:db8::1",
    ]
    assert world.event("bypassed") == 2


def test_a_closed_policy_without_a_proxy_refuses_at_once_and_nothing_reaches_the_server(world: World) -> None:
    """Fact 2: every process of ours is dead here."""
    world.group(CLOSED)
    leaked = world.tap("web", "ip saddr 10.244.1.10")
    leaked6 = world.tap("web", "ip6 saddr fd00:244:1::10 tcp dport 8080")
    for address in (*world.web.addresses, "10.96.0.10", "fd00:96::10"):
        before = time.monotonic()
        with pytest.raises(ConnectionRefusedError):
            ask(world.a, address, SERVICE_PORT if "96" in address else PORT)
        assert time.monotonic() - before < SHORT_S
    assert (leaked(), leaked6()) == (0, 0)
    assert world.event("refused") == 4
    assert ask(world.b, *WEB) == "web 192.0.2.1"  # not selected; masqueraded by the CNI


def test_connections_live_through_start_policies_and_drain(world: World) -> None:
    """Fact 3: only SYNs are judged, and only divert rules serve what was taken."""
    with world.b.connect(*WEB) as untaken:
        assert converse(untaken)
        stand_in = world.stand_in()
        with world.a.connect(*WEB) as taken:
            assert converse(taken)
            assert len(stand_in.taken) == 1
            world.group(OPEN)
            members = dict.fromkeys([*world.state.members, *world.state.direct], 0)
            blocked = rule("all", "0.0.0.0/0", "::/0")
            everything_blocked = type(OPEN)((blocked,), (BLOCK_REST,), closed=True, reject_quic=True)
            for state in (
                type(world.state)(SETTINGS, (everything_blocked,), members, strangers=0),
                type(world.state)(SETTINGS, hold=True),
                type(world.state)(SETTINGS, drain=True),
            ):
                world.apply(state)
                assert echo(taken)
                assert echo(untaken)


def test_a_rule_on_every_packet_resets_live_connections(bare: Topology) -> None:
    """Fact 3, the way not to go."""
    with Peer(bare.servers["web"], PORT), bare.pods["a"].connect(*WEB) as live, StandIn(bare.node, SETTINGS):
        assert converse(live)
        table(
            bare,
            select="ip saddr 10.244.1.10 meta l4proto tcp tproxy ip to 127.0.0.1:15001 meta mark set 0x1000 accept",
        )
        with pytest.raises(ConnectionResetError):
            echo(live)


@pytest.mark.parametrize(("wildcard", "arrives"), [("", True), ("socket wildcard 0", False)])
def test_socket_wildcard_loses_the_ack_of_the_handshake(bare: Topology, wildcard: str, arrives: bool) -> None:
    """Fact 4: it does not match request sockets."""
    table(bare, divert=DIVERT.replace("transparent 1", f"transparent 1 {wildcard}"))
    bare.node.set_sysctls({"net.ipv4.tcp_early_demux": "0"})
    with StandIn(bare.node, SETTINGS, dial=False) as stand_in:
        if arrives:
            bare.pods["a"].connect(*WEB).close()
            assert eventually(lambda: stand_in.taken != [])
        else:
            with pytest.raises(OSError):  # noqa: PT011 - the ACK went to the server, which knows of no connection
                bare.pods["a"].connect(*WEB).recv(1)
            assert stand_in.taken == []


@pytest.mark.parametrize(("address", "reached"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_a_listener_on_any_address_can_be_dialled_by_pods(bare: Topology, address: str, reached: bool) -> None:
    """Fact 5: on 127.0.0.1 only TPROXY leads to it."""
    with bare.node.listen(address, 15001):
        if reached:
            bare.pods["a"].connect("10.244.1.1", 15001).close()
        else:
            with pytest.raises(ConnectionRefusedError):
                bare.pods["a"].connect("10.244.1.1", 15001)


def test_the_accepted_socket_bears_the_original_destination(world: World) -> None:
    """Fact 5; a service's address, too, before it became a backend's."""
    stand_in = world.stand_in()
    asked = [(a, PORT) for a in world.web.addresses] + [("10.96.0.10", SERVICE_PORT), ("fd00:96::10", SERVICE_PORT)]
    for address, port in asked:
        ask(world.a, address, port)
    assert [(address, port) for _, address, port in stand_in.taken] == asked


@pytest.mark.parametrize(
    ("select", "served"),
    [
        (SELECT_SYN, True),
        ("ip saddr 10.244.1.10 meta l4proto tcp tproxy ip to 127.0.0.1:15001 meta mark set 0x1000 accept", False),
    ],
)
def test_a_rule_on_the_source_alone_breaks_pods_as_servers(bare: Topology, select: str, served: bool) -> None:
    """Fact 6: it takes their SYN-ACKs."""
    table(bare, select=select)
    with Peer(bare.pods["a"], PORT), StandIn(bare.node, SETTINGS, dial=False):
        if served:
            assert ask(bare.servers["web"], "10.244.1.10", PORT) == "a 192.0.2.10"
        else:
            with pytest.raises(OSError):  # noqa: PT011
                ask(bare.servers["web"], "10.244.1.10", PORT, timeout_s=SHORT_S)


def test_a_blocked_pod_still_serves_and_is_probed(world: World) -> None:
    """Fact 6: what answers others is no request of the pod, whatever its policies."""
    world.stand_in()
    world.group(type(OPEN)((rule("all", "0.0.0.0/0", "::/0"),), (BLOCK_REST,), closed=True, reject_quic=True))
    for client in (world.node, world.web):
        for address in world.a.addresses:
            assert ask(client, address, PORT).startswith("a ")
            assert ping(client, address)


def test_connections_to_the_node_itself_are_not_taken(world: World) -> None:
    """Fact 6: fib daddr type local; addresses alone decide them."""
    stand_in = world.stand_in()
    for address in world.node.addresses:
        assert ask(world.a, address, PORT).startswith("node ")
    assert stand_in.taken == []
    world.group(
        type(OPEN)((), (rule("gateway", "10.244.1.1/32", allow=True), BLOCK_REST), closed=False, reject_quic=False)
    )
    assert ask(world.a, "10.244.1.1", PORT).startswith("node ")
    for address in ("192.0.2.1", "fd00:244:1::1"):
        with pytest.raises(ConnectionRefusedError):
            ask(world.a, address, PORT)
    assert (world.count("gateway"), world.count(None)) == (1, 4 + 2)


def test_a_taken_connection_to_a_service_keeps_its_address_because_nothing_tracks_it(world: World) -> None:
    """Fact 7: kube-proxy's DNAT comes after TPROXY and would take the packet away from its socket; NAT needs tracking."""
    stand_in = world.stand_in()
    assert ask(world.a, "10.96.0.10", SERVICE_PORT).startswith("web ")
    assert [(address, port) for _, address, port in stand_in.taken] == [("10.96.0.10", SERVICE_PORT)]
    tracked = world.node.run(
        ["conntrack", "-L", "-p", "tcp", "--orig-src", world.a.ipv4, "--orig-port-dst", str(SERVICE_PORT)]
    ).stdout
    assert len(tracked.splitlines()) == 1  # the proxy's own
    rules = world.node.run(["nft", "list", "table", "inet", "pellucid"]).stdout
    world.node.nft("delete table inet pellucid\n" + rules.replace(" notrack", ""))
    with pytest.raises(OSError):  # noqa: PT011
        ask(world.a, "10.96.0.10", SERVICE_PORT, timeout_s=SHORT_S)


@pytest.mark.parametrize("destination", ["192.0.2.10", "10.244.1.11"])
def test_src_valid_mark_makes_martians_of_taken_packets_unless_ip_rules_allow_for_it(
    world: World, destination: str
) -> None:
    """Fact 8: the reverse lookup bears the packet's mark. Where both ends are pods, scoping a rule by source is not enough."""
    world.stand_in()
    world.node.set_sysctls({"net.ipv4.conf.all.src_valid_mark": "1"})
    assert ask(world.a, destination, PORT)
    naive = "rule del pref 100\nrule add pref 99 fwmark 0x1000/0x1040 lookup 15001\n"
    scoped = "rule del pref 100\n"
    world.node.run(["ip", "-batch", "-"], stdin=scoped if destination == "10.244.1.11" else naive)
    with pytest.raises(TimeoutError):
        ask(world.a, destination, PORT, timeout_s=SHORT_S)


def test_a_bridge_that_calls_iptables_makes_tproxy_time_out_but_not_redirect() -> None:
    """Fact 9."""
    with World(bridge=True) as world:
        stand_in = world.stand_in()
        assert ask(world.a, *WEB)
        assert len(stand_in.taken) == 1
        world.node.set_sysctls({"net.bridge.bridge-nf-call-iptables": "1"})
        with pytest.raises(TimeoutError):
            ask(world.a, *WEB, timeout_s=SHORT_S)
        world.node.call(world.kernel.remove)
        world.node.nft(
            "table ip redirected { chain c { type nat hook prerouting priority dstnat - 10; policy accept; "
            "ip saddr 10.244.1.10 tcp dport 8080 redirect to :15002; }; }"
        )
        with world.node.listen("0.0.0.0", 15002) as listener, world.a.connect(*WEB, timeout_s=PATIENCE_S):
            accepted, _ = listener.accept()
            with accepted:
                original = accepted.getsockopt(socket.IPPROTO_IP, SO_ORIGINAL_DST, 16)
            assert struct.unpack_from("!2xH4s", original) == (PORT, socket.inet_aton("192.0.2.10"))


def test_deleting_the_table_breaks_what_was_taken_but_draining_does_not(world: World) -> None:
    """Fact 10: without early demux, which may find the socket before routing decides, it breaks for certain."""
    stand_in = world.stand_in()
    world.node.set_sysctls({"net.ipv4.tcp_early_demux": "0", "net.ipv4.ip_early_demux": "0"})
    with world.a.connect(*WEB) as taken:
        assert converse(taken)
        world.apply(type(world.state)(SETTINGS, drain=True))
        assert echo(taken)
        assert ask(world.a, *WEB) == "web 192.0.2.1"  # no longer taken
        assert len(stand_in.taken) == 1
        world.node.call(world.kernel.remove)
        with pytest.raises(OSError):  # noqa: PT011
            echo(taken)


def test_what_we_send_never_comes_back_to_us(world: World) -> None:
    """Fact 15: a packet with the egress mark and a pod's address that reaches prerouting again, here by way of lo, is left alone."""
    world.group(type(OPEN)((), (BLOCK_REST,), closed=True, reject_quic=False))
    for mark, reached in ((SETTINGS.marks.egress, True), (0, False)):
        opened = world.node.call(spoofing_socket, socket.AF_INET, "10.244.1.10", mark)
        with opened:
            opened.settimeout(SHORT_S)
            if reached:
                opened.connect(("192.0.2.1", PORT))
            else:
                with pytest.raises(OSError):  # noqa: PT011
                    opened.connect(("192.0.2.1", PORT))


def test_a_selected_pod_that_dials_a_selected_pod_is_taken_once(world: World) -> None:
    """Fact 15."""
    world.apply(type(world.state)(SETTINGS, (OPEN,), dict.fromkeys([*world.state.members, *world.state.direct], 0)))
    stand_in = world.stand_in()
    assert ask(world.a, "10.244.1.11", PORT) == "b 10.244.1.10"
    assert ask(world.a, "fd00:96::13", SERVICE_PORT) == "b fd00:244:1::10"
    assert len(stand_in.taken) == 2


def test_a_pod_whose_identity_is_not_known_is_taken_too(world: World) -> None:
    """Fact 20: by scope, not by list."""
    stand_in = world.stand_in()
    world.apply(type(world.state)(SETTINGS, (OPEN,), {}, world.state.direct, strangers=0))
    new = world.topology.add_pod("new")
    for address in world.web.addresses:
        ask(new, address, PORT)
        ask(world.b, address, PORT)
    assert [source for source, _, _ in stand_in.taken] == list(new.addresses)


@pytest.mark.parametrize(("scope", "taken"), [("10.244.1.0/24", 0), ("10.244.0.0/16", 1)])
def test_pods_of_other_nodes_are_left_to_their_own_node(world: World, scope: str, taken: int) -> None:
    """Fact 21: a scope wider than the node's own pods takes their connections twice."""
    import msgspec

    settings = msgspec.structs.replace(SETTINGS, scope=(scope, "fd00:244:1::/64"))
    world.node.call(routing.install, settings)
    world.apply(type(world.state)(settings, (OPEN,), strangers=0))
    stand_in = world.stand_in(source="Node")
    world.mail.run(["ip", "address", "add", "10.244.2.10/32", "dev", "eth0"])  # as if mail were another node
    world.node.run(["ip", "route", "add", "10.244.2.10", "dev", "srv-mail"])
    world.web.run(["ip", "route", "replace", "10.244.2.10", "via", "192.0.2.1"])
    with world.mail.connect(*WEB, source="10.244.2.10") as connection:
        assert converse(connection).startswith("web ")
    assert len(stand_in.taken) == taken
