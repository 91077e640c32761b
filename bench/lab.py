"""A private sandbox with three network namespaces in a row: pod (client) - node (proxy) - server (origin).

The node forwards. For peers it also hands the pod's TCP connections to a listener on LISTEN_PORT by TPROXY;
Pellucid installs its own rules.
Nothing of the host is touched, and no name collides with another run's."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

POD, NODE, SERVER = "pod", "node", "server"
POD_CIDR = "10.244.0.0/24"
SERVER_CIDR = "192.0.2.8/29"  # of the drivers' destinations
SERVER_ADDRESSES = tuple(f"192.0.2.{i}" for i in range(10, 14))
PROBE_ADDRESS = "192.0.2.20"  # not among them
LISTEN_PORT = 15001
RUN = Path("/run/bench")  # of the sandbox; every user may enter it
CGROUPS = Path("/run/cgroup")
CONGESTION_CONTROL = os.environ.get("BENCH_CC", "reno")  # pinned: it decides the ratios of bulk transfers

CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000

DIVERT = f"""
table inet bench {{
  chain intercept {{
    type filter hook prerouting priority mangle; policy accept;
    tcp flags & (syn | ack) != syn socket transparent 1 meta mark set 0x1 accept
    ip saddr {POD_CIDR} meta l4proto tcp tproxy ip to 127.0.0.1:{LISTEN_PORT} meta mark set 0x1 accept
    ip saddr {POD_CIDR} meta l4proto tcp reject with tcp reset
  }}
}}
"""


# What every node has that runs Kubernetes, Docker or a stateful firewall: connections are tracked.
TRACK = "table inet track { chain forward { type filter hook forward priority filter; ct state invalid counter; }; }"


def run(command: str, stdin: str | None = None) -> str:
    """Run a shell command and return its output. Raises RuntimeError with what it complained about."""
    result = subprocess.run(command, check=False, shell=True, input=stdin, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{command}: exit {result.returncode}: {result.stderr.strip()}")
    return result.stdout


def enter_sandbox() -> None:
    """Move this process into mount and network namespaces of its own, with an empty /run. Needs root: Squid changes users."""
    if os.geteuid() != 0:
        raise SystemExit("bench: needs root (namespaces, cgroups, and peers that change users)")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS | CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare: new mount and network namespaces are refused here")
    run("mount --make-rprivate /")
    run("mount -t tmpfs -o mode=755 bench /run")
    RUN.mkdir(mode=0o755)
    CGROUPS.mkdir()
    run(f"mount -t cgroup2 bench {CGROUPS}")


def down() -> None:
    """No namespace is left, and so no rule, route or interface of one."""
    for namespace in (POD, NODE, SERVER):
        if Path("/run/netns", namespace).exists():
            run(f"ip netns del {namespace}")


def up(*, divert: bool, rules: str = "") -> None:
    """Fresh namespaces stand and are joined, with these rules on the node.

    With divert the pod's TCP connections go to the listener, or are reset if there is none."""
    down()
    for namespace in (POD, NODE, SERVER):
        run(f"ip netns add {namespace}")
        run(f"ip -n {namespace} link set lo up")
    _link(POD, "p0", "10.244.0.2", "vpod", "10.244.0.1")
    _link(SERVER, "s0", SERVER_ADDRESSES[0], "vsrv", "192.0.2.1")
    for address in (*SERVER_ADDRESSES[1:], PROBE_ADDRESS):
        run(f"ip -n {SERVER} addr add {address}/24 dev s0")
    for namespace in (POD, NODE, SERVER):
        run(
            f"ip netns exec {namespace} sysctl -qw net.ipv4.ip_local_port_range='1024 65535' net.core.somaxconn=8192 "
            f"net.ipv4.tcp_max_syn_backlog=8192 net.ipv4.tcp_congestion_control={CONGESTION_CONTROL}"
        )
    run(
        f"ip netns exec {NODE} sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0"
    )
    if divert:
        run(f"ip -n {NODE} rule add fwmark 0x1 lookup 100")
        run(f"ip -n {NODE} route add local default dev lo table 100")
        rules = DIVERT + rules
    if rules:
        run(f"ip netns exec {NODE} nft -f -", stdin=rules)


def _link(namespace: str, device: str, address: str, node_device: str, node_address: str) -> None:
    """Join a namespace to the node, which becomes its gateway."""
    run(f"ip link add {device} netns {namespace} type veth peer name {node_device} netns {NODE}")
    run(f"ip -n {namespace} addr add {address}/24 dev {device}")
    run(f"ip -n {namespace} link set {device} up")
    run(f"ip -n {NODE} addr add {node_address}/24 dev {node_device}")
    run(f"ip -n {NODE} link set {node_device} up")
    run(f"ip -n {namespace} route add default via {node_address}")
