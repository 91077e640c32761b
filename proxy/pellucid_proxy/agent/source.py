"""Where a node's policy comes from: a folder of manifests, or a cluster's API server."""

from __future__ import annotations

from typing import Protocol

from .policy import Fresh
from .report import Report


class Source(Protocol):
    """name: as status says it. comes_later: what is bad or away at the start is waited for, and settings that a running node cannot change
    come with the pod that takes its place; a folder's are refused, for whoever started the run stands by."""

    name: str
    comes_later: bool

    async def run(self) -> None:
        """Notice changes; until cancelled."""

    async def first(self, patience_s: float) -> None:
        """Returns when there is something to read. Raises BadPolicy with the reason when there is nothing after patience_s."""

    async def changed(self, patience_s: float | None) -> float:
        """Waits until read() may give something else than the last time and the source holds still, or for patience_s (None: for ever).

        Returns when the change was made, as far as that is known, in seconds since the epoch."""
        ...

    def read(self) -> Fresh:
        """What is to be enforced now. Raises BadPolicy and nothing else. May take seconds: to be called in a thread."""
        ...

    async def stays(self) -> bool:
        """Whether, though this run is told to stop, another one will come in its place: then its rules stay."""
        ...

    async def tell(self, report: Report) -> None:
        """Keep who gave the policy told of what became of it; until cancelled, or at once where nobody wants to know."""

    async def left(self) -> None:
        """This run has taken its rules away."""
