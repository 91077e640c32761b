"""From a table that somebody else has changed to what it should hold. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from .ruleset import body, declared, ruleset, table_name
from .state import KernelState

_LEARNT = ("adopting", "stranger4", "stranger6", "rate4", "rate6")
"""Sets whose elements come from traffic or end by themselves: what they hold stays."""


class Inventory(NamedTuple):
    """The names in a table. others: whether it holds anything of another kind."""

    chains: frozenset[str]
    sets: frozenset[str]
    maps: frozenset[str]
    counters: frozenset[str]
    others: bool


def restoration(state: KernelState, present: Inventory) -> str:
    """One transaction after which a table that holds present holds state and nothing else.

    As in a renewal (ADR 9), chains and sets that are there stay and are filled anew, all of them, since what is in them is not known;
    the rest is put there again. Connections from before our own start are not let in a second time.
    """
    state = replace(state, adopt=False)
    if present.others or not present.chains:
        return ruleset(state)
    table = f"inet {table_name(state.settings)}"
    lines = list(body(state))
    wanted = declared(lines)
    kinds = (("chain", present.chains), ("set", present.sets), ("map", present.maps), ("counter", present.counters))
    there = {(kind, name) for kind, names in kinds for name in names}
    foreign = sorted(there - wanted, key=lambda each: (each[0] == "chain", each))
    filled = sorted(each for each in there & wanted if each[0] in ("set", "map") and each[1] not in _LEARNT)
    return "".join(
        f"{line}\n"
        for line in (
            f"flush table {table}",
            *(f"flush {kind} {table} {name}" for kind, name in filled),
            *(f"delete {kind} {table} {name}" for kind, name in foreign),
            f"table {table} {{",
            *lines,
            "}",
        )
    )
