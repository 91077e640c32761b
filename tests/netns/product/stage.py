"""Pods, a node and servers with the real `pellucid run` in the node: all its processes, real kernel rules."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pellucid_cli.lab.edit import replace_text
from pellucid_cli.lab.instance import Instance
from pellucid_cli.lab.servers import Journal, RecordingServer, Talk
from pellucid_cli.lab.topology import POD_CIDRS, Namespace, Topology

from ..world import eventually

VERSIONS = (4, 6)
TABLE = "inet pellucid"
INSTALLATION = f"""
apiVersion: pellucid.dev/v1alpha1
kind: TransparentProxy
metadata: {{name: default}}
spec: {{podCIDRs: [{POD_CIDRS[0]}, "{POD_CIDRS[1]}"], defaultAction: Allow}}
"""


def policy(rules: str, *, name: str = "p", pod: str = "a", spec: str = "") -> str:
    """A TransparentPolicy of namespace shop for the pods with label app: pod; spec: more of its lines, rules: its list's entries."""
    return f"""---
apiVersion: pellucid.dev/v1alpha1
kind: TransparentPolicy
metadata: {{name: {name}, namespace: shop}}
spec:
  podSelector: {{matchLabels: {{app: {pod}}}}}
  {spec}
  rules:
{rules}
"""


def pod_objects(pods: Mapping[str, Sequence[str]]) -> str:
    """Namespace shop, and pods by name and addresses, each with its name up to the first hyphen as label app."""
    text = "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {team: shop}}\n"
    for name, addresses in pods.items():
        ips = ", ".join(f'{{ip: "{address}"}}' for address in addresses)
        text += f"---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{app: {name.split('-')[0]}}}}}\n"
        text += f"status: {{podIPs: [{ips}]}}\n"
    return text


class Stage:
    """A context manager. pods, servers: their names. In folder/policy lies what `run` enforces; journal: what servers saw."""

    def __init__(
        self, folder: Path, *, pods: Sequence[str] = ("a", "b"), servers: Sequence[str] = ("web", "other")
    ) -> None:
        self.folder = folder
        self.policy = folder / "policy"
        self.policy.mkdir(parents=True, exist_ok=True)
        self.journal = Journal()
        self._names = pods, servers
        self._runs = 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.topology = stack.enter_context(Topology())
            self.node = self.topology.node
            for name in self._names[0]:
                self.topology.add_pod(name)
            for name in self._names[1]:
                self.topology.add_server(name)
            self._stack = stack.pop_all()
        self.write("installation.yaml", INSTALLATION)
        self.write("pods.yaml", pod_objects({name: pod.addresses for name, pod in self.topology.pods.items()}))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __getitem__(self, name: str) -> Namespace:
        """The pod or server called name, or the node."""
        hosts: dict[str, Namespace] = {"node": self.node, **self.topology.pods, **self.topology.servers}
        return hosts[name]

    def serve(self, name: str, ports: Mapping[int, Talk], addresses: Sequence[str] | None = None) -> None:
        """The host called name serves, until the stage is left."""
        self._stack.enter_context(RecordingServer(self[name], ports, self.journal, addresses))

    def write(self, name: str, text: str) -> float:
        """The policy folder has a file of that name with text; time.monotonic() right after it appeared."""
        return replace_text(self.policy / name, text)

    def run(self, *options: str, policy: Path | None = None, drain_s: float = 2.0) -> Instance:
        """`pellucid run`, to be entered. A state folder of its own each time."""
        self._runs += 1
        folder = self.folder / f"run{self._runs}"
        folder.mkdir()
        return Instance(self.node, policy or self.policy, folder, options=("--drain", str(drain_s), *options))

    def start(self, *options: str) -> Instance:
        """`pellucid run`, enforcing until the stage is left."""
        return self._stack.enter_context(self.run(*options))

    def command(self, *options: str, state: Path, policy: Path | None = None) -> list[str]:
        """The command line of `pellucid run`."""
        folder = str(policy or self.policy)
        return [sys.executable, "-m", "pellucid_cli", "run", "--policy", folder, "--state", str(state), *options]

    def left_behind(self) -> dict[str, str]:
        """All that a run could leave in the node: tables, rules and routes of both families, sockets."""
        asked = {
            "tables": ["nft", "list", "tables"],
            "rules": ["ip", "rule"],
            "rules of IPv6": ["ip", "-6", "rule"],
            "routes": ["ip", "route", "show", "table", "all"],
            "routes of IPv6": ["ip", "-6", "route", "show", "table", "all"],
            "listeners": ["ss", "-Hltn"],
        }
        return {what: self.node.run(command).stdout for what, command in asked.items()}

    def counter(self, name: str) -> int:
        """Packets of a named counter of our table in the kernel, read without the proxy."""
        said = json.loads(self.node.run(["nft", "-j", "list", "counter", *TABLE.split(), name]).stdout)
        return next(entry["counter"]["packets"] for entry in said["nftables"] if "counter" in entry)


def address_of(host: Namespace, version: int) -> str:
    """Its address of that IP version."""
    return host.ipv6 if version == 6 else host.ipv4


def tap(host: Namespace, match: str) -> Callable[[], int]:
    """A reader of how many packets that match came to host, counted by its own kernel: the proxy has no word in it."""
    name = f"tap{time.monotonic_ns()}"
    host.nft(
        f"table inet {name} {{ counter c {{ }}; chain in {{ type filter hook prerouting priority raw; policy accept; "
        f"{match} counter name c; }}; }}"
    )

    def read() -> int:
        said = json.loads(host.run(["nft", "-j", "list", "counters", "table", "inet", name]).stdout)
        return next(entry["counter"]["packets"] for entry in said["nftables"] if "counter" in entry)

    return read


def metric(stage: Stage, name: str, address: str = "127.0.0.1:9464") -> float:
    """The value of a series as the node's endpoint tells it (`run --metrics`); name: without the prefix, with its labels in braces."""

    def fetch() -> str:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
            return str(answer.read().decode())

    lines = stage.node.call(fetch).splitlines()
    return next(
        (float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == f"pellucid_{name}"), 0.0
    )


def records(instance: Instance) -> list[dict[str, Any]]:
    """The flow records so far; half a line at the end is not one yet."""
    return [json.loads(line) for line in instance.flows.read_text().splitlines(keepends=True) if line.endswith("\n")]


def wait_for_records(instance: Instance, count: int, timeout_s: float = 5.0) -> list[dict[str, Any]]:
    """The flow records as soon as there are count of them; those there are after timeout_s."""
    eventually(lambda: len(records(instance)) >= count, timeout_s)
    return records(instance)


def process_ids(instance: Instance) -> dict[str, int]:
    """The processes of a run: guardian, supervisor, agent, worker0, worker1 …"""
    assert instance._process is not None
    guardian = instance._process.pid
    found = {"guardian": guardian}
    workers = 0
    for supervisor in _children(guardian):
        found["supervisor"] = supervisor
        for child in _children(supervisor):
            try:
                words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            except OSError:  # it ended since its parent's children were listed
                continue
            if b"pellucid_proxy.agent" in words:
                found["agent"] = child
            elif b"pellucid_proxy.worker" in words:
                found[f"worker{workers}"] = child
                workers += 1
    return found


def _children(pid: int) -> list[int]:
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except OSError:  # it has ended
        return []


def gone(pid: int) -> bool:
    """Whether no process of that id runs any more; a zombie does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def kill(*pids: int) -> None:
    """They get SIGKILL; returns when none of them runs."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: all(map(gone, pids)))


class CountingServer:
    """Answers HTTP requests on one port of host, both families, as cheaply as possible; one request a connection.

    accepted: connections so far. Close it by the `with`."""

    ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nok\n"

    def __init__(self, host: Namespace, port: int) -> None:
        self.accepted = 0
        self._lock = threading.Lock()
        self._listeners = [host.listen(address, port, backlog=4096) for address in ("0.0.0.0", "::")]
        self._threads = [
            threading.Thread(target=self._serve, args=(listener,), daemon=True)
            for listener in self._listeners
            for _ in range(2)
        ]
        for thread in self._threads:
            thread.start()

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                self.accepted += 1
            with connection:
                try:
                    connection.settimeout(5)
                    if connection.recv(4096):
                        connection.sendall(self.ANSWER)
                except OSError:
                    pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for listener in self._listeners:
            listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for listener in self._listeners:
            listener.close()


class Load:
    """Connections from host to addresses, as fast as they go, by a process of its own, from entering to leaving the context.

    Afterwards: ended: how many ended in which way; ok: the server's whole answer came. slowest_s: of those that were answered."""

    PROGRAM = Path(__file__).with_name("load.py")

    def __init__(self, host: Namespace, addresses: Sequence[str], port: int, name: str, *, parallel: int = 8) -> None:
        self.ended: dict[str, int] = {}
        self.slowest_s = 0.0
        self._command = [sys.executable, str(self.PROGRAM), str(port), name, str(parallel), *addresses]
        self._host = host

    def __enter__(self) -> Self:
        self._process = self._host.popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        said, _ = self._process.communicate(timeout=30)  # the end of its standard input tells it to stop
        told = json.loads(said)
        self.ended, self.slowest_s = told["ended"], told["slowest_s"]
