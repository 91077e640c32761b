"""A limit that is near is told, with its cure; one that is not, or is unknown, is not."""

from __future__ import annotations

import pytest

from pellucid_proxy.agent.strain import strains
from pellucid_proxy.control import Series


def worker(active: int, most: int = 100) -> list[Series]:
    return [Series("connections_active", "gauge", (), active), Series("connections_limit", "gauge", (), most)]


@pytest.mark.parametrize(("tracked", "most"), [(None, None), (None, 10), (10, None), (0, 0), (89, 100)])
def test_far_from_a_limit_nothing_is_said(tracked: int | None, most: int | None) -> None:
    assert strains(tracked, most, {0: worker(89), 1: []}) == ()


def test_what_is_near_is_named_with_its_cure() -> None:
    tracking, busy = strains(90, 100, {0: worker(1), 1: worker(90)})
    assert "90 of 100 entries" in tracking and "Cure: raise net.netfilter.nf_conntrack_max" in tracking
    assert busy.startswith("worker 1 holds 90 of 100 connections") and "Cure: " in busy
