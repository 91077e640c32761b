"""Commands are tested as people start them: outside of any sandbox, though the test run itself may live in one (tests/netns)."""

from __future__ import annotations

import pytest

from pellucid_cli.lab.sandbox import MARKER


@pytest.fixture(autouse=True)
def _as_if_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MARKER, raising=False)
