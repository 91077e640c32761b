"""Pods – a node – servers, as network namespaces joined by veth pairs. Needs the rights that `sandbox.enter()` gives.

    pod a ──┐                    ┌── server web
    pod b ──┤ node (forwarding)  ├── server mail
    pod c ──┘                    └── …

Every pod and server has its addresses as /32 or /128 and the node as its gateway, so everything crosses the node's IP layer, as with
Calico or the ptp plugin. With bridge=True pods share the bridge cni0 instead, as with flannel.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, ParamSpec, Self, TypeVar

from .sandbox import CLONE_NEWNET

P = ParamSpec("P")
R = TypeVar("R")

POD_GATEWAYS = ("10.244.1.1", "fd00:244:1::1")
POD_CIDRS = ("10.244.1.0/24", "fd00:244:1::/64")
SERVER_GATEWAYS = ("192.0.2.1", "2001:db8::1")
"""The node's addresses towards pods and towards servers; servers see the latter when the node speaks for itself."""

_SYSCTLS = {
    "net.ipv4.conf.all.rp_filter": "0",
    "net.ipv4.conf.default.rp_filter": "0",
    "net.ipv4.conf.all.src_valid_mark": "0",
    "net.ipv4.conf.default.src_valid_mark": "0",
    "net.ipv4.conf.all.send_redirects": "0",
    "net.ipv4.conf.default.send_redirects": "0",
    "net.ipv6.conf.default.accept_dad": "0",  # addresses serve at once
    "net.ipv6.conf.all.accept_dad": "0",
}
"""A new namespace inherits some of these from the machine; here they are always the same."""
_NODE_SYSCTLS = {
    "net.ipv4.ip_forward": "1",
    "net.ipv6.conf.all.forwarding": "1",
    "net.bridge.bridge-nf-call-iptables": "0",
    "net.bridge.bridge-nf-call-ip6tables": "0",
}

_libc = ctypes.CDLL(None, use_errno=True)
Stream = int | IO[bytes] | None


@dataclass(frozen=True)
class Namespace:
    """A network namespace by its name. addresses as given, of both families; interface: the node's end of its veth pair."""

    name: str
    addresses: tuple[str, ...] = ()
    interface: str = ""
    _children: list[subprocess.Popen[bytes]] = field(default_factory=list, repr=False, compare=False)

    @property
    def path(self) -> str:
        """The file that holds the namespace open, for setns(2) and nsenter(1)."""
        return f"/run/netns/{self.name}"

    @property
    def ipv4(self) -> str:
        """Its first IPv4 address. Raises StopIteration where there is none."""
        return next(a for a in self.addresses if ":" not in a)

    @property
    def ipv6(self) -> str:
        """Its first IPv6 address. Raises StopIteration where there is none."""
        return next(a for a in self.addresses if ":" in a)

    def run(
        self,
        command: Sequence[str],
        *,
        stdin: str = "",
        check: bool = True,
        timeout_s: float = 30.0,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run command in here to its end. Raises RuntimeError with its error output if check and it fails,
        subprocess.TimeoutExpired if it hangs."""
        done = subprocess.run(
            self._inside(command), input=stdin, capture_output=True, text=True, timeout=timeout_s, env=env, check=False
        )
        if check and done.returncode != 0:
            raise RuntimeError(
                f"{self.name}: {' '.join(command)}: status {done.returncode}: {done.stderr.strip()[-2000:]}"
            )
        return done

    def popen(
        self,
        command: Sequence[str],
        *,
        stdin: Stream = subprocess.DEVNULL,
        stdout: Stream = None,
        stderr: Stream = None,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> subprocess.Popen[bytes]:
        """Start command in here; its process id is the command's own. The topology kills it when it closes."""
        child = subprocess.Popen(
            self._inside(command), stdin=stdin, stdout=stdout, stderr=stderr, env=env, pass_fds=tuple(pass_fds)
        )
        self._children.append(child)
        return child

    def _inside(self, command: Sequence[str]) -> list[str]:
        # Not `ip netns exec`: it mounts /sys anew, which containers forbid.
        return ["nsenter", f"--net={self.path}", "--", *command]

    def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The value of function, called by a thread in here: sockets and child processes it makes belong to this namespace.
        Raises what it raises."""

        def inside() -> R:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if _libc.setns(descriptor, CLONE_NEWNET) != 0:
                    code = ctypes.get_errno()
                    raise OSError(code, os.strerror(code), self.path)
            finally:
                os.close(descriptor)
            return function(*args, **kwargs)

        with ThreadPoolExecutor(1, f"in {self.name}") as threads:  # a new one each time: it never comes back from setns
            return threads.submit(inside).result()

    def open_socket(
        self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, protocol: int = 0
    ) -> socket.socket:
        """A socket of this namespace, for use anywhere in the process. The caller closes it."""
        return self.call(socket.socket, family, kind, protocol)

    def connect(
        self, address: str, port: int, *, source: str | None = None, source_port: int = 0, timeout_s: float = 5.0
    ) -> socket.socket:
        """A TCP connection out of here, with timeout_s on every operation. Raises OSError. The caller closes it."""
        opened = self.open_socket(_family(address))
        try:
            opened.settimeout(timeout_s)
            if source is not None:
                opened.bind((source, source_port))
            opened.connect((address, port))
        except BaseException:
            opened.close()
            raise
        return opened

    def listen(self, address: str, port: int, *, backlog: int = 1024) -> socket.socket:
        """A listening TCP socket in here; "::" does not take IPv4. Raises OSError. The caller closes it."""
        opened = self.open_socket(_family(address))
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if opened.family == socket.AF_INET6:
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            opened.bind((address, port))
            opened.listen(backlog)
        except BaseException:
            opened.close()
            raise
        return opened

    def sysctl(self, **values: str | int) -> None:
        """Set sysctls of this namespace; "__" in a name stands for a dot: sysctl(net__ipv4__ip_forward=1). Raises OSError."""
        self.set_sysctls({name.replace("__", "."): str(value) for name, value in values.items()})

    def set_sysctls(self, values: Mapping[str, str]) -> None:
        """Set sysctls of this namespace by their dotted names. Raises OSError."""

        def write() -> None:
            for name, value in values.items():
                Path("/proc/sys", *name.split(".")).write_text(value)

        self.call(write)

    def nft(self, text: str) -> None:
        """Load text into the nftables of this namespace, in one transaction. Raises RuntimeError with nft's message."""
        self.run(["nft", "-f", "-"], stdin=text)


class Pod(Namespace):
    """A pod: its addresses are in POD_CIDRS unless given."""


class Server(Namespace):
    """A machine outside the cluster."""


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


class Topology:
    """A context manager: inside it the node exists and pods and servers can be added; afterwards nothing of it is left.

    bridge: pods share a bridge. congestion_control: of every namespace; None for the machine's own.
    One at a time in a sandbox: the node is always called node.
    """

    def __init__(self, *, bridge: bool = False, congestion_control: str | None = None) -> None:
        self._bridge = bridge
        self._congestion_control = congestion_control
        self._children: list[subprocess.Popen[bytes]] = []
        self._ipv6 = Path("/proc/sys/net/ipv6").exists()
        self.node = Namespace("node", (*POD_GATEWAYS, *SERVER_GATEWAYS), _children=self._children)
        self.pods: dict[str, Pod] = {}
        self.servers: dict[str, Server] = {}

    def __enter__(self) -> Self:
        self._create(self.node)
        if self._bridge:
            self._ip(
                self.node,
                [
                    "link add cni0 type bridge forward_delay 0",
                    *self._gateway("cni0", "10.244.1.1/24", "fd00:244:1::1/64"),
                ],
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """No process started by popen runs any more and every namespace is gone."""
        for child in self._children:
            child.kill()
        for child in self._children:
            child.wait()
        self._children.clear()
        gone = [*self.pods.values(), *self.servers.values(), self.node]
        self.pods.clear()
        self.servers.clear()
        _batch(["-force"], [f"netns delete {namespace.name}" for namespace in gone if Path(namespace.path).exists()])

    def add_pod(self, name: str, *addresses: str) -> Pod:
        """A pod called name (1-11 characters), by default with the next addresses of 10.244.1.0/24 and fd00:244:1::/64, from 10 on."""
        number = len(self.pods) + 10
        own = addresses or (f"10.244.1.{number}", f"fd00:244:1::{number}")
        pod = Pod(name, own, f"pod-{name}", self._children)
        self._create(pod)
        self.pods[name] = pod
        if self._bridge:
            self._ip(
                self.node,
                [
                    f"link add {pod.interface} type veth peer name eth0 netns {name}",
                    f"link set {pod.interface} master cni0 up",
                ],
            )
            self._ip(pod, self._guest(pod, POD_GATEWAYS, prefixes=(24, 64)))
        else:
            self._attach(pod, POD_GATEWAYS)
        return pod

    def add_server(self, name: str, *addresses: str) -> Server:
        """A server called name (1-11 characters), by default with the next addresses of 192.0.2.0/24 and 2001:db8::/32, from 10 on."""
        number = len(self.servers) + 10
        own = addresses or (f"192.0.2.{number}", f"2001:db8::{number}")
        server = Server(name, own, f"srv-{name}", self._children)
        self._create(server)
        self.servers[name] = server
        self._attach(server, SERVER_GATEWAYS)
        if number == 10:  # the first one is where the node sends what it knows no route for; it does not forward it
            first_of_family = {":" in address: address for address in reversed(own)}
            self._ip(
                self.node,
                [
                    f"route add default via {address} dev {server.interface} onlink"
                    for address in first_of_family.values()
                ],
            )
        return server

    def remove_pod(self, name: str) -> None:
        """The pod is gone, and its addresses are free for another."""
        pod = self.pods.pop(name)
        self._ip(self.node, [f"link delete {pod.interface}"])
        _batch([], [f"netns delete {name}"])

    def _create(self, namespace: Namespace) -> None:
        if len(namespace.interface) > 15:
            raise ValueError(f"{namespace.name}: a name in a topology has at most 11 characters")
        _batch([], [f"netns add {namespace.name}"])
        wanted = _SYSCTLS | _NODE_SYSCTLS if namespace is self.node else _SYSCTLS
        values = {name: value for name, value in wanted.items() if Path("/proc/sys", *name.split(".")[:2]).exists()}
        if self._congestion_control is not None:
            values["net.ipv4.tcp_congestion_control"] = self._congestion_control
        namespace.set_sysctls(values)
        self._ip(namespace, ["link set lo up"])

    def _attach(self, guest: Namespace, gateways: tuple[str, str]) -> None:
        """Join guest to the node by a veth pair of its own."""
        self._ip(
            self.node,
            [
                f"link add {guest.interface} type veth peer name eth0 netns {guest.name}",
                *self._gateway(guest.interface, f"{gateways[0]}/32", f"{gateways[1]}/128"),
                *(
                    f"route add {address} dev {guest.interface} src {_gateway_of(address, gateways)}"
                    for address in guest.addresses
                ),
            ],
        )
        self._ip(guest, self._guest(guest, gateways, prefixes=(32, 128)))

    def _gateway(self, interface: str, ipv4: str, ipv6: str) -> list[str]:
        lines = [f"link set {interface} up", f"address add {ipv4} dev {interface}"]
        return [*lines, f"address add {ipv6} dev {interface} nodad"] if self._ipv6 else lines

    def _guest(self, guest: Namespace, gateways: tuple[str, str], prefixes: tuple[int, int]) -> list[str]:
        lines = ["link set eth0 up"]
        for address in guest.addresses:
            v6 = ":" in address
            lines.append(f"address add {address}/{prefixes[v6]} dev eth0{' nodad' if v6 else ''}")
        for gateway in dict.fromkeys(_gateway_of(address, gateways) for address in guest.addresses):
            lines += [f"route replace {gateway} dev eth0", f"route add default via {gateway} dev eth0"]
        return lines

    def _ip(self, namespace: Namespace, lines: list[str]) -> None:
        _batch(["-n", namespace.name], lines)


def _gateway_of(address: str, gateways: tuple[str, str]) -> str:
    return gateways[ipaddress.ip_address(address).version == 6]


def _batch(options: list[str], lines: list[str]) -> None:
    done = subprocess.run(
        ["ip", *options, "-batch", "-"],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if done.returncode != 0 and "-force" not in options:
        raise RuntimeError(f"ip {' '.join(options)}: {done.stderr.strip()}; in: {'; '.join(lines)}")
