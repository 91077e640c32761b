"""What a run that was killed has left is taken away."""

from __future__ import annotations

import os

from ..kernel import routing, trace
from ..kernel.apply import KernelError, load, nft
from ..kernel.instance import claim
from ..kernel.ruleset import removal
from ..settings import Marks, NodeSettings
from ..supervisor import handover
from ..supervisor.lock import locked
from . import last_good, status
from .data_path import leave_no_trace
from .node_settings import marks


def cleanup(state: str) -> list[str]:
    """Nothing of a run with that state folder is left but its last good policy; returns what was, for people.

    Raises Refusal or KernelError while an instance runs, or where the kernel refuses.
    """
    removed = []
    with locked(state), claim(settings := _settings(state)):
        if _table_is_there(settings):
            load(removal(settings))
            removed.append(f"table inet {settings.table}")
        removed += routing.left(settings)
        routing.remove(settings)
        left = trace.read(state)
        if left.sysctls:
            removed.append("sysctls of connection tracking")
        leave_no_trace(state, left)
        for socket in (os.path.join(state, name) for name in (status.NAME, handover.NAME)):
            if os.path.lexists(socket):
                os.unlink(socket)
                removed.append(socket)
    return removed


def _settings(state: str) -> NodeSettings:
    """With the marks that the run had, as far as the folder knows; all else in the kernel is the same for every run."""
    try:
        mask = last_good.load(state).wishes.marks_mask
    except last_good.Unusable:
        mask = None
    return NodeSettings(scope=(), marks=Marks() if mask is None else marks(mask))


def _table_is_there(settings: NodeSettings) -> bool:
    try:
        nft("--terse", "list", "table", "inet", settings.table)
    except KernelError as err:
        if "No such file or directory" in str(err):
            return False
        raise
    return True
