"""Tests of the whole product. Each says its figure, on the terminal and in build/figures.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import form

FIGURES = Path(__file__).parents[3] / "build" / "figures.json"

Figure = Callable[[str, object], None]
_said: dict[str, str] = {}


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Figure:
    """figure(row, value): what a promise of docs/promises.md comes to, as measured."""

    def say(row: str, value: object) -> None:
        record_property(row, value)
        _said[row] = str(value)

    return say


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _said:
        return
    terminalreporter.section(f"figures ({form()} engine)")
    for row, value in _said.items():
        terminalreporter.write_line(f"{row}: {value}")
    FIGURES.parent.mkdir(exist_ok=True)
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    known.setdefault(form(), {}).update(_said)
    FIGURES.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
