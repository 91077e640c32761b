"""A process that ends now and then is back at once; one that cannot live is tried ever more seldom."""

from __future__ import annotations

from pellucid_proxy.supervisor.backoff import AT_ONCE, LONGEST_S, WINDOW_S, Backoff


def test_the_first_ends_cost_no_wait_and_more_of_them_ever_longer_ones() -> None:
    backoff = Backoff()
    waits = [backoff.ended(now=float(second)) for second in range(AT_ONCE + 12)]
    assert waits[:AT_ONCE] == [0.0] * AT_ONCE
    assert waits[AT_ONCE:] == sorted(waits[AT_ONCE:])
    assert 0 < waits[AT_ONCE] < waits[-1] == LONGEST_S
    assert backoff.ends == len(waits)


def test_ends_long_ago_are_forgotten() -> None:
    backoff = Backoff()
    for second in range(AT_ONCE + 3):
        backoff.ended(float(second))
    assert backoff.ended(WINDOW_S * 3) == 0.0
