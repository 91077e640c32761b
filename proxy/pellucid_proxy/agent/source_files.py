"""A folder of manifests: read as one whole, and noticed when it changes by whatever means."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass

import watchfiles

ENDINGS = (".yaml", ".yml", ".json")
MAX_FILE_BYTES = 16 << 20
MAX_DEPTH = 8  # of folders in folders: a symlink may lead in circles

DEBOUNCE_MS = 100  # events of the kernel are gathered so long at most
LOOK_MS = 100  # how often watchfiles looks whether there are any: each look wakes a CPU that traffic may need
SETTLE_S = 0.02  # no change for so long: nobody is in the middle of writing
MAX_SETTLE_S = 0.5  # a folder that changes all the time is read nevertheless
POLL_S = 0.25  # events are the quick way, this the sure one: a folder renamed, a symlink switched far away, a network file system

Fingerprint = tuple[tuple[str, tuple[int, ...]], ...]
"""Path and identity of every manifest, in order of path; changes whenever one is written, replaced, added or removed."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """path: as people find it, beginning with the folder's own."""

    path: str
    content: bytes


class UnreadableFolder(Exception):
    """The folder cannot be read as a whole. problems: one line each, naming the file and the cure."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def read_folder(folder: str) -> tuple[SourceFile, ...]:
    """All manifests (*.yaml, *.yml, *.json) in folder and the folders in it, as they were at one moment, in order of path.

    Names that begin with a dot or end with ~ are not manifests (editors' files, the hidden halves of a mounted ConfigMap).
    Raises UnreadableFolder: a file that cannot be read is never left out, and emptiness is refused, for a policy that is half
    there lets through what the whole refuses.
    """
    for _ in range(5):  # the folder may change under our hands: take no mixture of two states
        before = fingerprint(folder)
        files = _read(folder, before)
        if fingerprint(folder) == before:
            return files
    raise UnreadableFolder([f"{folder}: changes faster than it can be read; write to another folder and rename it"])


def fingerprint(folder: str) -> Fingerprint:
    """What the folder holds now, without reading files. Never raises: what cannot be looked at is part of the answer."""
    return tuple(sorted(_entries(folder, 0)))


def written_at(fingerprint: Fingerprint, previous: Fingerprint) -> float | None:
    """When the newest file that differs was written, in seconds since the epoch; None if only removals differ."""
    times = [max(identity[3:]) for path, identity in set(fingerprint) - set(previous) if len(identity) == 5]
    return max(times) / 1e9 if times else None


class FolderWatch:
    """Tells when a folder holds something else than before. notice() is to run as a task for as long as changed() is waited for."""

    def __init__(self, folder: str, seen: Fingerprint) -> None:
        self._folder = folder
        self._seen = seen
        self._wake = asyncio.Event()
        self._moved = asyncio.Event()  # the name leads to another folder than the one that is watched
        self._watched = _identity(folder)
        self._poll_s = POLL_S

    async def notice(self) -> None:
        """Wakes changed() as soon as the kernel tells of a change; runs until it is cancelled."""
        while True:
            self._moved.clear()
            self._watched = _identity(self._folder)
            with contextlib.suppress(
                OSError, RuntimeError
            ):  # the folder is away, or inotify at its limits: changed() polls
                async for _ in watchfiles.awatch(
                    self._folder,
                    watch_filter=None,
                    debounce=DEBOUNCE_MS,
                    step=LOOK_MS,
                    stop_event=self._moved,
                    ignore_permission_denied=True,
                ):
                    self._wake.set()
            await asyncio.sleep(POLL_S)

    async def changed(self, patience_s: float | None = None) -> Fingerprint:
        """Waits until the folder differs from the last answer and holds still, or for patience_s."""
        deadline = float("inf") if patience_s is None else time.monotonic() + patience_s
        while time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll_s):
                    await self._wake.wait()
            self._wake.clear()
            if self._look() != self._seen:
                self._seen = await self._settled()
                break
        return self._seen

    async def _settled(self) -> Fingerprint:
        deadline = time.monotonic() + MAX_SETTLE_S
        now = self._look()
        while True:
            await asyncio.sleep(SETTLE_S)
            before, now = now, self._look()
            if now == before or time.monotonic() > deadline:
                return now

    def _look(self) -> Fingerprint:
        start = time.monotonic()
        if _identity(self._folder) != self._watched:
            self._moved.set()
        found = fingerprint(self._folder)
        self._poll_s = max(POLL_S, 100 * (time.monotonic() - start))  # looking costs 1 % of a core at most
        return found


def _is_manifest(name: str) -> bool:
    return name.endswith(ENDINGS) and not _is_ignored(name)


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name.endswith("~")


def _identity(path: str) -> tuple[int, int] | None:
    """Which file or folder the name leads to now."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _entries(folder: str, depth: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Five numbers identify a file that can be looked at, one (the errno) stands for one that cannot."""
    if depth > MAX_DEPTH:
        yield folder, (errno.ELOOP,)
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as err:
        yield folder, (err.errno or errno.EIO,)
        return
    for entry in entries:
        if _is_ignored(entry.name):
            continue
        try:
            found = entry.stat()
        except OSError as err:
            if _is_manifest(entry.name):
                yield entry.path, (err.errno or errno.EIO,)
            continue
        if stat.S_ISDIR(found.st_mode):
            yield from _entries(entry.path, depth + 1)
        elif _is_manifest(entry.name):
            regular = stat.S_ISREG(found.st_mode)
            identity = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            yield entry.path, identity if regular else (errno.EINVAL,)


def _read(folder: str, entries: Fingerprint) -> tuple[SourceFile, ...]:
    if not entries:
        raise UnreadableFolder([f"{folder}: holds no manifest ({', '.join(ENDINGS)}); write one, if only a Namespace"])
    files, problems = [], []
    for path, identity in entries:
        try:
            files.append(SourceFile(path, _content(path, identity)))
        except (OSError, ValueError) as err:
            problems.append(
                f"{path}: {err.strerror if isinstance(err, OSError) else err}; make it readable or take it away"
            )
    if problems:
        raise UnreadableFolder(problems)
    return tuple(files)


def _content(path: str, identity: tuple[int, ...]) -> bytes:
    if len(identity) == 1:  # not opened: opening a named pipe would wait for its writer
        raise ValueError("is not a regular file" if identity[0] == errno.EINVAL else os.strerror(identity[0]))
    with open(path, "rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"is larger than {MAX_FILE_BYTES >> 20} MiB")
    if not content.strip():
        raise ValueError("is empty: perhaps it is being written")
    return content
