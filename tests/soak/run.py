"""One run: a warm-up, a reading, the rest of the connections, another reading, and the bounds that must hold."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.drivers import CClient, CServer, total
from tests.netns.product.stage import Stage, pod_objects, policy, process_ids
from tests.netns.world import eventually

from .accounts import METRICS, Account, FlowFile, Sample, accounts, scrape, value
from .readings import Memory, Reading, read, sockets, tracked

PORT = 80
MIX = "A" * 60 + "H" * 10 + "C" * 8 + "S" * 7 + "X" * 10 + "N" * 3 + "K" * 2
"""Kinds of connections by their share; tests/drivers/wire.h says what each is."""
HELD = 10
"""Connections that live until their pod is another, in each round of changes."""
BULK_SLOTS = 4
MOST_SPARE = BULK_SLOTS * 4
"""Descriptors of pipes that are in use at one time: two pipes a connection."""
PHANTOMS = 100
"""Addresses that have a pod object in some rounds, and no pod."""
DRIFT = 0.05
SHORT_LIVED = ("time_wait", "close", "last_ack")
"""States of ended connections in connection tracking."""
PATIENCE_S = 90.0


@dataclass(frozen=True)
class Plan:
    """connections: in all, of which warm_up come before the first reading. slots: at one time, of each of two pods."""

    connections: int
    seed: int
    workers: int = 1
    slots: int = 48
    warm_up: int = 0

    @property
    def warm(self) -> int:
        return self.warm_up or self.connections // 10


@dataclass(frozen=True)
class Bound:
    """What was promised, what is, and whether that holds."""

    what: str
    found: str
    holds: bool


@dataclass
class Outcome:
    """seconds: of load alone."""

    connections: int = 0
    seconds: float = 0.0
    rounds: int = 0
    bounds: list[Bound] = field(default_factory=list)

    @property
    def broken(self) -> list[str]:
        return [f"{bound.what}: {bound.found}" for bound in self.bounds if not bound.holds]


class Soak:
    """A context manager around one `pellucid run` on a stage of its own in folder. say(line) hears of progress."""

    def __init__(self, folder: Path, plan: Plan, say: Callable[[str], None]) -> None:
        self.plan, self.say, self.folder = plan, say, folder
        self.draw = random.Random(plan.seed)
        self.clients: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self.direct = self.rounds = 0
        self.seconds = 0.0

    def __enter__(self) -> Soak:
        with ExitStack() as stack:
            self.stage = stage = stack.enter_context(
                Stage(self.folder, pods=("a", "b", "guest", "free"), servers=("web", "other"))
            )
            for host in (stage.node, stage["a"], stage["b"]):
                host.sysctl(net__ipv4__ip_local_port_range="1024 65535")
            # A new namespace's are minutes long: waiting for them would tell nothing more
            stage.node.run(
                ["sysctl", "-qw", *(f"net.netfilter.nf_conntrack_tcp_timeout_{state}=1" for state in SHORT_LIVED)]
            )
            self.servers = [stack.enter_context(CServer(stage[name], PORT)) for name in ("web", "other")]
            self.addresses = [*stage["web"].addresses, *stage["other"].addresses]
            self._settle_policy()
            self.instance = stack.enter_context(stage.run("--metrics", METRICS, "--workers", str(self.plan.workers)))
            self.processes = process_ids(self.instance)
            self.records = FlowFile(self.instance.flows)
            stack.callback(self.records.close)
            self.revision = self._revision()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    def run(self) -> Outcome:
        """All of it. Raises TimeoutError where something does not end."""
        first = read(self.stage, self.processes)
        self._load(self.plan.warm)
        self._quiet(first)
        warm = read(self.stage, self.processes)
        self.say(f"warm after {self.plan.warm:,} connections")
        self._load(self.plan.connections - self.plan.warm)
        samples = self._quiet(first)
        last = read(self.stage, self.processes)
        told = accounts(self.clients, self.direct, [each.counts() for each in self.servers], self.records, samples)
        return Outcome(
            sum(self.clients.values()) + self.direct,
            self.seconds,
            self.rounds,
            [*_bounds(first, warm, last), *_agreed(told, samples, self.wrong)],
        )

    # Load

    def _load(self, connections: int) -> None:
        """So many connections have come and gone, with rounds of changes meanwhile."""
        begun = time.monotonic()
        with ExitStack() as stack:
            clients = {name: stack.enter_context(client) for name, client in self._clients(connections).items()}
            while any(client.running for client in clients.values()):
                self._round()
                before = sum(self.clients.values()) - self.clients["L"] + self.direct
                done = before + sum(client.progress for client in clients.values())
                elapsed = time.monotonic() - begun
                self.say(
                    f"{done:,} of {self.plan.connections:,} connections, {self.rounds} rounds of changes, {elapsed:.0f} s"
                )
                self.records.read_on()
            results = {name: client.wait(PATIENCE_S) for name, client in clients.items()}
        self.seconds += max(result["seconds"] for result in results.values())
        self.direct += results.pop("free")["right"].get("A", 0)
        self._count(list(results.values()))
        self._settle_policy()

    def _clients(self, connections: int) -> dict[str, CClient]:
        def client(pod: str, count: int, options: str) -> CClient:
            seed = self.draw.getrandbits(60)
            return CClient(self.stage[pod], f"-n {count} -s {seed} -p {PORT} {options}", self.addresses)

        direct, bulk = connections // 50, connections // 500
        half = (connections - direct - bulk) // 2
        return {
            "a": client("a", half, f"-m {MIX} -c {self.plan.slots}"),
            "b": client("b", connections - direct - bulk - half, f"-m {MIX} -c {self.plan.slots}"),
            "bulk": client("a", bulk, f"-m B -c {BULK_SLOTS}"),
            "free": client("free", direct, "-m A -c 2"),
        }

    def _count(self, results: list[dict[str, Any]]) -> None:
        self.clients += total(results, "right")
        self.wrong += total(results, "wrong")

    # Changes

    def _round(self) -> None:
        """Policies are edited, pods come and go, and the guest is another pod: what it held ends with it."""
        self.rounds += 1
        options = f"-H -m L -n {HELD} -c {HELD} -p {PORT} -s {self.draw.getrandbits(60)}"
        with CClient(self.stage["guest"], options, self.addresses) as guest:
            if not guest.held.wait(PATIENCE_S):
                raise TimeoutError(f"round {self.rounds}: the guest's connections are not answered")
            self.stage.write("policy.yaml", self._policies(edited=True))
            self.stage.write("pods.yaml", self._pods(self.rounds, phantoms=True))
            result = guest.wait(PATIENCE_S)
        self._count([result])
        scrape(self.stage)

    def _settle_policy(self) -> None:
        """The folder is as it was at the start."""
        self.stage.write("policy.yaml", self._policies(edited=False))
        self.stage.write("pods.yaml", self._pods(0, phantoms=False))

    def _policies(self, *, edited: bool) -> str:
        rules = f"  - {{name: kernel, match: {{ports: [{{port: {PORT + 1}}}]}}, action: Block}}\n"
        if edited:
            number = self.draw.getrandbits(24)
            address = f"198.51.100.{number % 256}/32"
            rules += (
                f"  - {{name: extra, match: {{destinations: [{{cidr: {address}}}], ports: [{{port: 25}}]}}, action: Block}}\n"
                f"  - {{name: e{number}, match: {{destinations: [{{domain: v{number}.example}}]}}, action: Allow}}\n"
            )
        rules += (
            '  - {name: site, match: {destinations: [{domain: "*.site.example"}]}, action: Allow}\n'
            "  - {name: rest, match: {}, action: Block}"
        )
        return "".join(policy(rules, name=pod, pod=pod) for pod in ("a", "b", "guest"))

    def _pods(self, number: int, *, phantoms: bool) -> str:
        pods = {name: self.stage[name].addresses for name in ("a", "b", "free")}
        pods[f"guest-{number}"] = self.stage["guest"].addresses
        for each in range(PHANTOMS) if phantoms else ():
            if self.draw.random() < 0.5:
                name = self.draw.choice(("a", "b", "guest", "free", "stranger"))
                pods[f"{name}-{1000 + each}"] = (f"10.244.1.{100 + each}", f"fd00:244:1::{100 + each}")
        return pod_objects(pods)

    # Rest

    def _revision(self) -> str:
        return next(s.labels["revision"] for s in scrape(self.stage) if s.name == "policy_revision_info" and s.value)

    def _quiet(self, first: Reading) -> list[Sample]:
        """Nothing goes on: no connection lives, every record is written, conntrack is as it was at first. The metrics then.

        What does not come to rest within PATIENCE_S is left to the bounds."""
        samples: list[Sample] = []

        def rests() -> bool:
            nonlocal samples
            samples = scrape(self.stage)
            self.records.read_on()
            opened, lost = value(samples, "connections_opened_total"), value(samples, "events_dropped_total")
            return (
                value(samples, "connections_active") == 0
                and self.records.lines + lost == opened
                and sockets(self.stage) == first.sockets
                and len(tracked(self.stage)) <= len(first.tracked)
                and self._revision() == self.revision
            )

        eventually(rests, PATIENCE_S)
        return samples


def _bounds(first: Reading, warm: Reading, last: Reading) -> list[Bound]:
    found = [_drift(name, warm.memory[name], last.memory[name]) for name in first.memory]
    found += [_descriptors(name, first.descriptors[name], last.descriptors[name]) for name in first.descriptors]
    left = "; ".join(last.tracked[:3]) if len(last.tracked) > len(first.tracked) else ""
    entries = f"{len(first.tracked)} to {len(last.tracked)}{left and f', as {left}'}"
    found.append(Bound("conntrack entries", entries, not left))
    found.append(Bound("connections' sockets", f"{first.sockets} to {last.sockets}", last.sockets == first.sockets))
    found.append(Bound("set elements", f"{first.elements} to {last.elements}", last.elements == first.elements))
    found.append(
        Bound("kernel rules", "the same" if last.rules == first.rules else "others", last.rules == first.rules)
    )
    return found


def _drift(name: str, before: Memory, after: Memory) -> Bound:
    """By RSS: PSS depends on who else on the machine runs the same libraries just then."""
    drift = after.rss / before.rss - 1
    rss, pss = (f"{was / 1024:.1f} to {now / 1024:.1f} MiB" for was, now in zip(before, after, strict=True))
    return Bound(f"memory of {name}", f"RSS {rss} ({drift:+.1%}), PSS {pss}", drift < DRIFT)


def _descriptors(name: str, before: Counter[str], last: Counter[str]) -> Bound:
    """A worker keeps the pipes that were in use at one time, for the next ones (relay.py: IDLE_PIPES)."""
    after, spare = last.copy(), 0
    if name.startswith("worker"):
        spare = after["pipe"] - before["pipe"]
        after["pipe"] = before["pipe"]
    changed = {kind: after[kind] - before[kind] for kind in before | after if after[kind] != before[kind]}
    found = f"{before.total()} to {after.total()}{f' and {spare} of spare pipes' if spare else ''}{changed or ''}"
    return Bound(f"descriptors of {name}", found, not changed and 0 <= spare <= MOST_SPARE)


def _agreed(told: list[Account], samples: list[Sample], wrong: Counter[str]) -> list[Bound]:
    active = value(samples, "connections_active")
    return [
        Bound("live connections by the metric", str(active), active == 0),
        Bound("went otherwise than their kind", str(dict(wrong) or 0), not wrong),
        *(Bound(each.what, _counts(each), each.agreed) for each in told),
    ]


def _counts(account: Account) -> str:
    if account.agreed:
        return f"{next(iter(account.counts.values())):,} ({', '.join(account.counts)})"
    return ", ".join(f"{who} {count:,}" for who, count in account.counts.items())
