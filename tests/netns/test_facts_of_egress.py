"""What the kernel does with connections that the proxy makes. Each test names the fact it shows."""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import traceback
from collections.abc import Callable

import pytest

from pellucid_cli.lab import sandbox
from pellucid_proxy.kernel.routing import collisions, install
from pellucid_proxy.session.dial_deny import denied

from .peers import IP_BIND_ADDRESS_NO_PORT, IP_TRANSPARENT, ask, converse, echo, spoofing_socket, transparent_listener
from .test_facts_of_interception import SHORT_S, WEB
from .world import PORT, SERVICE_PORT, SETTINGS, World, in_a_user_namespace

NOBODY = 65534
PR_SET_DUMPABLE = 4
EGRESS = SETTINGS.marks.egress


def test_a_socket_bound_early_takes_its_port_from_all_others(world: World) -> None:
    """Fact 16: IP_BIND_ADDRESS_NO_PORT chooses the port at connect(), where it may be shared by destination."""
    world.node.set_sysctls({"net.ipv4.ip_local_port_range": "40000 40001"})

    def dial(server: str, *, early: bool) -> socket.socket:
        opened = socket.socket()
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, EGRESS)
        opened.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
        opened.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 0 if early else 1)
        opened.settimeout(5)
        try:
            opened.bind((world.a.ipv4, 0))
            opened.connect((server, PORT))
        except OSError:
            opened.close()
            raise
        return opened

    late = [world.node.call(dial, server, early=False) for server in ("192.0.2.10", "192.0.2.11") * 2]
    assert len({opened.getsockname()[1] for opened in late}) == 2
    for opened in late:
        opened.close()
    world.node.set_sysctls({"net.ipv4.ip_local_port_range": "40010 40010"})
    with world.node.call(dial, "192.0.2.10", early=True), pytest.raises(OSError, match=r"Cannot assign|already in use"):
        world.node.call(dial, "192.0.2.11", early=False)


def test_the_clients_own_port_can_be_used_upstream_because_only_one_of_the_two_is_tracked(world: World) -> None:
    """Fact 16: where both are, conntrack takes the packets for the client's connection, and no backend is ever reached."""
    world.stand_in(dial=False)
    with world.a.connect("10.96.0.10", SERVICE_PORT) as client:
        with world.node.call(spoofing_socket, socket.AF_INET, None, EGRESS) as opened:
            opened.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
            opened.settimeout(5)
            opened.bind((world.a.ipv4, client.getsockname()[1]))
            opened.connect(("10.96.0.10", SERVICE_PORT))
            assert opened.recv(100).startswith(b"web ")


def test_the_port_of_a_live_upstream_connection_can_be_the_clients_next_one(world: World) -> None:
    """Fact 16: the client's connection to the proxy is not tracked, so that there is nothing to clash with."""
    with transparent_listener(world.node, "127.0.0.1", SETTINGS.listen_port) as listener:
        with world.node.call(spoofing_socket, socket.AF_INET, None, EGRESS) as upstream:
            upstream.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
            upstream.bind((world.a.ipv4, 45678))
            upstream.connect(WEB)
            assert upstream.recv(100) == b"web 10.244.1.10\n"
            taken = world.a.connect(*WEB, source=world.a.ipv4, source_port=45678)
            with taken as client, listener.accept()[0] as accepted:
                for one, other in ((client, accepted), (accepted, client)) * 3:
                    one.sendall(b"hello")
                    assert other.recv(100) == b"hello"
                assert echo(upstream)


def test_a_shared_port_confuses_neither_side_where_no_nat_is(world: World) -> None:
    """Fact 16: to an external server both connections work, though conntrack holds them for one: sockets are found by addresses."""
    with transparent_listener(world.node, "127.0.0.1", SETTINGS.listen_port) as listener:
        with world.a.connect(*WEB) as client:
            accepted, (_, port) = listener.accept()
            upstream = world.node.call(spoofing_socket, socket.AF_INET, None, EGRESS)
            with accepted, upstream:
                upstream.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
                upstream.bind((world.a.ipv4, port))
                upstream.connect(WEB)
                assert upstream.recv(100) == b"web 10.244.1.10\n"
                assert echo(upstream)
                accepted.sendall(b"to the pod")
                assert client.recv(100) == b"to the pod"
                client.sendall(b"from the pod")
                assert accepted.recv(100) == b"from the pod"
                assert echo(upstream)


def test_masquerade_undoes_the_pods_address_unless_identity_snat_came_first(world: World) -> None:
    """Fact 16."""
    world.stand_in()
    assert ask(world.a, *WEB) == "web 10.244.1.10"
    world.node.nft("flush chain inet pellucid own_snat")
    assert ask(world.a, *WEB) == "web 192.0.2.1"


def test_replies_of_services_need_the_connection_mark(world: World) -> None:
    """Fact 16: before NAT is undone, the reply bears the backend's address, and no socket is found by it."""
    world.stand_in()
    assert ask(world.a, "10.96.0.10", SERVICE_PORT) == "web 10.244.1.10"
    listed = world.node.run(["nft", "-a", "list", "chain", "inet", "pellucid", "prerouting"]).stdout
    by_mark = next(line.split()[-1] for line in listed.splitlines() if "goto replies" in line)
    world.node.nft(f"delete rule inet pellucid prerouting handle {by_mark}")
    assert ask(world.a, *WEB) == "web 10.244.1.10"  # found by its addresses
    with pytest.raises(OSError):  # noqa: PT011
        ask(world.a, "10.96.0.10", SERVICE_PORT, timeout_s=SHORT_S)


def test_a_pod_drops_packets_that_bear_its_own_address(world: World) -> None:
    """Fact 16: so a service that leads back to its caller is called from the node's address, strangers' too."""
    world.stand_in()
    assert ask(world.a, "10.96.0.11", SERVICE_PORT) == "a 10.244.1.1"
    world.apply(type(world.state)(SETTINGS, world.state.groups, strangers=0))
    assert ask(world.a, "10.96.0.11", SERVICE_PORT) == "a 10.244.1.1"
    assert ask(world.a, "fd00:96::11", SERVICE_PORT) == "a fd00:244:1::1"
    world.node.nft(
        "flush set inet pellucid stranger4\nflush chain inet pellucid judge\nadd rule inet pellucid judge goto group0"
    )
    with pytest.raises(OSError):  # noqa: PT011
        ask(world.a, "10.96.0.11", SERVICE_PORT, timeout_s=SHORT_S)


def test_connections_survive_a_flushed_conntrack_table(world: World) -> None:
    """Fact 16: where no NAT is needed, sockets are found without it; kernel's reference list has this case."""
    world.stand_in()
    with world.a.connect(*WEB) as client:
        assert converse(client)
        world.node.run(["conntrack", "-F"])
        assert echo(client)


def test_the_egress_mark_leads_into_a_vpn(world: World) -> None:
    """Fact 17: an ip rule on our mark, or the interface itself; preflight does not take such a rule for a collision."""
    far = "198.51.100.1"
    world.mail.run(["ip", "address", "add", f"{far}/32", "dev", "lo"])
    stand_in = world.stand_in()
    with pytest.raises(OSError):  # noqa: PT011 - the default route leads to web
        ask(world.a, far, PORT, timeout_s=SHORT_S)
    vpn = [
        f"rule add pref 500 fwmark {EGRESS:#x}/{SETTINGS.marks.mask:#x} lookup 51820",
        f"route add {far} via 192.0.2.11 dev srv-mail onlink table 51820",
    ]
    world.node.run(["ip", "-batch", "-"], stdin="\n".join(vpn) + "\n")
    for source, seen in (("Pod", "10.244.1.10"), ("Node", "192.0.2.1")):
        stand_in.source = source
        assert ask(world.a, far, PORT) == f"mail {seen}"
    assert world.node.call(collisions, SETTINGS) == []
    world.node.call(install, SETTINGS)
    world.node.run(["ip", "rule", "del", "pref", "500"])
    with world.node.open_socket() as bound:
        bound.settimeout(5)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"srv-mail")
        bound.connect((far, PORT))
        assert bound.recv(100) == b"mail 192.0.2.1\n"


def test_the_nodes_address_opens_what_is_closed_to_pods(world: World) -> None:
    """Fact 18: hence the list of targets that are never dialled with it."""
    metadata = "169.254.169.254"
    world.mail.run(["ip", "address", "add", f"{metadata}/32", "dev", "lo"])
    world.node.run(["ip", "route", "add", metadata, "via", "192.0.2.11", "dev", "srv-mail", "onlink"])
    world.mail.nft(
        "table ip guard { chain c { type filter hook input priority 0; policy accept; ip saddr 10.244.0.0/16 reject; }; }"
    )
    stand_in = world.stand_in()
    with pytest.raises(OSError):  # noqa: PT011
        ask(world.a, metadata, PORT, timeout_s=SHORT_S)
    stand_in.source = "Node"
    assert ask(world.a, metadata, PORT) == "mail 192.0.2.1"
    assert denied(socket.inet_aton(metadata), node_source=True, node_addresses=frozenset())


_RIGHTS = """
import socket
from tests.netns.peers import IP_TRANSPARENT, IPV6_TRANSPARENT
for name, family, level, option, value in (
    ("IP_TRANSPARENT", socket.AF_INET, socket.IPPROTO_IP, IP_TRANSPARENT, 1),
    ("IPV6_TRANSPARENT", socket.AF_INET6, socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1),
    ("SO_MARK", socket.AF_INET, socket.SOL_SOCKET, socket.SO_MARK, 1),
    ("SO_BINDTODEVICE", socket.AF_INET, socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo"),
):
    with socket.socket(family) as opened:
        try:
            opened.setsockopt(level, option, value)
            if option == IP_TRANSPARENT:
                opened.bind(("10.244.1.10", 0))
            if option == IPV6_TRANSPARENT:
                opened.bind(("fd00:244:1::10", 0))
            print(name, "ok")
        except PermissionError:
            print(name, "EPERM")
"""


@pytest.mark.parametrize(
    ("capabilities", "transparent", "mark"),
    [("-all,+net_raw", "ok", "ok"), ("-all", "EPERM", "EPERM")],
    ids=["NET_RAW", "none"],
)
def test_net_raw_alone_suffices_for_a_workers_sockets(
    world: World, capabilities: str, transparent: str, mark: str
) -> None:
    """Fact 19."""
    said = world.node.run(
        ["setpriv", "--inh-caps", capabilities, "--bounding-set", capabilities, sys.executable, "-c", _RIGHTS]
    ).stdout
    assert dict(line.split() for line in said.splitlines()) == {
        "IP_TRANSPARENT": transparent, "IPV6_TRANSPARENT": transparent, "SO_MARK": mark, "SO_BINDTODEVICE": "ok",
    }  # fmt: skip


def test_all_of_it_works_without_root() -> None:
    """Fact 22: an ordinary user makes a user namespace of its own, and the whole network in it."""
    assert in_a_fork(_without_root) == "web 10.244.1.10 web fd00:244:1::10, taken 2"


def _without_root() -> str:
    del os.environ[sandbox.MARKER]
    if not in_a_user_namespace():
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self belongs to root
    sandbox.enter()
    assert in_a_user_namespace()
    with World() as world:
        stand_in = world.stand_in()
        return (
            " ".join(ask(world.a, address, PORT) for address in world.web.addresses) + f", taken {len(stand_in.taken)}"
        )


def in_a_fork(function: Callable[[], str]) -> str:
    """What function returns or raises, called in a process that ends with it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = function()
        except BaseException:  # noqa: BLE001 - the child must not go on as a second pytest
            said = traceback.format_exc()
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as stream:
        said = stream.read()
    os.waitpid(child, 0)
    return said
