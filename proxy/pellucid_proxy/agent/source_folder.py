"""A folder of manifests as where a node's policy comes from."""

from __future__ import annotations

import time

from .policy import Fresh, accept_folder
from .report import Report
from .source_files import FolderWatch, fingerprint, written_at

PLAUSIBLE_AGE_S = 10.0  # a file written longer ago was moved here now: its own time says nothing of when


class FolderSource:
    """source.Source. A change counts from when it is made, also before first() or read()."""

    name = "folder"
    comes_later = False

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._seen = fingerprint(folder)
        self._watch = FolderWatch(folder, self._seen)

    async def run(self) -> None:
        await self._watch.notice()

    async def first(self, patience_s: float) -> None:
        """There is always something to read, if only to be refused."""

    async def changed(self, patience_s: float | None) -> float:
        previous, self._seen = self._seen, await self._watch.changed(patience_s)
        noticed = time.time()
        written = written_at(self._seen, previous)
        if written is None or not 0 <= noticed - written <= PLAUSIBLE_AGE_S:
            return noticed
        return written

    def read(self) -> Fresh:
        return accept_folder(self._folder)

    async def stays(self) -> bool:
        """Who stops a run on a machine of its own wants it away."""
        return False

    async def tell(self, report: Report) -> None:
        """Who wrote the folder asks `pellucid status`."""

    async def left(self) -> None: ...
