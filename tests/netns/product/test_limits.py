"""A pod that has all the connections it may have: its next ones are refused, its old ones and other pods' go on."""

from __future__ import annotations

import contextlib
import resource
import socket
import time
from pathlib import Path

from pellucid_cli.lab.clients import get
from pellucid_cli.lab.instance import Instance
from pellucid_cli.lab.servers import speak_http
from pellucid_cli.lab.topology import Namespace
from pellucid_proxy.agent.status import read_status
from pellucid_proxy.capacity import within
from pellucid_proxy.settings import NodeSettings
from tests.netns.world import eventually

from .conftest import Figure
from .stage import INSTALLATION, CountingServer, Load, Stage, metric, policy, wait_for_records

METRICS = "127.0.0.1:9464"
FIRST_BYTES_S = NodeSettings(scope=()).first_bytes_timeout_s

LIMIT, TOO_MANY = 20, 10
NAME = "site.example"
RULES = policy(f"  - {{name: site, match: {{destinations: [{{domain: {NAME}}}]}}, action: Allow}}", pod="a") + policy(
    f"  - {{name: site, match: {{destinations: [{{domain: {NAME}}}]}}, action: Allow}}", name="q", pod="b"
)
REQUEST = f"GET / HTTP/1.1\r\nHost: {NAME}\r\n\r\n".encode()


def _answered(connection: socket.socket) -> bool:
    """Whether one more request on it gets an answer; False: it is reset or ended."""
    try:
        connection.sendall(REQUEST)
        return connection.recv(4096).startswith(b"HTTP/1.1 200")
    except ConnectionError:
        return False


def _open(pod: Namespace, address: str) -> socket.socket:
    connection = pod.connect(address, 80)
    connection.settimeout(20)
    return connection


def _admitted(pod: Namespace, address: str) -> bool:
    """Whether a new connection gets an answer. A reset may be there before connect() returns."""
    try:
        with _open(pod, address) as connection:
            return _answered(connection)
    except ConnectionResetError:
        return False


def test_past_its_limit_a_pod_gets_no_new_connection_and_keeps_the_old(tmp_path: Path, figure: Figure) -> None:
    with Stage(tmp_path) as stage:
        stage.serve("web", {80: speak_http})
        stage.write("policy.yaml", RULES)
        stage.write(
            "installation.yaml", INSTALLATION.replace("spec: {", f"spec: {{limits: {{connectionsPerPod: {LIMIT}}}, ")
        )
        a, b, web = stage["a"], stage["b"], stage["web"]
        with stage.run("--workers", "1") as instance:
            # Silent ones of both families; only their own requests tell which were admitted
            opened = [_open(a, web.addresses[n % 2]) for n in range(LIMIT)]
            admitted = [_answered(each) for each in opened].count(True)
            refused = [_admitted(a, web.addresses[n % 2]) for n in range(TOO_MANY)].count(False)
            arrived = len(stage.journal.arrivals())
            others = sum(get(b, web.addresses[n % 2], 80, NAME).end == "answered" for n in range(5))
            alive = [_answered(each) for each in opened].count(True)
            told = [each for each in wait_for_records(instance, TOO_MANY) if each["reason"] == "LimitReached"]
            opened.pop().close()
            again = eventually(lambda: get(a, web.ipv4, 80, NAME).end == "answered", 10)
            for each in opened:
                each.close()
    figure(
        "limit of a pod",
        f"{admitted} of {LIMIT} admitted, {refused} of {TOO_MANY} more reset, {alive} of {LIMIT} old ones go on, "
        f"{others} of 5 of another pod answered, {len(told)} recorded as LimitReached",
    )
    assert (admitted, refused, alive, others, len(told)) == (LIMIT, TOO_MANY, LIMIT, 5, TOO_MANY)
    assert arrived <= LIMIT
    assert {each["source"]["pod"] for each in told} == {"a"}
    assert again


def test_pending_connections_of_one_pod_cost_no_other_pod_its_own(tmp_path: Path, figure: Figure) -> None:
    """Connections that say half a head, more than a pod may have of them: its next ones are refused until the first have timed out."""
    most = within(NodeSettings(scope=()), resource.getrlimit(resource.RLIMIT_NOFILE)[1])[0].max_pending_per_pod
    extra = 50
    with Stage(tmp_path) as stage:
        stage.serve("web", {80: speak_http})
        stage.write("policy.yaml", RULES)
        a, b, web = stage["a"], stage["b"], stage["web"]
        with stage.run("--workers", "1", "--metrics", METRICS), contextlib.ExitStack() as opened:
            started = time.monotonic()
            for n in range(most + extra):
                with contextlib.suppress(ConnectionError):  # refused ones are reset
                    connection = opened.enter_context(_open(a, web.addresses[n % 2]))
                    connection.sendall(b"GET / HTTP/1.1\r\nHo")
            took = time.monotonic() - started
            assert eventually(lambda: metric(stage, 'connections_shed_total{limit="pending_per_pod"}') > 0, 5)
            pending = metric(stage, "connections_pending")
            others = sum(get(b, web.addresses[n % 2], 80, NAME).end == "answered" for n in range(20))
            again = eventually(lambda: get(a, web.ipv4, 80, NAME).end == "answered", 30)
            assert eventually(lambda: metric(stage, "connections_pending") == 0, 30)
    figure(
        "pending connections of a pod",
        f"{most + extra} opened in {took:.1f} s, {pending:.0f} pending of at most {most}, {others} of 20 of another pod answered",
    )
    assert took < FIRST_BYTES_S, "the first had timed out already"
    assert pending <= most
    assert (others, again) == (20, True)


def test_a_pods_rate_is_limited_in_the_kernel_and_other_pods_notice_nothing(tmp_path: Path, figure: Figure) -> None:
    rate, seconds = 100, 3.0
    with Stage(tmp_path) as stage, CountingServer(stage["web"], 80) as server:
        stage.write("policy.yaml", RULES)
        stage.write(
            "installation.yaml", INSTALLATION.replace("spec: {", f"spec: {{limits: {{connectionRatePerPod: {rate}}}, ")
        )
        a, b, web = stage["a"], stage["b"], stage["web"]
        with stage.run("--workers", "1"):
            before, began = server.accepted, time.monotonic()
            answered = 0
            with Load(a, [web.ipv4], 80, NAME, parallel=8) as load:
                while time.monotonic() - began < seconds:
                    answered += get(b, web.addresses[answered % 2], 80, NAME).end == "answered"
            took = time.monotonic() - began
            of_a = server.accepted - before - answered
            dropped = stage.counter("rate_limited")
    figure(
        "rate of a pod",
        f"{of_a} arrived in {took:.1f} s at a limit of {rate}/s, {dropped} SYNs dropped; {answered} of another pod answered",
    )
    assert rate * seconds / 2 < of_a <= rate * (took + 2)
    assert dropped > 0
    assert set(load.ended) == {"ok"}, "later, but none refused"
    assert answered > rate, "the other pod is not held to what the first one leaves"


def test_past_the_limit_of_a_worker_new_connections_wait_and_live_ones_go_on(tmp_path: Path, figure: Figure) -> None:
    with Stage(tmp_path) as stage:
        stage.serve("web", {80: speak_http})
        stage.write("policy.yaml", RULES)
        stage.write(
            "installation.yaml",
            INSTALLATION.replace("spec: {", f"spec: {{limits: {{connections: {LIMIT}, connectionsPerPod: {LIMIT}}}, "),
        )
        a, b, web = stage["a"], stage["b"], stage["web"]
        with stage.run("--workers", "1", "--metrics", METRICS):
            live = [_open(a, web.addresses[n % 2]) for n in range(LIMIT)]
            assert all(map(_answered, live))
            waiting = [_open(b, web.addresses[n % 2]) for n in range(TOO_MANY)]
            for each in waiting:
                each.sendall(REQUEST)
            assert eventually(lambda: metric(stage, "accept_pauses_total") > 1, 10)
            arrived = len(stage.journal.arrivals())
            for each in live[TOO_MANY:]:
                each.close()
            served = [each.recv(4096).startswith(b"HTTP/1.1 200") for each in waiting].count(True)
            going_on = [_answered(each) for each in live[:TOO_MANY]].count(True)
            for each in (*live, *waiting):
                each.close()
    figure(
        "limit of a worker",
        f"{going_on} of {TOO_MANY} live connections go on, {served} of {TOO_MANY} new ones wait and are served when there is room",
    )
    assert arrived == LIMIT
    assert (going_on, served) == (TOO_MANY, TOO_MANY)


def _strains(instance: Instance) -> tuple[str, ...]:
    return read_status(str(instance.state)).strains


def _tracked(node: Namespace, what: str) -> int:
    return int(node.call(Path(f"/proc/sys/net/netfilter/nf_conntrack_{what}").read_text))


def _crowd(pod: Namespace, address: str, entries: int) -> None:
    """Datagrams from pod make so many entries of connection tracking, one a destination port."""

    def send() -> None:
        for _ in range(-(-entries // 65_000)):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                for port in range(1, 65_001):
                    with contextlib.suppress(OSError):  # there is no room
                        sender.sendto(b"", (address, port))

    pod.call(send)


def test_what_the_proxy_carries_needs_no_room_in_connection_tracking(tmp_path: Path, figure: Figure) -> None:
    """The table is full of another pod's flows, which no policy selects and the kernel tracks: the proxy's own are untracked."""
    with Stage(tmp_path) as stage, CountingServer(stage["web"], 80):
        stage.write(
            "policy.yaml", policy(f"  - {{match: {{destinations: [{{domain: {NAME}}}]}}, action: Allow}}", pod="a")
        )
        a, b, web, node = stage["a"], stage["b"], stage["web"], stage.node
        node.sysctl(net__netfilter__nf_conntrack_udp_timeout=600)
        stage["other"].nft(
            "table inet deaf { chain in { type filter hook prerouting priority raw; meta l4proto udp drop; }; }"
        )
        with stage.run("--workers", "1") as instance:
            most = _tracked(node, "max")
            _crowd(b, stage["other"].ipv4, most)
            full = _tracked(node, "count")
            answered = sum(get(a, web.addresses[n % 2], 80, NAME).end == "answered" for n in range(50))
            strained = [each for each in _strains(instance) if "connection tracking" in each]
            node.run(["conntrack", "-F"])
            assert not [each for each in _strains(instance) if "connection tracking" in each]
    figure(
        "connection tracking full",
        f"{full:,} of {most:,} entries; {answered} of 50 connections through the proxy answered",
    )
    assert full > 0.95 * most
    assert strained
    assert answered == 50
