"""One owner of the rules in a network namespace at a time."""

from __future__ import annotations

import errno
import socket

from ..settings import NodeSettings
from .apply import KernelError


def claim(settings: NodeSettings) -> socket.socket:
    """This process owns settings.table until the socket that is returned is closed, by the caller or by the process's end.

    Raises KernelError if another process owns it. The name is abstract (unix(7)): it belongs to the network namespace as the
    table does, and leaves nothing behind.
    """
    owner = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        owner.bind(f"\0pellucid/{settings.table}")
    except OSError as err:
        owner.close()
        if err.errno != errno.EADDRINUSE:
            raise KernelError(f"claim of table {settings.table}: {err}; permit AF_UNIX sockets") from err
        raise KernelError(
            f"settings.table: another pellucid owns the table {settings.table} in this network namespace; stop it "
            "(`ss -xlp | grep pellucid` shows it), or run in a namespace of its own"
        ) from err
    return owner
