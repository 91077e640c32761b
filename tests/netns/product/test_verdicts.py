"""Every verdict end to end, in both families: what the client gets, what the servers see, what is recorded."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from pellucid_cli.lab.clients import get, get_several, get_tls, greet
from pellucid_cli.lab.instance import Instance
from pellucid_cli.lab.servers import Arrival, speak_http, speak_https, speak_smtp
from pellucid_cli.lab.topology import POD_GATEWAYS, SERVER_GATEWAYS, Namespace
from tests.proxy.sniff.hellos import ECH, extension, hello

from ..peers import ping
from ..world import eventually
from .conftest import Figure
from .stage import VERSIONS, Stage, address_of, pod_objects, policy, records, tap

PATIENCE_S = 1.0
HTTP, HTTPS, MAIL, POSTGRES, SECRET, CONNECT, SOCKS = 80, 443, 25, 5432, 9999, 3128, 1080


def _cluster(name: str, tier: str, rules: str) -> str:
    return policy(rules, name=name).replace("kind: TransparentPolicy", "kind: ClusterTransparentPolicy").replace(
        "podSelector: {matchLabels: {app: a}}", f"tier: {tier}\n  namespaceSelector: {{matchLabels: {{team: shop}}}}"
    ).replace(", namespace: shop", "")  # fmt: skip


def _rules(version: int) -> str:
    """The rules that name addresses, which are of one family; names say which."""
    other, via = ("192.0.2.11", "192.0.2.12") if version == 4 else ("2001:db8::11", "2001:db8::12")
    loopback, node, far = (
        ("127.0.0.1", "192.0.2.1", "192.0.2.11") if version == 4 else ("::1", "2001:db8::1", "2001:db8::11")
    )
    return f"""
  - name: to-other{version}
    match: {{destinations: [{{domain: route{version}.example}}]}}
    action: Route
    route: {{to: {{address: "{other}", port: 8080}}}}
  - name: via-connect{version}
    match: {{destinations: [{{domain: connect{version}.example}}]}}
    action: Route
    route: {{via: {{protocol: HTTPConnect, address: "{via}", port: {CONNECT}}}}}
  - name: via-socks{version}
    match: {{destinations: [{{domain: socks{version}.example}}]}}
    action: Route
    route: {{via: {{protocol: SOCKS5, address: "{via}", port: {SOCKS}}}}}
  - name: to-and-via{version}
    match: {{destinations: [{{domain: both{version}.example}}]}}
    action: Route
    route: {{to: {{address: "{far}", port: 8080}}, via: {{protocol: SOCKS5, address: "{via}", port: {SOCKS}}}}}
  - name: to-loopback{version}
    match: {{destinations: [{{domain: loopback{version}.example}}]}}
    action: Route
    route: {{to: {{address: "{loopback}", port: {SECRET}}}}}
  - name: to-node{version}
    match: {{destinations: [{{domain: node{version}.example}}]}}
    action: Route
    route: {{to: {{address: "{node}", port: {SECRET}}}}}
"""


APPLICATION = f"""
  - {{name: trial, match: {{destinations: [{{domain: trial.example}}]}}, action: Block, mode: Audit}}
  - name: site
    match: {{destinations: [{{domain: site.example}}, {{domain: "*.site.example"}}, {{domain: trial.example}}]}}
    action: Allow
  - {{name: reset, match: {{destinations: [{{domain: reset.example}}]}}, action: Block}}
  - {{name: drop, match: {{destinations: [{{domain: drop.example}}]}}, action: Block, block: {{response: Drop}}}}
  - name: respond
    match: {{destinations: [{{domain: respond.example}}]}}
    action: Block
    block: {{response: Respond, status: 451, body: not here}}
  - {{name: node-source, match: {{destinations: [{{domain: egress.example}}]}}, action: Allow, egress: {{sourceAddress: Node}}}}
  - {{name: in-application, match: {{destinations: [{{domain: passed.example}}, {{domain: admin.example}}]}}, action: Allow}}
{_rules(4)}{_rules(6)}
  - {{name: mail, match: {{ports: [{{port: {MAIL}}}, {{port: {POSTGRES}}}]}}, action: Allow}}
  - {{name: udp, match: {{ports: [{{port: 53, protocol: UDP}}, {{protocol: ICMP}}]}}, action: Allow}}
  - {{name: to-baseline, match: {{destinations: [{{domain: baseline.example}}, {{domain: late.example}}]}}, action: Pass}}
  - {{name: rest, match: {{}}, action: Block}}
"""
STRICT = """
  - {name: site, match: {destinations: [{domain: site.example}]}, action: Allow}
  - {name: rest, match: {}, action: Allow}
"""
POLICIES = (
    _cluster(
        "admin",
        "Admin",
        """
  - {name: never, match: {destinations: [{domain: admin.example}]}, action: Block}
  - {name: further, match: {destinations: [{domain: passed.example}]}, action: Pass}
  - {name: skipped, match: {destinations: [{domain: passed.example}]}, action: Block}
""",
    )
    + policy(APPLICATION)
    + policy(
        STRICT,
        name="strict",
        pod="strict",
        spec="names: {missingSNI: Block, encryptedClientHello: Block, hostMismatch: Block}",
    )
    + _cluster(
        "baseline", "Baseline", "  - {name: last, match: {destinations: [{domain: baseline.example}]}, action: Block}"
    )
)


def speak_postgres(client: socket.socket, arrival: Arrival) -> None:
    """Reads an SSLRequest and says yes."""
    arrival.requests.append(client.recv(8).hex())
    client.sendall(b"S")
    client.recv(1)


def speak_secret(client: socket.socket, arrival: Arrival) -> None:
    """Must never be heard."""
    client.sendall(b"secret")


asked: list[str] = []
"""What the upstream proxies were asked for. Whatever that was, they answer themselves, as an HTTP server would."""


def speak_connect(client: socket.socket, arrival: Arrival) -> None:
    """An HTTP proxy that knows CONNECT."""
    head = b""
    while b"\r\n\r\n" not in head:
        head += client.recv(4096)
    asked.append(head.split(b"\r\n")[0].decode())
    client.sendall(b"HTTP/1.1 200 here you are\r\n\r\n")
    speak_http(client, arrival)


def speak_socks(client: socket.socket, arrival: Arrival) -> None:
    """A SOCKS5 proxy."""
    stream = client.makefile("rb", buffering=0)
    stream.read(3)
    client.sendall(b"\x05\x00")
    kind = stream.read(4)[3]
    host = stream.read({1: 4, 4: 16}.get(kind) or stream.read(1)[0])
    (port,) = struct.unpack("!H", stream.read(2))
    name = host.decode() if kind == 3 else socket.inet_ntop(socket.AF_INET if kind == 1 else socket.AF_INET6, host)
    asked.append(f"{name} {port}")
    client.sendall(b"\x05\x00\x00\x01" + bytes(6))
    speak_http(client, arrival)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Stage(
        tmp_path_factory.mktemp("verdicts"), pods=("a", "b", "strict"), servers=("web", "other", "via")
    ) as built:
        built.serve("web", {HTTP: speak_http, HTTPS: speak_https, MAIL: speak_smtp, POSTGRES: speak_postgres})
        built.serve("other", {8080: speak_http})
        built.serve("via", {CONNECT: speak_connect, SOCKS: speak_socks})
        built.serve("node", {SECRET: speak_secret}, ("0.0.0.0", "::"))
        free = pod_objects({"b": built["b"].addresses}).replace("shop", "tools")
        built.write("pods.yaml", pod_objects({name: built[name].addresses for name in ("a", "strict")}) + free)
        built.write("policy.yaml", POLICIES)
        yield built


@pytest.fixture(scope="module")
def instance(stage: Stage) -> Instance:
    return stage.start("--workers", "1", "--metrics", "127.0.0.1:9090")


Act = Callable[[Stage, Namespace, str], list[str]]
Recorded = tuple[str, str, str | None]


def http(name: str, port: int = HTTP) -> Act:
    return lambda stage, pod, address: [get(pod, address, port, name).end]


def https(name: str | None) -> Act:
    return lambda stage, pod, address: [get_tls(pod, address, HTTPS, name).end]


def several(*names: str) -> Act:
    return lambda stage, pod, address: [answer.end for answer in get_several(pod, address, HTTP, names)]


def raw(port: int, *sent: bytes, wait: bool = False) -> Act:
    """Sends one thing after the other, each after an answer; how it ended, or the first line that came back to the last."""

    def act(stage: Stage, pod: Namespace, address: str) -> list[str]:
        try:
            with pod.connect(address, port, timeout_s=PATIENCE_S) as connection:
                received = connection.recv(4096) if wait else b""
                for data in sent:
                    connection.sendall(data)
                    received = connection.recv(4096)
        except TimeoutError:
            return ["silence"]
        except ConnectionResetError:
            return ["reset"]
        return [received.split(b"\r\n")[0].decode("latin-1") if received else "closed"]

    return act


def mail(stage: Stage, pod: Namespace, address: str) -> list[str]:
    return [greet(pod, address, MAIL).end]


@dataclass(frozen=True)
class Case:
    """ends: None for any. seen: the server and whose address it saw (pod, node), None: nothing of a blocked name.
    record: verdict, reason, rule. asked: what an upstream proxy was asked for."""

    act: Act
    ends: tuple[str, ...] | None
    seen: tuple[tuple[str, str], ...] | None
    record: Recorded | None
    pod: str = "a"
    protocol: str = "HTTP/1"
    audit: str | None = None
    asked: str | None = None


WEB, NOTHING = (("web", "pod"),), ()
ENCRYPTED = hello(b"site.example", extension(ECH, bytes(64)))
SSL_REQUEST = struct.pack("!ii", 8, 80877103)
TWO_HOSTS = b"GET / HTTP/1.1\r\nHost: site.example\r\nHost: reset.example\r\n\r\n"
FRONTED = b"GET http://reset.example/ HTTP/1.1\r\nHost: site.example\r\n\r\n"


def _matched(verdict: str, rule: str) -> Recorded:
    return verdict, "RuleMatched", rule


def cases(version: int) -> dict[str, Case]:
    v = version
    allow, block, route = "Allow", "Block", "Route"
    return {
        "Allow, HTTP": Case(http("site.example"), ("answered",), WEB, _matched(allow, "site")),
        "Allow, TLS": Case(https("x.site.example"), ("answered",), WEB, _matched(allow, "site"), protocol="TLS"),
        "Block, HTTP": Case(http("reset.example"), ("reset",), NOTHING, _matched(block, "reset")),
        "Block, TLS": Case(https("reset.example"), ("reset",), NOTHING, _matched(block, "reset"), protocol="TLS"),
        "Drop": Case(raw(HTTP, _request("drop.example")), ("silence",), NOTHING, None),
        "Respond, HTTP": Case(
            raw(HTTP, _request("respond.example")),
            ("HTTP/1.1 451 Unavailable For Legal Reasons",),
            NOTHING,
            _matched(block, "respond"),
        ),
        "Respond, TLS": Case(https("respond.example"), ("alert",), NOTHING, _matched(block, "respond"), protocol="TLS"),
        "Route to an address": Case(
            http(f"route{v}.example"), ("answered",), (("other", "pod"),), _matched(route, f"to-other{v}")
        ),
        "Route to the other family": Case(
            http(f"route{10 - v}.example"), ("answered",), (("other", "node"),), _matched(route, f"to-other{10 - v}")
        ),
        "Route via HTTP CONNECT": Case(
            http(f"connect{v}.example"),
            ("answered",),
            (("via", "pod"),),
            _matched(route, f"via-connect{v}"),
            asked=f"CONNECT connect{v}.example:80 HTTP/1.1",
        ),
        "Route via SOCKS5": Case(
            http(f"socks{v}.example"),
            ("answered",),
            (("via", "pod"),),
            _matched(route, f"via-socks{v}"),
            asked=f"socks{v}.example 80",
        ),
        "Route to an address via SOCKS5": Case(
            http(f"both{v}.example"),
            ("answered",),
            (("via", "pod"),),
            _matched(route, f"to-and-via{v}"),
            asked="192.0.2.11 8080" if v == 4 else "2001:db8::11 8080",
        ),
        "Route to loopback": Case(http(f"loopback{v}.example"), ("reset",), NOTHING, (block, "DialDenied", None)),
        "Route to the node": Case(http(f"node{v}.example"), ("reset",), NOTHING, (block, "DialDenied", None)),
        "Audit": Case(http("trial.example"), ("answered",), WEB, _matched(allow, "site"), audit="Block"),
        "tier Admin blocks what the application allows": Case(
            http("admin.example"), ("reset",), NOTHING, _matched(block, "never")
        ),
        "Pass skips the rest of its tier": Case(
            http("passed.example"), ("answered",), WEB, _matched(allow, "in-application")
        ),
        "Pass to tier Baseline": Case(http("baseline.example"), ("reset",), NOTHING, _matched(block, "last")),
        "Pass to the default action": Case(http("late.example"), ("answered",), WEB, (allow, "DefaultAction", None)),
        "egress.sourceAddress Node": Case(
            http("egress.example"), ("answered",), (("web", "node"),), _matched(allow, "node-source")
        ),
        "second request, another name": Case(
            several("site.example", "reset.example"), ("answered", "reset"), WEB, _matched(block, "reset")
        ),
        "second request, the same rule": Case(
            several("site.example", "x.site.example"), ("answered", "answered"), WEB, _matched(allow, "site")
        ),
        "pipelined requests": Case(
            raw(HTTP, _request("site.example") + _request("reset.example")), ("reset",), None, _matched(block, "reset")
        ),
        "a server that speaks first": Case(mail, ("answered",), WEB, _matched(allow, "mail"), protocol="ServerFirst"),
        "SMTP client that speaks first": Case(
            raw(MAIL, b"EHLO a\r\n"), None, WEB, _matched(allow, "mail"), protocol="SMTP"
        ),
        "PostgreSQL SSLRequest": Case(
            raw(POSTGRES, SSL_REQUEST), ("S",), WEB, _matched(allow, "mail"), protocol="PostgresSSLRequest"
        ),
        "no name, missingSNI Continue": Case(https(None), ("reset",), NOTHING, _matched(block, "rest"), protocol="TLS"),
        "no name, missingSNI Block": Case(
            https(None), ("reset",), NOTHING, (block, "NameMissing", "site"), "strict", "TLS"
        ),
        "encrypted hello": Case(
            raw(HTTPS, ENCRYPTED), ("reset",), NOTHING, (block, "EncryptedClientHello", "site"), "strict", "TLS"
        ),
        "two Hosts": Case(
            raw(HTTP, TWO_HOSTS),
            ("HTTP/1.1 421 Misdirected Request",),
            NOTHING,
            (block, "HostMismatch", "never"),
            "strict",
        ),
        "absolute form and Host differ": Case(
            raw(HTTP, FRONTED),
            ("HTTP/1.1 421 Misdirected Request",),
            NOTHING,
            (block, "HostMismatch", "never"),
            "strict",
        ),
        "no policy selects the pod": Case(http("reset.example"), ("answered",), WEB, None, "b"),
    }


def _request(name: str) -> bytes:
    return f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n".encode()


DROPPED = "drop.example"
_good: list[str] = []
ALL = [(what, version) for version in VERSIONS for what in cases(version)]


@pytest.mark.parametrize(("what", "version"), ALL, ids=[f"{what}, IPv{version}" for what, version in ALL])
def test_a_verdict_is_what_client_server_and_record_see(
    stage: Stage, instance: Instance, figure: Figure, what: str, version: int
) -> None:
    case = cases(version)[what]
    pod, address = stage[case.pod], address_of(stage["web"], version)
    told, begun, said = len(_records(instance)), len(stage.journal), len(asked)
    ends = case.act(stage, pod, address)
    if case.ends is not None:
        assert tuple(ends) == case.ends
    wanted = told + (case.record is not None)
    assert eventually(lambda: len(_records(instance)) >= wanted), "no flow record"
    stage.journal.wait_ended(5.0, begun, len(case.seen or ()))
    arrivals = stage.journal.arrivals(begun)
    nodes = {*SERVER_GATEWAYS, *POD_GATEWAYS}
    seen = tuple(
        (each.server, "pod" if each.source in pod.addresses else "node" if each.source in nodes else each.source)
        for each in arrivals
    )
    if case.seen is None:
        assert "reset.example" not in [each.name for each in arrivals]
    else:
        assert seen == case.seen
    if case.asked:
        assert asked[said:] == [case.asked]
    new = _records(instance)[told:]
    assert [_told(each) for each in new] == ([case.record] if case.record else [])
    for each in new:
        assert each["protocol"] == case.protocol
        assert (each.get("audit") or {}).get("verdict") == case.audit or case.audit is None
        assert each["source"]["address"] == address_of(pod, version)
        assert each["destination"]["address"] == address
    _good.append(what)
    figure(
        "verdicts end to end", f"{len(_good)} of {len(ALL)} as the policy says, at client, servers and in the record"
    )


def _records(instance: Instance) -> list[dict[str, Any]]:
    """But for those of dropped connections, which end when their time is over."""
    return [record for record in records(instance) if record["destination"]["name"] != DROPPED]


def _told(record: dict[str, Any]) -> Recorded:
    return record["verdict"], record["reason"], record["policy"] and record["policy"]["rule"]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_kernel_decides_udp_icmp_and_quic(stage: Stage, instance: Instance, figure: Figure, version: int) -> None:
    pod, web = stage["a"], stage["web"]
    address, ip = address_of(web, version), {4: "ip", 6: "ip6"}[version]
    arrived = tap(web, f"{ip} saddr {address_of(pod, version)} udp dport {{ 53, 54, 443 }}")
    counts = [stage.counter(name) for name in ("quic_rejected",)]
    assert _datagram(pod, web, address, 53) == "answered"
    assert arrived() == 1
    assert _datagram(pod, web, address, 54) in ("EACCES", "EHOSTUNREACH", "ECONNREFUSED", "EPERM")
    assert _datagram(pod, web, address, 443) == "ECONNREFUSED"
    assert arrived() == 1
    assert [stage.counter("quic_rejected")] == [counts[0] + 1]
    assert ping(pod, address)
    blocked = tap(web, f"{ip} saddr {address_of(stage['strict'], version)} meta l4proto udp")
    assert _datagram(stage["strict"], web, address, 443) == "ECONNREFUSED"
    assert _datagram(stage["strict"], web, address, 53) == "answered"
    assert blocked() == 1
    figure(
        f"UDP, ICMP and QUIC in the kernel, IPv{version}",
        "allowed passes, refused says so, QUIC is told at once; 0 packets more at the peer",
    )


def _datagram(pod: Namespace, server: Namespace, address: str, port: int) -> str:
    """answered, silence, or the error that comes back, of one datagram to an echo server at port."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with server.open_socket(family, socket.SOCK_DGRAM) as echo, pod.open_socket(family, socket.SOCK_DGRAM) as client:
        echo.bind((address, port))
        echo.settimeout(PATIENCE_S)
        client.settimeout(PATIENCE_S)
        client.connect((address, port))
        try:
            client.send(b"hello")
            if port == 53:
                data, peer = echo.recvfrom(100)
                echo.sendto(data, peer)
            client.recv(100)
        except TimeoutError:
            return "silence"
        except OSError as err:
            return errno.errorcode[err.errno or 0]
        return "answered"


def test_dropped_connections_are_recorded_when_they_end(instance: Instance) -> None:
    assert instance.stop() == 0
    dropped = [record for record in records(instance) if record["destination"]["name"] == DROPPED]
    assert [_told(record) for record in dropped] == [_matched("Block", "drop")] * len(VERSIONS)
