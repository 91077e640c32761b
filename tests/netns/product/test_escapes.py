"""Every technique of tests/escapes against the whole product. What reaches the victim is counted by the victim.

Each is done twice: by a pod that the policy holds, and by one that no policy selects, for a technique that goes nowhere by itself
would prove nothing.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest

from pellucid_cli.lab.topology import POD_GATEWAYS, SERVER_GATEWAYS, Namespace
from tests.escapes.corpus import Server, Technique, policies, raw, techniques

from ..world import eventually
from .conftest import Figure
from .escapes import Attack, Ears, Wire, sent
from .stage import Stage, records

ALL = techniques()
LOCAL = ("169.254.169.254", "169.254.170.2", "168.63.129.16", "100.100.100.200", "192.0.0.192", "169.254.7.7")
EMBEDDED = (
    "fd00:ec2::254", "fd20:ce::254", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a9fe:a9fe", "2002:a9fe:a9fe::1",
)  # fmt: skip
GUARDED, UNGUARDED = 10000, 20000  # the first ports of connections, each technique has its own
PARALLEL = 64


@dataclass
class Outcome:
    """Of one technique: a connection's by IP version, packets' together. heard, unguarded: at the victim."""

    ends: dict[int, str] = field(default_factory=dict)
    heard: dict[int, bytes | None] = field(default_factory=dict)
    unguarded: dict[int, bytes | None] = field(default_factory=dict)
    records: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    arrived: int = 0
    arrived_unguarded: int = 0


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    held = policies()
    with Stage(tmp_path_factory.mktemp("escapes"), pods=("free", *held), servers=("allowed", "forbidden")) as built:
        built.topology.add_server("metadata", *LOCAL, *EMBEDDED)
        built.write("policy.yaml", "---\n".join(held.values()))
        yield built


@pytest.fixture(scope="module")
def descriptors() -> Iterator[None]:
    """Enough for a listener a technique, wherever the tests run."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], min(before[1], 4096)), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture(scope="module")
def outcomes(stage: Stage, descriptors: None) -> dict[str, Outcome]:
    """Everything, done once: connections side by side, packets one after the other."""
    instance = stage.start("--workers", "1")
    stage.node.run(["nft", "flush", "set", "inet", "pellucid", "adopting"])  # as a minute after the start
    found = {name: Outcome() for name in ALL}
    with ExitStack() as stack:
        ears = {name: stack.enter_context(Ears(stage[name], _ports(name))) for name in _victims()}
        with ThreadPoolExecutor(PARALLEL) as threads:
            done = [
                threads.submit(_connection, stage, ears, name, technique, version, found[name])
                for name, technique in ALL.items()
                if not technique.packets
                for version in technique.versions
            ]
            for each in done:
                each.result()
        for name, technique in ALL.items():
            if technique.packets:
                _packets(stage, technique, found[name])

    def told() -> bool:
        known = records(instance)
        for name, technique in ALL.items():
            for version in () if technique.packets else technique.versions:
                address = stage[technique.policy].ipv6 if version == 6 else stage[technique.policy].ipv4
                place = (_target(stage, technique, version), _port(name, technique, GUARDED))
                found[name].records[version] = [
                    each
                    for each in known
                    if each["source"]["address"] == address
                    and (each["destination"]["address"], each["destination"]["port"]) == place
                ]
        return all(
            bool(rows) == (ALL[name].expect.verdict is not None)
            for name, each in found.items()
            for rows in each.records.values()
        )

    eventually(told)
    return found


def _connection(
    stage: Stage, ears: dict[str, Ears], name: str, technique: Technique, version: int, found: Outcome
) -> None:
    host = _victim(technique)
    address = _target(stage, technique, version)
    spare = stage["allowed"].ipv6 if version == 6 else stage["allowed"].ipv4
    for pod, first in ((stage[technique.policy], GUARDED), (stage["free"], UNGUARDED)):
        attack = Attack(technique, pod, address, _port(name, technique, first), spare)
        client = pod.ipv4 if ":" not in address or address.startswith("::ffff:") else pod.ipv6
        if first == GUARDED:
            found.ends[version] = attack.run(ears[host], client)
            found.heard[version] = _heard(ears[host], attack.port, client)
        elif technique.unguarded == "arrives":
            found.unguarded[version] = attack.run_unguarded(ears[host], client)


def _heard(ears: Ears, port: int, client: str) -> bytes | None:
    """What came to port from client, or from the node."""
    said = [ears.heard(port, each) for each in (client, *SERVER_GATEWAYS, *POD_GATEWAYS)]
    heard = [each for each in said if each is not None]
    return b"".join(heard) if heard else None


def _packets(stage: Stage, technique: Technique, found: Outcome) -> None:
    hosts: dict[str, Namespace] = {"node": stage.node, **stage.topology.pods, **stage.topology.servers}
    for name in (technique.policy, "free"):
        with Wire(stage.node, stage[name], stage["forbidden"], hosts) as wire:
            counts = [wire.arrived(packet) for packet in technique.packets]
        if name == "free":
            found.arrived_unguarded = min(counts)
        else:
            found.arrived = sum(counts)


def _victim(technique: Technique) -> str:
    return technique.to if technique.to == "node" else "metadata" if technique.to in LOCAL + EMBEDDED else "forbidden"


def _victims() -> list[str]:
    return ["allowed", *sorted({_victim(technique) for technique in ALL.values() if not technique.packets})]


def _ports(victim: str) -> dict[int, Server]:
    if victim == "allowed":
        return {80: Server()}
    wanted = {}
    for name, technique in ALL.items():
        if not technique.packets and _victim(technique) == victim and technique.unguarded == "arrives":
            for first in (GUARDED, UNGUARDED):
                wanted[_port(name, technique, first)] = technique.server
    return wanted


def _port(name: str, technique: Technique, first: int) -> int:
    return first + list(ALL).index(name) if technique.port is None else technique.port


def _target(stage: Stage, technique: Technique, version: int) -> str:
    if technique.to not in ("node", "forbidden"):
        return technique.to
    host = stage[technique.to]
    return host.ipv6 if version == 6 else host.ipv4


CONNECTIONS = [name for name, technique in ALL.items() if not technique.packets]
PACKETS = [name for name, technique in ALL.items() if technique.packets]
_failed: set[str] = set()


@pytest.mark.parametrize("name", CONNECTIONS)
def test_a_connection_gets_no_further_than_the_policy_says(
    outcomes: dict[str, Outcome], figure: Figure, name: str
) -> None:
    technique, outcome = ALL[name], outcomes[name]
    expect = technique.expect
    if technique.unguarded == "arrives":
        everything = b"".join(sent(step) for step in technique.steps)
        assert outcome.unguarded == dict.fromkeys(technique.versions, everything)
    if technique.known is not None:
        assert all(outcome.heard[version] for version in technique.versions), (
            "it does not pass any more: no longer known"
        )
        return
    for version in technique.versions:
        assert raw(expect.passes).startswith(outcome.heard[version] or b"")
        assert outcome.ends[version] == expect.ends
        assert {(each["verdict"], each["reason"]) for each in outcome.records[version]} == (
            {(expect.verdict, expect.reason)} if expect.verdict else set()
        )
    _say(figure, name)


@pytest.mark.parametrize("name", PACKETS)
def test_a_packet_does_not_arrive(outcomes: dict[str, Outcome], figure: Figure, name: str) -> None:
    technique, outcome = ALL[name], outcomes[name]
    assert (outcome.arrived_unguarded > 0) == (technique.unguarded == "arrives")
    if technique.known is not None:
        assert outcome.arrived, "it does not pass any more: no longer known"
        return
    assert outcome.arrived == 0
    _say(figure, name)


def _say(figure: Figure, name: str) -> None:
    _failed.add(name)
    known = sum(technique.known is not None for technique in ALL.values())
    figure(
        "escapes",
        f"{len(_failed)} of {len(ALL) - known} techniques fail, nothing of them at the victims; {known} known ones pass",
    )
