"""verify finds nothing wrong with no proxy and with a right one, and finds each fault of a wrong one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
STREAMS = 60


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drivers")
    subprocess.run(["make", "-s", "-C", ROOT / "bench/drivers", f"OUT={folder}"], check=True)
    return folder


def listening(address: str) -> str:
    """Shell: wait until the last port of verify is open, or fail if the process that should open it is gone."""
    return f"until ss -Hltn 'src {address} and sport = :5006' | grep -q .; do kill -0 $! || exit 1; done"


def verify(drivers: Path, destination: str, relay: str = "", *, size: int = 200_000, seed: int = 7) -> dict[str, Any]:
    """The result of loadgen's verify in a sandbox, through the relay if one is named."""
    script = f"""
        {drivers}/origin 127.0.0.1 & ends=$!
        {listening("127.0.0.1")}
        if [ -n "{relay}" ]; then
            {sys.executable} {HERE}/faulty_relay.py {relay} & ends="$ends $!"
            {listening("127.0.0.2")}
        fi
        {drivers}/loadgen verify -c 16 -n {STREAMS} -s {size} -r {seed} -a {destination}
        status=$?
        kill $ends
        exit $status
    """
    command = [sys.executable, "-m", "pellucid_cli.lab.sandbox", "sh", "-c", script]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    return dict(json.loads(finished.stdout))


@pytest.mark.parametrize("size", [2, 1500, 200_000, 5_000_000])
def test_nothing_is_wrong_without_a_proxy(drivers: Path, size: int) -> None:
    found = verify(drivers, "127.0.0.1", size=size)
    assert (found["ok"], found["seed"]) == (STREAMS, 7), found


def test_nothing_is_wrong_with_a_right_relay(drivers: Path) -> None:
    found = verify(drivers, "127.0.0.2", "none")
    assert found["ok"] == STREAMS, found


@pytest.mark.parametrize(
    ("fault", "courses"),
    [
        ("resets-as-ends", {"quiet reset", "sudden reset"}),
        ("no-half-close", {"early end"}),
        ("flipped-byte", {"plain"}),
        ("dropped-byte", {"plain"}),
    ],
)
def test_every_fault_is_found(drivers: Path, fault: str, courses: set[str]) -> None:
    found = verify(drivers, "127.0.0.2", fault)
    wrong = {course for course, count in found["wrong"].items() if count}
    assert found["ok"] < STREAMS
    assert wrong >= courses, found
    assert (found["wrong_bytes"] > 0) == (fault in ("flipped-byte", "dropped-byte", "no-half-close")), found


def test_the_same_seed_makes_the_same_courses(drivers: Path) -> None:
    results = [verify(drivers, "127.0.0.2", "flipped-byte", seed=seed) for seed in (1, 1, 2)]
    first, again, other = (
        [text.split(":")[:2] for text in result["examples"] if "plain" in text] for result in results
    )
    assert first
    assert first == again != other
