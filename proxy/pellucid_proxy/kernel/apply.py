"""The table in the kernel: loaded, changed, read and removed by nft(8), always in one transaction, and no other table touched."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
from collections.abc import Callable, Iterator

from ..settings import NodeSettings
from .nftables import inventory
from .restoration import restoration
from .ruleset import EVENTS, CounterKey, change, counter_keys, marker, removal, ruleset
from .state import KernelState, boot_hold
from .totals import Count, Totals

_TIMEOUT_S = 30.0
_LARGE = 500  # rules that take longer to load than a pod may be left unjudged: about 0.1 s


class KernelError(RuntimeError):
    """The kernel or nft refused. The message says what and the cure."""


def nft(*arguments: str, text: str = "", started: Callable[[int], None] | None = None) -> str:
    """The output of nft with arguments, text on its standard input; or KernelError with its own words and the cure.

    started: gets the process id, before anything is changed."""
    try:
        with subprocess.Popen(
            ["nft", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            if started is not None:
                started(process.pid)
            try:
                out, err = process.communicate(text, timeout=_TIMEOUT_S)
            except BaseException:
                process.kill()
                raise
    except FileNotFoundError as missing:
        raise KernelError("nft: the command is missing; install the package nftables (1.0 or later)") from missing
    except subprocess.TimeoutExpired as late:
        raise KernelError(
            f"nft: no answer in {_TIMEOUT_S:.0f} s; look for a process that holds nftables (`fuser`, `ps`)"
        ) from late
    if process.returncode != 0:
        raise KernelError(f"nft: {_first_error(err)}; {_cure(err)}")
    return out


def load(text: str, started: Callable[[int], None] | None = None) -> None:
    """The kernel holds what text says, in one transaction, or KernelError and nothing has changed."""
    nft("-f", "-", text=text, started=started)


def _first_error(said: str) -> str:
    for line in said.splitlines():
        _, found, what = line.partition("Error: ")
        if found:
            return what[:500]
    return said.strip()[:500] or "failed without a word"


def _cure(said: str) -> str:
    if "Operation not permitted" in said:
        return "give the process the capability NET_ADMIN"
    if "Message too long" in said:  # without real root, nft cannot enlarge its socket buffer
        return "this rule set is more than an ordinary user may send at once: run as root, or raise `sysctl net.core.wmem_max`"
    if "syntax error" in said:
        return "this nft does not know our syntax: 1.0 or later is needed, 1.0.6 is known to work"
    if "Could not process rule" in said:
        return (
            "the kernel lacks a feature: it needs nftables with tproxy, socket, fib, ct and nat (Linux 5.10 or later)"
        )
    return "see `nft list tables` and `dmesg`"


class Kernel:
    """The table of one node. Not for several threads at once; one owner at a time.

    The rules stay when the process ends, however it ends: remove() is for leaving clean.
    """

    def __init__(self, settings: NodeSettings) -> None:
        self._settings = settings
        self._state: KernelState | None = None  # what is loaded, if we know
        self._rules: Totals[CounterKey] = Totals()
        self._events: Totals[str] = Totals()
        self._loaders: list[int] = []

    def take_loaders(self) -> list[int]:
        """The ids of the processes by which this Kernel changed tables since the last call; all have ended."""
        taken, self._loaders = self._loaders, []
        return taken

    @property
    def state(self) -> KernelState | None:
        """What is loaded, as far as we did it; None: not known."""
        return self._state

    def restore(self) -> None:
        """The table holds again what was applied last, whatever others made of it; live connections are left alone. Raises KernelError."""
        if self._state is None:
            return
        with contextlib.suppress(KernelError):  # counters that are gone are lost; the others would start anew below
            self._collect()
        if _is_large(self._state):
            # What takes seconds to load would let everything pass so long. The workers know the policy and judge what is held for them.
            self._load(ruleset(boot_hold(self._settings)))
        try:
            text = restoration(self._state, inventory(self._settings.table))
        except OSError as err:
            raise KernelError(f"netlink: {err}; the process needs the capability NET_ADMIN") from err
        try:
            self._load(text)
        except KernelError:  # something of ours has another type or hook now
            whole = ruleset(dataclasses.replace(self._state, adopt=False))
            if text == whole:
                raise
            self._load(whole)

    def _load(self, text: str) -> None:
        load(text, self._loaders.append)

    def apply(self, state: KernelState) -> None:
        """The kernel holds state, wholly or (KernelError) not at all; live connections are left alone."""
        if state.settings.table != self._settings.table:
            raise ValueError(
                f"settings.table: {state.settings.table!r} is not the table {self._settings.table!r} of this Kernel"
            )
        text = ruleset(state) if self._state is None else change(self._state, state)
        if not text:
            return
        if self._state is not None and self._replaces(text):
            self._collect()
        try:
            self._load(text)
        except KernelError:
            if self._state is None or text.startswith(removal(self._settings)):
                raise
            # Somebody else changed our table: what we would change is not as we left it.
            self._state = None
            text = ruleset(state)
            self._load(text)
        self._state = state

    def recognise(self, state: KernelState) -> bool:
        """Whether the table holds state, loaded by a process before this one; then apply() goes on from there. Raises KernelError.

        By the chain that is named after it (ruleset.marker): to read back the rules themselves takes seconds where there are many.
        """
        try:
            nft("--terse", "list", "chain", "inet", self._settings.table, marker(state))
        except KernelError as err:
            if "No such file or directory" in str(err):
                return False
            raise
        self._state = state
        return True

    def remove(self) -> None:
        """There is no table of ours. Does nothing where there was none. Raises KernelError."""
        self._collect()
        self._load(removal(self._settings))
        self._state = None

    def counters(self) -> dict[CounterKey, Count]:
        """(packets, bytes) of every rule since this Kernel was made; TCP counts by its SYNs. Never goes backwards. Raises KernelError."""
        self._collect()
        return self._rules.sums()

    def events(self) -> dict[str, Count]:
        """(packets, bytes) of ruleset.EVENTS since this Kernel was made. Never goes backwards. Raises KernelError."""
        self._collect()
        return dict.fromkeys(EVENTS, (0, 0)) | self._events.sums()

    def _replaces(self, text: str) -> bool:
        """Whether counters start anew with it."""
        return "table inet" in text.partition("{")[0]

    def _collect(self) -> None:
        """Everything counted since the last call is in our sums."""
        if self._state is None:
            return
        keys = counter_keys(self._state)
        for name, (packets, size) in _take_counters(self._settings.table):
            if name in keys:
                self._rules.add(keys[name], packets, size)
            elif name in EVENTS:
                self._events.add(name, packets, size)


def _is_large(state: KernelState) -> bool:
    rules = sum(len(group.leading) + len(group.nameless) for group in state.groups)
    return not (state.hold or state.drain) and rules > _LARGE


def _take_counters(table: str) -> Iterator[tuple[str, Count]]:
    """The named counters of our table, which then stand at zero; none where the table is gone: a flush is healed elsewhere.

    Not `list`: that reads every chain and set too, two seconds for 20,000 rules; and between a list and a replacement counts get lost.
    """
    try:
        said = nft("-j", "reset", "counters", "table", "inet", table)
    except KernelError as err:
        if "No such file or directory" in str(err):
            return
        raise
    for entry in json.loads(said)["nftables"]:
        if "counter" in entry:
            counter = entry["counter"]
            yield counter["name"], (counter["packets"], counter["bytes"])
