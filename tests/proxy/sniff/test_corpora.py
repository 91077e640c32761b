"""The fuzz targets on their seeds and a few mutations, so that a broken oracle or parser shows without a long run."""

from __future__ import annotations

import random

import pytest

from fuzz.mutate import mutated
from fuzz.run import TARGETS as FOLDERS
from fuzz.run import main, seeds
from fuzz.targets import TARGETS


def test_every_target_has_seeds_and_every_folder_a_target() -> None:
    assert sorted(TARGETS) == FOLDERS
    assert all(seeds(target) for target in TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_everything_holds_on_seeds_and_their_mutations(target: str) -> None:
    pool = seeds(target)
    choose = random.Random(3)
    for data in [*pool, *(mutated(pool, choose) for _ in range(300))]:
        TARGETS[target](data)


def test_a_short_run_says_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--target", "names", "--executions", "50", "--engine", "own"]) == 0
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()] == [
        ["target", "executions", "crashes"],
        ["names", "50", "0"],
    ]
