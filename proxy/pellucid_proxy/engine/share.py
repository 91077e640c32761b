"""What one pod has of a worker: limits are a pod's as well as a worker's, so that one pod cannot use up what all need."""

from __future__ import annotations

import cython


@cython.cclass
class Share:
    """The connections of the pod that has this address (its first one, packed), now. share.pxd has the fields.

    connections: all of them; pending: those without a verdict or an upstream yet. held: bytes that wait in this process or in its pipes
    for a peer that does not read; a pipe counts as 64 KiB at least. session/desk.py counts connections, the engine the rest.
    """

    if not cython.compiled:
        pod: bytes
        connections: int
        pending: int
        held: int

    def __init__(self, pod: bytes = b"") -> None:
        self.pod = pod
        self.connections = self.pending = 0
        self.held = 0
