"""Connections of every kind, while pods and policies come and go: nothing of them is left, and every one is accounted for."""

from __future__ import annotations

import os
from pathlib import Path

from tests.conftest import form
from tests.soak.run import Plan, Soak

from .conftest import Figure

SEED = 10
CONNECTIONS = int(os.environ.get("PELLUCID_SOAK_CONNECTIONS") or {"compiled": 100_000, "uncompiled": 20_000}[form()])
"""`make soak` has a million."""
WARM_UP = max(CONNECTIONS * 3 // 10, 10_000)
"""The first thousands of flow records fill the agent's history (settings: flow_history_bytes), and its allocator settles."""


def test_nothing_is_left_of_many_connections(tmp_path: Path, figure: Figure) -> None:
    print(f"seed {SEED}")
    with Soak(tmp_path, Plan(CONNECTIONS, SEED, warm_up=WARM_UP), print) as soak:
        outcome = soak.run()
    found = {bound.what: bound.found for bound in outcome.bounds}
    drift = ", ".join(
        f"{name} {found[f'memory of {name}'].partition('(')[2].partition(')')[0]}" for name in soak.processes
    )
    figure(
        "soak",
        f"{len(outcome.bounds) - len(outcome.broken)} of {len(outcome.bounds)} bounds hold after {outcome.connections:,} connections at "
        f"{outcome.connections / outcome.seconds:,.0f} a second and {outcome.rounds} rounds of changes; memory {drift}",
    )
    assert outcome.broken == []
