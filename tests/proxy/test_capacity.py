"""How many connections descriptors are enough for."""

from __future__ import annotations

import msgspec
import pytest

from pellucid_proxy.capacity import RESERVED, within
from pellucid_proxy.settings import NodeSettings

SETTINGS = NodeSettings(scope=(), max_connections=1000, max_connections_per_pod=250, max_pending_per_pod=60)


def test_enough_descriptors_change_nothing_and_the_rest_is_for_pipes() -> None:
    fitted, pipes = within(SETTINGS, 100_000)
    assert fitted == SETTINGS
    assert 2 * (pipes + fitted.max_connections) <= 100_000 - RESERVED


@pytest.mark.parametrize("descriptors", [0, 64, 72, 100, 256, 1024, 2000, 2731])
def test_what_is_promised_can_be_kept(descriptors: int) -> None:
    fitted, pipes = within(SETTINGS, descriptors)
    assert 1 <= fitted.max_connections <= 1000
    assert pipes >= 1
    if descriptors >= RESERVED + 8:
        assert 2 * (fitted.max_connections + pipes) <= descriptors - RESERVED
    for limit in ("max_connections_per_pod", "max_pending_per_pod"):
        assert 1 <= getattr(fitted, limit) <= getattr(SETTINGS, limit)


def test_a_pod_gets_a_part_of_what_is_left_unless_it_was_said() -> None:
    open_ = msgspec.structs.replace(SETTINGS, max_connections_per_pod=0, max_pending_per_pod=0)
    fitted, _ = within(open_, RESERVED + 8 * 50)
    assert (fitted.max_connections, fitted.max_connections_per_pod, fitted.max_pending_per_pod) == (150, 38, 38)
    said, _ = within(msgspec.structs.replace(open_, max_connections_per_pod=140), RESERVED + 8 * 50)
    assert (said.max_connections, said.max_connections_per_pod, said.max_pending_per_pod) == (150, 140, 140)
    many, _ = within(NodeSettings(scope=()), 1 << 20)
    assert (many.max_connections, many.max_connections_per_pod, many.max_pending_per_pod) == (65536, 16384, 8192)
