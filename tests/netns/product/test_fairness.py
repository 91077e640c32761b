"""One pod misbehaves, another one's clients are healthy: how long they wait for the first byte of an answer, without it and with it.

All goes through one worker, which has a CPU to itself where there are two: what is measured is how the proxy shares its time, not how
the machine shares its own between drivers. Healthy connections come at a steady rate, whatever becomes of them. Their p99 is taken
for a little while at a time, and the best one counts, without and with: what goes wrong on purpose goes on in all of them, others' work
on the machine does not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import form
from tests.drivers import CClient, CServer

from ..world import eventually
from .conftest import Figure
from .stage import INSTALLATION, Stage, policy, process_ids

RATE = 500
"""Healthy connections a second."""
WINDOW_S = 0.6
MOST_WINDOWS = 8
SWIFT = {"compiled": 5, "uncompiled": 1}[form()]
"""Thousands of connections a second that make a flood which leaves the worker most of its time."""
LIMIT_OF_POD = 7000  # what a worker with 20,000 descriptors has room for, nearly
RULES = """
  - {name: site, match: {destinations: [{domain: "*.site.example"}]}, action: Allow}
  - {name: rest, match: {}, action: Block}
"""
PATIENCE_S = 30.0


@dataclass(frozen=True)
class Misbehaviour:
    """options of the client (tests/drivers/client.c). held: so many connections are there all the time; at_a_second: so many come.

    limit: limits.connectionRatePerPod; then as many are tried as the client can."""

    options: str
    held: int = 0
    at_a_second: int = 0
    server: str = "web"
    times: float = 2.0
    limit: int = 0

    @property
    def command(self) -> str:
        held = f"-H -c {self.held}" if self.held else ""
        return f"-c 512 {self.options} {held} -r {20_000 if self.limit else self.at_a_second or 2000}"


CASES = {
    "5,000 that ask by one byte a second, of which 3,500 may be pending": Misbehaviour("-t -c 5000", at_a_second=2000),
    "2,000 that never say a word": Misbehaviour("-q", held=2000, at_a_second=400),
    "3,000 that never read an answer of 10 MB": Misbehaviour("-u -m G -n 3000", held=3000),
    "2,000 to a server that never answers a SYN": Misbehaviour("", held=2000, at_a_second=1000, server="hole"),
    f"{LIMIT_OF_POD:,} idle ones, all that a pod may have": Misbehaviour(f"-m L -n {LIMIT_OF_POD}", held=LIMIT_OF_POD),
    f"{SWIFT},000 a second, reset at once": Misbehaviour("-m N", at_a_second=SWIFT * 1000),
    f"{SWIFT},000 a second, ended before the SYN is answered": Misbehaviour("-k", at_a_second=SWIFT * 1000),
    f"{SWIFT},000 a second to a blocked name": Misbehaviour("-m X", at_a_second=SWIFT * 1000),
    f"{SWIFT * 200:,} a second that are answered": Misbehaviour("-m A", at_a_second=SWIFT * 200, times=1.2),
    f"as many as it can, of which {SWIFT * 200:,} a second are let in": Misbehaviour(
        "-m A", at_a_second=SWIFT * 200, times=1.2, limit=SWIFT * 200
    ),
}


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with Stage(tmp_path, servers=("web", "good", "hole")) as built:
        built.write("policy.yaml", policy(RULES, name="a", pod="a") + policy(RULES, name="b", pod="b"))
        limits = f"spec: {{limits: {{connectionsPerPod: {LIMIT_OF_POD}}}, "
        built.write("installation.yaml", INSTALLATION.replace("spec: {", limits))
        built["hole"].nft(
            "table inet hole { chain silence { type filter hook prerouting priority raw; tcp dport 80 drop; }; }"
        )
        for pod in ("a", "b"):
            built[pod].sysctl(net__ipv4__ip_local_port_range="1024 65535")
        yield built


class Healthy:
    """Clients of pod b. opened: in all windows so far, wrong: what became of those of them that were not answered."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.opened = 0
        self.wrong: dict[str, int] = {}

    def p99_ms(self) -> float:
        """From connect() to the first byte, in another window."""
        options = f"-m A -c 4000 -r {RATE} -d {WINDOW_S} -w {PATIENCE_S}"
        with CClient(self._stage["b"], options, self._stage["good"].addresses, nice=-10) as client:
            _pin(client.pid, 1)
            result = client.wait(2 * PATIENCE_S)
        self.opened += result["started"]
        self.wrong |= result["wrong"]
        return float(result["p99_us"] / 1000)


def _pin(pid: int, number: int) -> None:
    """The process runs on that CPU alone, where there is more than one."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) > 1:
        for thread in os.listdir(f"/proc/{pid}/task"):
            os.sched_setaffinity(int(thread), {cpus[number]})


def _under_way(client: CClient, case: Misbehaviour) -> bool:
    return client.held.is_set() if case.held else client.progress > case.at_a_second / 2


@pytest.mark.parametrize("name", CASES)
def test_others_hardly_wait_longer_while_a_pod_has(stage: Stage, name: str, figure: Figure) -> None:
    case = CASES[name]
    if case.limit:
        limits = f"spec: {{limits: {{connectionRatePerPod: {case.limit}}}, "
        stage.write("installation.yaml", INSTALLATION.replace("spec: {", limits))
    with (
        CServer(stage["web"], 80, nice=10) as web,
        CServer(stage["good"], 80, nice=-10) as good,
        stage.run("--workers", "1") as instance,
    ):
        processes = process_ids(instance)
        _pin(processes["worker0"], 0)
        for pid in (processes["agent"], web.pid, good.pid):
            _pin(pid, 1)
        healthy = Healthy(stage)
        alone = min(healthy.p99_ms() for _ in range(2))
        with CClient(stage["a"], case.command, stage[case.server].addresses, nice=10) as bad:
            _pin(bad.pid, 1)
            assert eventually(lambda: _under_way(bad, case), PATIENCE_S), "it does not come to misbehave"
            beside = healthy.p99_ms()
            for _ in range(MOST_WINDOWS):
                if beside < case.times * alone:
                    break
                beside = min(beside, healthy.p99_ms())
            assert bad.running
            bad.stop()
        afterwards = healthy.p99_ms()
        if beside >= case.times * alone:  # is it the machine that has become slower?
            alone = max(alone, min(healthy.p99_ms() for _ in range(2)))
    figure(
        f"beside a pod that has {name}",
        f"p99 {beside:.2f} ms, without {alone:.2f} ms, after it {afterwards:.2f} ms; {healthy.opened} answered",
    )
    assert healthy.wrong == {}
    assert beside < case.times * alone
