"""Live flows that the kernel alone let pass are decided again after a change, and those that may not go on are ended (ADR 24)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from .conntrack import Connection, connections, mark
from .judgement import Era, Fate, concerned, fate
from .slipped import without_own


def review(eras: Sequence[Era], own: Collection[bytes]) -> Counter[Fate]:
    """No flow goes on that the last of eras would not let pass, but for those that a rule with Keep allowed; how many met which fate.

    eras: as of judgement.fate; the kernel enforces the last one already. own: the node's addresses, packed. Connections of the proxy
    itself are left to the workers. Those that are over are ended, too, lest they begin again, but do not count. Reads the whole table
    of connection tracking. Raises OSError.
    """
    marks = eras[-1].state.settings.marks
    met: dict[Fate, list[Connection]] = {each: [] for each in Fate}
    of_neither = (
        marks.egress & marks.ended & ~marks.kept
    )  # a bit by which the kernel leaves most of a busy node's entries out
    for flow in connections(0, concerned(eras), unmarked=of_neither):
        marked = flow.mark & marks.mask
        if marked in (marks.egress, marks.ended):
            continue
        local = flow.target in own
        what = fate(eras, flow.source, flow.target, flow.protocol, flow.port, flow.began_ns, local=local)
        if what is Fate.POD_CHANGED or (what is not Fate.GOES_ON and marked != marks.kept):
            met[what].append(flow)
    found = {what: without_own(flows) for what, flows in met.items()}
    for what, flows in found.items():
        mark(flows, marks.kept if what is Fate.KEPT else marks.ended, marks.mask)
    return Counter({what: sum(not flow.over for flow in flows) for what, flows in found.items()})
