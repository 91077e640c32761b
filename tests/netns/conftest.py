"""Every test in this folder runs in a sandbox; where the kernel allows none, they all fail and say the cure."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pellucid_cli.lab import sandbox
from pellucid_cli.lab.topology import Topology

from .world import World

_refused: sandbox.SandboxError | None = None
try:
    sandbox.enter()  # here, because now the process has one thread
except sandbox.SandboxError as err:
    _refused = err


@pytest.fixture(scope="session", autouse=True)
def _in_a_sandbox() -> None:
    if _refused is not None:
        raise _refused


@pytest.fixture
def topology() -> Iterator[Topology]:
    with Topology() as built:
        yield built


@pytest.fixture
def world() -> Iterator[World]:
    with World() as built:
        yield built
