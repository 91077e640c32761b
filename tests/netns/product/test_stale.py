"""Flows that the kernel alone let pass, and a policy that changes: who may not go on ends at once, who may notices nothing."""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from pellucid_cli.lab.instance import Instance
from pellucid_cli.lab.topology import POD_GATEWAYS, Namespace
from pellucid_proxy.agent.status import read_status

from ..world import eventually
from .conftest import Figure
from .stage import VERSIONS, Stage, address_of, kill, pod_objects, policy, process_ids

LIMIT_S = 1.0
QUIET_S = 1.5
"""How long nothing may come any more: longer than the time in which whoever was ended tries again."""
PACE_S = 0.02
PORT = 7000
AT_ONCE = 100
TCP, UDP, PING = "TCP", "UDP", "ping"
_PROTOCOLS = {6: TCP, 17: UDP, 1: PING, 58: PING}
_OUTGOING = 4
_RST = 0x04
_ECHO = {4: 8, 6: 128}
SEED = 24
EACH = int(os.environ.get("PELLUCID_STALE_FLOWS", "2"))
"""Flows of each kind and version."""
METRICS = "127.0.0.1:9464"
REST = "  - {name: rest, match: {}, action: Allow}\n"


class Key(NamedTuple):
    """What names a flow at either end. number: the pod's port, or the identifier of its echo requests."""

    version: int
    kind: str
    number: int


class Wire:
    """What comes to host from other, as its own interface sees it; a context manager. The proxy has no word in it.

    last: time.monotonic() of each flow's last packet. Resets and errors do not count: they are how a flow ends."""

    def __init__(self, host: Namespace, other: Sequence[str], *, of_pod: bool) -> None:
        self.last: dict[Key, float] = {}
        self.counts: dict[Key, int] = {}
        self._of_pod = of_pod
        self._other = {socket.inet_pton(socket.AF_INET6 if ":" in each else socket.AF_INET, each) for each in other}
        self._socket = host.call(socket.socket, socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
        self._socket.settimeout(0.1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                packet, address = self._socket.recvfrom(2048)
            except TimeoutError:
                continue
            now = time.monotonic()
            if address[2] == _OUTGOING:
                continue
            key = self._key(packet)
            if key is not None:
                self.last[key] = now
                self.counts[key] = self.counts.get(key, 0) + 1

    def _key(self, packet: bytes) -> Key | None:
        version = packet[0] >> 4
        if version == 4:
            protocol, source, rest = packet[9], packet[12:16], packet[(packet[0] & 15) * 4 :]
        else:
            protocol, source, rest = packet[6], packet[8:24], packet[40:]
        kind = _PROTOCOLS.get(protocol)
        if kind is None or source not in self._other:
            return None
        if kind is PING:
            if rest[0] not in (0, 8, 128, 129):
                return None
            return Key(version, kind, int.from_bytes(rest[4:6], "big"))
        if kind is TCP and rest[13] & _RST:
            return None
        return Key(version, kind, int.from_bytes(rest[0:2] if self._of_pod else rest[2:4], "big"))


class Echo:
    """A server of host that answers on PORT, TCP and UDP. Where a client says stream, it speaks on by itself, whoever listens.

    A context manager. last: time.monotonic() of what each flow's client said last."""

    def __init__(self, host: Namespace, addresses: Sequence[str]) -> None:
        self.last: dict[Key, float] = {}
        self._stop = threading.Event()
        self._listeners: list[socket.socket] = []
        self._datagrams: list[socket.socket] = []
        self._connections: set[socket.socket] = set()
        self._streams: dict[object, Callable[[], object]] = {}
        for address in addresses:
            self._listeners.append(host.listen(address, PORT))
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            made = host.open_socket(family, socket.SOCK_DGRAM)
            made.bind((address, PORT))
            made.setblocking(False)
            self._datagrams.append(made)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        for each in (*self._listeners, *self._datagrams):
            each.close()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.is_set():
            waited = [*self._listeners, *self._datagrams, *self._connections]
            for ready in select.select(waited, [], [], max(0.0, due - time.monotonic()))[0]:
                if ready in self._listeners:
                    made = ready.accept()[0]
                    made.setblocking(False)
                    self._connections.add(made)
                elif ready in self._datagrams:
                    self._answer_datagrams(ready)
                else:
                    self._answer(ready)
            if time.monotonic() >= due:
                due += PACE_S
                for each in self._streams.values():
                    with suppress(OSError):
                        each()
        for left in self._connections:
            left.close()

    def _answer(self, ready: socket.socket) -> None:
        try:
            said = ready.recv(2048)
            self._note(ready, TCP, ready.getpeername()[1])
            ready.send(said)
            if said == b"stream":
                self._streams[ready] = partial(ready.send, b"more")
        except OSError:
            said = b""
        if not said:
            self._connections.discard(ready)
            ready.close()

    def _answer_datagrams(self, ready: socket.socket) -> None:
        with suppress(OSError):
            for _ in range(AT_ONCE):  # so that many clients of one socket are served as often as one
                said, client = ready.recvfrom(2048)
                self._note(ready, UDP, client[1])
                ready.sendto(said, client)
                if said == b"stream":
                    self._streams[client] = partial(ready.sendto, b"more", client)

    def _note(self, ready: socket.socket, kind: str, port: int) -> None:
        self.last[Key(6 if ready.family == socket.AF_INET6 else 4, kind, port)] = time.monotonic()


@dataclass
class Flow:
    """One of a pod's flows. answered: packets of the server that the pod's program got. failed: it learned that it is over."""

    key: Key
    address: str
    streams: bool
    opened: socket.socket
    answered: int = 0
    failed: bool = False

    def say(self) -> None:
        """The pod speaks, unless only the server does."""
        try:
            if self.key.kind is PING:
                self.opened.sendto(_echo_request(self.key), (self.address, 0))
            elif not self.streams:
                self.opened.send(b"x" * 16)
            elif self.key.kind is UDP and not self.answered:
                self.opened.send(b"stream")  # the first one may be lost where all begin at once
        except BlockingIOError:
            pass
        except OSError:
            self.failed = True

    def hear(self) -> None:
        """Take what came."""
        try:
            while said := self.opened.recv(4096):
                if self.key.kind is not PING or self._is_mine(said):
                    self.answered += 1
            self.failed = True
        except BlockingIOError:
            pass
        except OSError:
            self.failed = True

    def _is_mine(self, said: bytes) -> bool:
        reply = said[20:] if self.key.version == 4 else said
        return reply[0] in (0, 129) and int.from_bytes(reply[4:6], "big") == self.key.number


def _echo_request(key: Key) -> bytes:
    head = struct.pack("!BBHHH", _ECHO[key.version], 0, 0, key.number, 1)
    body = b"ping" * 4
    if key.version == 6:
        return head + body  # the kernel fills in the checksum
    total = sum(struct.unpack("!12H", head + body))
    total = (total >> 16) + (total & 0xFFFF)
    return head[:2] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + head[4:] + body


_numbers = iter(range(20000, 30000))


def open_flow(pod: Namespace, address: str, kind: str, *, streams: bool = False) -> Flow:
    """A flow from pod to the server that has address. Raises OSError."""
    version = 6 if ":" in address else 4
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    number = next(_numbers)
    if kind is PING:
        opened = pod.open_socket(
            family, socket.SOCK_RAW, socket.getprotobyname("ipv6-icmp" if version == 6 else "icmp")
        )
    else:
        opened = pod.open_socket(family, socket.SOCK_STREAM if kind is TCP else socket.SOCK_DGRAM)
        opened.bind((address_of(pod, version), number))
        opened.settimeout(5)
        opened.connect((address, PORT))
        opened.send(b"stream" if streams else b"x")
    opened.setblocking(False)
    return Flow(Key(version, kind, number), address, streams, opened)


class Traffic:
    """Flows at work, each at its pace; a context manager."""

    def __init__(self, flows: Sequence[Flow]) -> None:
        self._flows = flows
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        for flow in self._flows:
            flow.opened.close()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            due = max(due + PACE_S, time.monotonic())
            for flow in self._flows:
                if not flow.failed or flow.key.kind is not TCP:
                    flow.hear()
                    flow.say()


def opens(pod: Namespace, server: Namespace, key: Key) -> bool:
    """Whether a new connection from that port is answered."""
    with pod.open_socket(socket.AF_INET6 if key.version == 6 else socket.AF_INET) as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.settimeout(5)
        opened.bind((address_of(pod, key.version), key.number))
        try:
            opened.connect((address_of(server, key.version), PORT))
            opened.send(b"x")
            return opened.recv(1) == b"x"
        except OSError:
            return False


class Play:
    """Pods and servers with flows between them, watched at both ends, and the policy that changes."""

    def __init__(self, stage: Stage, stack: ExitStack, instance: Instance) -> None:
        self._stage, self._stack, self._instance = stage, stack, instance
        self._servers: dict[str, Sequence[str]] = {}
        self._wires: list[Wire] = []
        self._seen: list[dict[Key, float]] = []
        self._pods = [address for pod in stage.topology.pods.values() for address in pod.addresses]
        for name in stage.topology.servers:
            self.serve(name, stage[name])

    def serve(self, name: str, host: Namespace, addresses: Sequence[str] = ()) -> None:
        """host answers on its addresses, or those given; what comes there, and from there to pods, is watched."""
        own = self._servers[name] = addresses or host.addresses
        self._seen.append(self._stack.enter_context(Echo(host, own)).last)
        if host is not self._stage.node:  # where packets are seen before they are refused
            self._wires.append(self._stack.enter_context(Wire(host, self._pods, of_pod=True)))
        for pod in self._stage.topology.pods.values():
            self._wires.append(self._stack.enter_context(Wire(pod, own, of_pod=False)))

    def flows(self, pod: str, server: str, each: int = 1) -> list[Flow]:
        """Of every version and kind, as many where both speak as where only the server does; all are answered and at work."""
        made = [
            open_flow(self._stage[pod], self._address(server, version), kind, streams=streams)
            for version in VERSIONS
            for kind, streams in ((TCP, False), (TCP, True), (UDP, False), (UDP, True), (PING, False))
            for _ in range(each)
        ]
        self._stack.enter_context(Traffic(made))
        assert eventually(lambda: all(flow.answered > 2 for flow in made)), [f.key for f in made if f.answered <= 2]
        return made

    def change(self, name: str, text: str) -> float:
        """The file is written, and is in force; when it was written."""
        before = self._revision()
        written = self._stage.write(name, text)
        assert eventually(lambda: self._revision() != before, 10.0), self._instance.log_end()
        return written

    def reviewed(self) -> None:
        """Whatever the last change concerned has been decided again."""
        said = "live flows of the kernel"
        assert eventually(lambda: said in self._instance.log.read_text(), 10.0), self._instance.log_end()

    def ends(self, flows: Sequence[Flow], written: float) -> list[float]:
        """How long after written the last packet of each came to its server or its pod; without end where it goes on."""

        def quiet(flow: Flow) -> bool:
            return time.monotonic() - self._last(flow) > QUIET_S

        eventually(lambda: all(map(quiet, flows)), 15.0)
        return [max(0.0, self._last(flow) - written) if quiet(flow) else float("inf") for flow in flows]

    def cut(self, flows: Sequence[Flow]) -> list[Key]:
        """Those of flows that failed, or are not answered any more."""
        before = [flow.answered for flow in flows]
        eventually(lambda: all(flow.answered > b + 2 for flow, b in zip(flows, before, strict=True)), 10.0)
        return [
            flow.key
            for flow, b in zip(flows, before, strict=True)
            if (flow.failed and flow.key.kind is TCP) or flow.answered <= b + 2
        ]

    def metric(self, name: str, **labels: str) -> float:
        """A value that the run serves."""
        host, _, port = METRICS.partition(":")
        with self._stage.node.connect(host, int(port)) as scraping:
            scraping.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            text = b"".join(iter(partial(scraping.recv, 65536), b"")).decode()
        wanted = f"pellucid_{name}{{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "} "
        return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(wanted))

    def _revision(self) -> str:
        return read_status(str(self._instance.state)).revision

    def _address(self, server: str, version: int) -> str:
        return next(each for each in self._servers[server] if (":" in each) == (version == 6))

    def _last(self, flow: Flow) -> float:
        return max(seen.get(flow.key, 0.0) for seen in (*self._seen, *(wire.last for wire in self._wires)))


@contextmanager
def played(folder: Path, pods: Sequence[str], policies: str = "") -> Iterator[tuple[Stage, Play]]:
    """Two servers and pods, enforced by policies until the context is left."""
    with ExitStack() as stack:
        stage = stack.enter_context(Stage(folder, pods=pods))
        if policies:
            stage.write("policy.yaml", policies)
        instance = stack.enter_context(stage.run("--workers", "1", "--metrics", METRICS))
        yield stage, Play(stage, stack, instance)


def blocks(server: Namespace) -> str:
    """A rule that blocks server."""
    nets = ", ".join(f"{{cidr: '{address}/{128 if ':' in address else 32}'}}" for address in server.addresses)
    return f"  - {{name: shut, match: {{destinations: [{nets}]}}, action: Block}}\n"


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def said(ends: Sequence[float]) -> str:
    """A figure of when flows ended."""
    ended = sum(end < float("inf") for end in ends)
    p50, p99, longest = statistics.median(ends), percentile(ends, 0.99), max(ends)
    return f"{ended} of {len(ends)} ended, after p50 {p50 * 1000:.0f} ms, p99 {p99 * 1000:.0f} ms, max {longest * 1000:.0f} ms"


def of_the_server(flows: Sequence[Flow]) -> list[Flow]:
    """Those that live by themselves: connections, and datagrams that only the server sends. Each datagram of a pod is judged anew."""
    return [flow for flow in flows if flow.key.kind is TCP or flow.streams]


def test_flows_of_the_kernel_that_are_denied_end_and_all_others_go_on(tmp_path: Path, figure: Figure) -> None:
    with played(tmp_path, ("a",), policy(REST)) as (stage, play):
        stay, denied = play.flows("a", "web", EACH), play.flows("a", "other", EACH)
        written = play.change("policy.yaml", policy(blocks(stage["other"]) + REST))
        ends = play.ends(denied, written)
        broken = play.cut(stay)
        counted = play.metric("kernel_flows_reviewed_total", outcome="policy_changed")
        play.change("policy.yaml", policy(REST))
        unheard = play.cut([flow for flow in denied if flow.key.kind is not TCP and not flow.streams])
        told = [flow for flow in denied if flow.failed and flow.key.kind is TCP]
        for flow in told:
            flow.opened.close()
        new = [opens(stage["a"], stage["other"], flow.key) for flow in told]
    figure(
        "flows of the kernel that a policy change denies",
        f"{said(ends)}; {len(broken)} of {len(stay)} that are allowed were cut or lost; allowed again, {len(unheard)} sockets are "
        f"not answered, and {sum(new)} of {len(new)} new connections from the same ports are",
    )
    assert percentile(ends, 0.99) < LIMIT_S
    assert counted == len(denied)
    assert broken == []
    assert unheard == []
    assert all(new)
    assert len(new) >= len(VERSIONS) * EACH  # where the pod speaks, it was told


def test_what_a_keep_rule_allowed_stays_until_it_ends_by_itself(tmp_path: Path, figure: Figure) -> None:
    """Two changes follow each other: the second finds flows that the rules of neither allow."""
    with played(tmp_path, ("a",), policy(REST, spec="onPolicyChange: Keep")) as (stage, play):
        kept = play.flows("a", "other", EACH)
        play.change("policy.yaml", policy(blocks(stage["other"]) + REST))
        play.reviewed()
        broken = play.cut(kept)
        denied = play.flows("a", "web", EACH)
        ends = play.ends(denied, play.change("policy.yaml", policy("  - {match: {}, action: Block}\n")))
        broken += play.cut(kept)
        new = [opens(stage["a"], stage["other"], Key(version, TCP, next(_numbers))) for version in VERSIONS]
        moving = of_the_server(kept)
        moved = play.ends(moving, play.change("pods.yaml", pod_objects({"else": stage["a"].addresses})))
    figure(
        "flows that a rule with onPolicyChange: Keep allowed",
        f"{len(kept) - len(set(broken))} of {len(kept)} go on over 2 changes that deny them, {sum(new)} of {len(new)} new ones pass; "
        f"of those between, which none keeps, {said(ends)}; when their address became another pod's {said(moved)}",
    )
    assert broken == []
    assert not any(new)
    assert percentile(ends, 0.99) < LIMIT_S
    assert percentile(moved, 0.99) < LIMIT_S


def test_flows_end_with_their_pod_when_its_address_is_another_pods(tmp_path: Path, figure: Figure) -> None:
    """Though the policies of the pod before and of the pod after allow them. b is direct: no policy selects it, before or after."""
    policies = policy(REST, name="one", pod="one") + policy(REST, name="two", pod="two")
    with played(tmp_path, ("a", "b", "c"), policies) as (stage, play):
        a, b, c = (stage[name].addresses for name in "abc")
        play.change("pods.yaml", pod_objects({"one": a, "b": b, "c": c}))
        old, stay = [*play.flows("a", "web", EACH), *play.flows("b", "web", EACH)], play.flows("c", "web", EACH)
        moving = of_the_server(old)
        ends = play.ends(moving, play.change("pods.yaml", pod_objects({"two": a, "free": b, "c": c})))
        unheard = play.cut([flow for flow in old if flow not in moving])
        broken = play.cut(stay)
    figure(
        "flows of the kernel, and an address that is another pod's at once",
        f"{said(ends)}; {len(broken)} of {len(stay)} of another pod were cut or lost",
    )
    assert percentile(ends, 0.99) < LIMIT_S
    assert broken == []
    assert unheard == [], "the new pod, which speaks from the same ports, is not answered"


def test_a_pod_that_no_policy_selected_and_one_now_blocks(tmp_path: Path, figure: Figure) -> None:
    with played(tmp_path, ("a", "b")) as (_, play):
        denied, stay = play.flows("a", "other", EACH), play.flows("b", "other", EACH)
        ends = play.ends(denied, play.change("policy.yaml", policy("  - {match: {}, action: Block}\n")))
        broken = play.cut(stay)
    figure(
        "flows of a pod that no policy selected, and one now blocks",
        f"{said(ends)}; {len(broken)} of {len(stay)} of a pod that is still direct were cut or lost",
    )
    assert percentile(ends, 0.99) < LIMIT_S
    assert broken == []


def test_flows_to_the_node_itself_and_rules_that_need_a_name(tmp_path: Path, figure: Figure) -> None:
    """What the new rules would give to a worker goes on if they would allow it without a name, and ends if not."""
    named = "  - {name: site, match: {destinations: [{domain: site.example}]}, action: %s}\n"
    with played(tmp_path, ("a", "b"), policy(REST) + policy(REST, name="q", pod="b")) as (stage, play):
        play.serve("node", stage.node, addresses=POD_GATEWAYS)
        here, denied, stay = play.flows("a", "node", EACH), play.flows("a", "web"), play.flows("b", "web")
        text = policy(named % "Allow" + "  - {match: {}, action: Block}\n") + policy(
            named % "Block" + REST, name="q", pod="b"
        )
        ends = play.ends([*here, *denied], play.change("policy.yaml", text))
        broken = play.cut(stay)
    figure(
        "flows to the node itself, and to who may only be reached by name now",
        f"{said(ends)}; {len(broken)} of {len(stay)} that need no name were cut or lost",
    )
    assert percentile(ends, 0.99) < LIMIT_S
    assert broken == []


def test_a_thousand_edits_a_minute_leave_no_flow_that_is_denied(tmp_path: Path, figure: Figure) -> None:
    edits = int(os.environ.get("PELLUCID_STALE_EDITS", "60"))
    draw = random.Random(SEED)
    with played(tmp_path, ("a",), policy(REST)) as (stage, play):
        stay, denied = play.flows("a", "web", EACH), play.flows("a", "other", EACH)
        begun = written = time.monotonic()
        for number in range(edits):
            ports = draw.sample(range(1, 1000), 3)
            shut = blocks(stage["other"]) if number == edits - 1 else ""
            unused = f"  - {{name: n{number}, match: {{ports: [{{port: {ports[0]}}}]}}, action: Block}}\n"
            written = stage.write("policy.yaml", policy(unused + shut + REST))
            pause = begun + (number + 1) * 0.06 - time.monotonic()
            if pause > 0:  # the rate is what is tested
                time.sleep(pause)
        ends = play.ends(denied, written)
        broken = play.cut(stay)
    figure(
        "flows of the kernel in a thousand edits a minute",
        f"{edits} edits, the last of which denies: {said(ends)}; {len(broken)} of {len(stay)} that are allowed were cut or lost",
    )
    assert percentile(ends, 0.99) < LIMIT_S
    assert broken == []


def test_an_agent_that_starts_again_with_other_rules_ends_what_they_deny(tmp_path: Path, figure: Figure) -> None:
    """It is killed, and so is the whole run; each time the folder has changed before anybody saw it."""
    with Stage(tmp_path, pods=("a",)) as stage, ExitStack() as stack:
        stage.write("policy.yaml", policy(REST))
        first = stage.run("--workers", "1", "--metrics", METRICS)
        with first:
            play = Play(stage, stack, first)
            stay, denied, later = (play.flows("a", server, EACH) for server in ("web", "other", "web"))
            agent = process_ids(first)["agent"]
            os.kill(agent, signal.SIGSTOP)
            stage.write("policy.yaml", policy(blocks(stage["other"]) + REST))
            kill(agent)
            ends = play.ends(denied, time.monotonic())
            cut = play.cut(stay)
            kill(*process_ids(first).values())
            stage.write("policy.yaml", policy("  - {match: {}, action: Block}\n"))
            with Instance(stage.node, stage.policy, first.state.parent, log="log2"):
                ends += play.ends([*stay, *later], time.monotonic())
    figure(
        "flows of the kernel that an agent finds which starts again with other rules",
        f"{sum(end < float('inf') for end in ends)} of {len(ends)} ended, {len(cut)} of {len(stay)} that are allowed were cut or lost",
    )
    assert max(ends) < float("inf")
    assert cut == []
