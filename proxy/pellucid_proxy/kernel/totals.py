"""Counts added up over every table that was ever read, so that they never go backwards. Pure."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Count = tuple[int, int]  # packets, bytes


class Totals(Generic[Key]):
    """What was counted so far, by key."""

    def __init__(self) -> None:
        self._sums: dict[Key, Count] = {}

    def add(self, key: Key, packets: int, size: int) -> None:
        """Another packets packets of size bytes together."""
        before = self._sums.get(key, (0, 0))
        self._sums[key] = (before[0] + packets, before[1] + size)

    def sums(self) -> dict[Key, Count]:
        """(packets, bytes) of every key ever added."""
        return dict(self._sums)
