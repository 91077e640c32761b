"""The cluster's networks: namespaces, a bridge that also routes, an internet behind it. Nothing is added to the machine's own network."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

from .plan import INTERNET4, INTERNET6, INTERNET_HOSTS, LAN4, LAN6, POD4, POD6, SERVICES4, SERVICES6, Node, Plan

LAN, INTERNET = "lan", "internet"
_FORWARD = {"net.ipv4.ip_forward": "1", "net.ipv6.conf.all.forwarding": "1"}
_NO_DELAY = {"net.ipv6.conf.all.accept_dad": "0", "net.ipv6.conf.default.accept_dad": "0"}


def make(plan: Plan) -> None:
    """All namespaces are there and reach each other as plan.py says."""
    for name in (LAN, INTERNET, *(node.name for node in plan.nodes)):
        _run("ip", "netns", "add", plan.namespace(name))
        _sysctl(plan, name, _NO_DELAY)
        _ip(plan, name, ["link set lo up"])
    _ip(plan, LAN, _router(plan))
    _sysctl(plan, LAN, _FORWARD)
    for node in plan.nodes:
        routes = [
            *(f"route add {other.pods4} via {other.ipv4}" for other in plan.worker_nodes if other != node),
            *(f"-6 route add {other.pods6} via {other.ipv6}" for other in plan.worker_nodes if other != node),
        ]
        own = [f"addr add {node.ipv4}/24 dev eth0", f"addr add {node.ipv6}/64 dev eth0", "link set eth0 up"]
        default = [f"route add default via {LAN4}.254", f"-6 route add default via {LAN6}:fe"]
        _ip(plan, node.name, [*own, *default, *routes])
        if node.index:
            _sysctl(plan, node.name, _FORWARD)
            _masquerade(plan, node)
    _ip(plan, INTERNET, _internet())


def _router(plan: Plan) -> Iterator[str]:
    yield from ("link add br0 type bridge", f"addr add {LAN4}.254/24 dev br0", f"addr add {LAN6}:fe/64 dev br0")
    yield "link set br0 up"
    for node in plan.nodes:
        yield f"link add {node.name} type veth peer name eth0 netns {plan.namespace(node.name)}"
        yield f"link set {node.name} master br0 up"
    for node in plan.worker_nodes:
        yield f"route add {node.pods4} via {node.ipv4}"
        yield f"-6 route add {node.pods6} via {node.ipv6}"
    yield f"link add internet type veth peer name eth0 netns {plan.namespace(INTERNET)}"
    yield from (f"addr add {INTERNET4}.254/24 dev internet", f"addr add {INTERNET6}:fe/64 dev internet")
    yield "link set internet up"


def _internet() -> Iterator[str]:
    for host in INTERNET_HOSTS:
        yield from (f"addr add {INTERNET4}.{host}/24 dev eth0", f"addr add {INTERNET6}:{host}/64 dev eth0")
    yield "link set eth0 up"
    yield from (f"route add default via {INTERNET4}.254", f"-6 route add default via {INTERNET6}:fe")


_MASQUERADE = f"""table inet e2e {{
  chain post {{
    type nat hook postrouting priority srcnat;
    ip saddr {POD4}.0.0/16 ip daddr != {{ {POD4}.0.0/16, {LAN4}.0/24, {SERVICES4} }} masquerade
    ip6 saddr {POD6}::/48 ip6 daddr != {{ {POD6}::/48, {LAN6}:/64, {SERVICES6} }} masquerade
  }}
}}
"""
"""What leaves the cluster leaves as the node, as on most real ones."""


def forget(plan: Plan, node: Node) -> None:
    """A worker's kernel holds no rule and no connection but what it had at first. The node is stopped."""
    for command in ("nft flush ruleset", "ip rule flush", "ip -6 rule flush", "conntrack -F"):
        _in(plan, node.name, *command.split())
    for version, tables in (("-4", {"32766": "main", "32767": "default"}), ("-6", {"32766": "main"})):
        for pref, table in tables.items():
            _in(plan, node.name, "ip", version, "rule", "add", "pref", pref, "lookup", table)
    _masquerade(plan, node)


def _masquerade(plan: Plan, node: Node) -> None:
    _in(plan, node.name, "nft", "-f", "-", text=_MASQUERADE)


def remove(plan: Plan) -> None:
    """None of it is there; whatever still runs in it is ended. May be called in any state."""
    for name in (INTERNET, *(node.name for node in plan.nodes), LAN):
        namespace = plan.namespace(name)
        if not Path("/run/netns", namespace).exists():
            continue
        for pid in _run("ip", "netns", "pids", namespace).split():
            subprocess.run(["kill", "-KILL", pid], capture_output=True)
        _run("ip", "netns", "del", namespace)


def _ip(plan: Plan, name: str, lines: Iterator[str] | list[str]) -> None:
    for line in lines:  # one by one: a batch cannot mix families
        _run("ip", "-n", plan.namespace(name), *line.split())


def _sysctl(plan: Plan, name: str, values: dict[str, str]) -> None:
    pairs = (f"{key}={value}" for key, value in values.items())
    _in(plan, name, "sysctl", "-qw", *pairs)


def _in(plan: Plan, name: str, *command: str, text: str = "") -> None:
    _run("ip", "netns", "exec", plan.namespace(name), *command, text=text)


def _run(*command: str, text: str = "") -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
