"""`pellucid observe` on a node that runs without --flows: every flow is shown, and one that does not read delays nobody."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from pellucid_cli.lab.clients import get
from pellucid_cli.lab.instance import Instance
from pellucid_cli.lab.servers import speak_http

from ..world import eventually
from .conftest import Figure
from .stage import CountingServer, Load, Stage, policy, process_ids

SITE, BLOCKED = "site.example", "blocked.example"
RULES = policy(f"""
  - {{name: site, match: {{destinations: [{{domain: {SITE}}}]}}, action: Allow}}
  - {{name: rest, match: {{}}, action: Block}}
""")


def _without_file(stage: Stage) -> Instance:
    """A run that writes no flow records."""
    instance = stage.run("--workers", "1")
    at = instance._command.index("--flows")
    del instance._command[at : at + 2]
    return instance


def _observe(instance: Instance, *arguments: str) -> subprocess.Popen[str]:
    """Returns when the node makes records for it."""
    command = [sys.executable, "-m", "pellucid_cli", "observe", "-f", "-o", "json", "--state", str(instance.state)]
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "The node runs without --flows: records begin now.\n"
    return process


def _left(process: subprocess.Popen[str]) -> tuple[list[dict[str, object]], str]:
    """What it showed and said until Ctrl-C."""
    process.send_signal(signal.SIGINT)
    shown, said = process.communicate(timeout=30)
    assert process.returncode == 0
    return [json.loads(line) for line in shown.splitlines()], said


def test_every_flow_is_shown_without_a_file_and_a_filter_shows_its_own(tmp_path: Path, figure: Figure) -> None:
    allowed, blocked = 30, 20
    with Stage(tmp_path) as stage:
        stage.serve("web", {80: speak_http})
        stage.write("policy.yaml", RULES)
        a, web = stage["a"], stage["web"]
        with _without_file(stage) as instance:
            assert get(a, web.ipv4, 80, SITE).end == "answered"  # nobody looks: no record
            process = _observe(instance)
            filtered = subprocess.Popen(
                [sys.executable, "-m", "pellucid_cli", "observe", "-f", "--verdict", "Block", "-o", "json", "--state", str(instance.state)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            assert process.stdout is not None
            assert filtered.stdout is not None
            assert get(a, web.ipv4, 80, BLOCKED).end == "reset"
            first, _ = json.loads(process.stdout.readline()), eventually(lambda: _watched(instance) == 2)
            assert first["verdict"] == "Block"
            ends = Counter(get(a, web.addresses[n % 2], 80, SITE).end for n in range(allowed))
            ends += Counter(get(a, web.addresses[n % 2], 80, BLOCKED).end for n in range(blocked))
            assert ends == {"answered": allowed, "reset": blocked}
            of_all = Counter(json.loads(process.stdout.readline())["verdict"] for _ in range(allowed + blocked))
            of_blocked = [json.loads(filtered.stdout.readline())["policy"]["rule"] for _ in range(blocked)]
            assert of_all == {"Allow": allowed, "Block": blocked}
            assert of_blocked == ["rest"] * blocked
            for each in (process, filtered):
                shown, said = _left(each)
                assert "reads too slowly" not in said
                assert len(shown) <= 1  # the first blocked one, if the second observer came in time
            last = subprocess.run(
                [sys.executable, "-m", "pellucid_cli", "observe", "--last", "5", "-o", "json", "--state", str(instance.state)],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            assert [json.loads(line)["verdict"] for line in last.stdout.splitlines()] == ["Block"] * 5
            assert "runs without --flows" in last.stderr
    figure(
        "observe",
        f"{allowed + blocked} of {allowed + blocked} flows shown without --flows, {blocked} of {blocked} by a filter",
    )


def _watched(instance: Instance) -> int:
    """How many processes hold a connection to the status socket of the run."""
    agent = process_ids(instance)["agent"]
    listed = subprocess.run(["ss", "-Hxp"], capture_output=True, text=True, check=True).stdout
    return sum("status.sock" in line and f"pid={agent}," in line for line in listed.splitlines())


def test_an_observer_that_stops_reading_delays_nobody_and_is_told_what_it_missed(
    tmp_path: Path, figure: Figure
) -> None:
    wanted = int(os.environ.get("PELLUCID_OBSERVED", "4000"))
    with Stage(tmp_path) as stage, CountingServer(stage["web"], 80) as server:
        stage.write("policy.yaml", RULES)
        a, web = stage["a"], stage["web"]
        with _without_file(stage) as instance:
            process = _observe(instance)
            process.send_signal(signal.SIGSTOP)
            with Load(a, web.addresses, 80, SITE, parallel=4) as load:
                assert eventually(lambda: server.accepted > wanted, 60.0)
                begun = time.monotonic()
                assert get(a, web.ipv4, 80, SITE).end == "answered"
                single_s = time.monotonic() - begun
            process.send_signal(signal.SIGCONT)
            opened = sum(load.ended.values()) + 1
            shown, lost = _all(process, opened, lambda: get(a, web.ipv4, 80, SITE).end)
    figure(
        "an observer that stops reading",
        f"{opened} connections all answered, {shown} shown and {lost} told as lost; one beside the load {single_s * 1000:.0f} ms",
    )
    assert load.ended == {"ok": opened - 1}
    assert lost > 0
    assert single_s < 1.0


def _all(process: subprocess.Popen[str], opened: int, once_more: object) -> tuple[int, int]:
    """(shown, lost) when all that were opened are told of; the news of a loss travels with the next record."""
    assert process.stdout is not None
    assert process.stderr is not None
    assert callable(once_more)
    counts = {"shown": 0, "lost": 0, "more": 0}

    def read_flows() -> None:
        for _ in process.stdout or ():
            counts["shown"] += 1

    def read_losses() -> None:
        for line in process.stderr or ():
            counts["lost"] += int(line.split()[0]) if "reads too slowly" in line else 0

    threads = [threading.Thread(target=each) for each in (read_flows, read_losses)]
    for thread in threads:
        thread.start()

    def told() -> bool:
        if counts["shown"] + counts["lost"] == opened + counts["more"]:
            return counts["lost"] > 0
        if once_more() == "answered":
            counts["more"] += 1
        time.sleep(0.2)
        return False

    complete = eventually(told, 30.0)
    process.send_signal(signal.SIGINT)
    for thread in threads:
        thread.join(30)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(30) == 0
    assert complete, (counts, opened)
    return counts["shown"], counts["lost"]
