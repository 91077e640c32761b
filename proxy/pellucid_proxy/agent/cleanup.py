"""What a run that was killed has left is taken away."""

from __future__ import annotations

import os

from ..kernel import routing, trace
from ..kernel.apply import KernelError, load, nft
from ..kernel.instance import claim
from ..kernel.ruleset import removal
from ..settings import NodeSettings
from ..supervisor.lock import locked
from .data_path import leave_no_trace
from .status import NAME


def cleanup(state: str, settings: NodeSettings | None = None) -> list[str]:
    """Nothing of a run with that state folder is left but its last good policy; returns what was, for people.

    settings: where they differ from the defaults in table, marks or preferences. Raises Refusal or KernelError while an instance runs,
    or where the kernel refuses.
    """
    settings = settings or NodeSettings(scope=())
    removed = []
    with locked(state), claim(settings):
        if _table_is_there(settings):
            load(removal(settings))
            removed.append(f"table inet {settings.table}")
        removed += routing.left(settings)
        routing.remove(settings)
        if trace.read(state).sysctls:
            removed.append("sysctls of connection tracking")
        leave_no_trace(state)
        socket = os.path.join(state, NAME)
        if os.path.lexists(socket):
            os.unlink(socket)
            removed.append(socket)
    return removed


def _table_is_there(settings: NodeSettings) -> bool:
    try:
        nft("--terse", "list", "table", "inet", settings.table)
    except KernelError as err:
        if "No such file or directory" in str(err):
            return False
        raise
    return True
