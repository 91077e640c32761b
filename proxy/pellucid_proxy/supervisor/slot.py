"""One worker's place in a run."""

from __future__ import annotations

import os
import socket

from .backoff import Backoff
from .children import Child
from .handover import InheritedWorker


class Slot:
    """One worker, whichever process it is. control and flows: the agent's ends of its channel and of its pipe (-1: none), kept open
    here: what is in them waits for the next agent when one ends. inherited: it is leaving, and no child of ours."""

    def __init__(self, index: int, inherited: InheritedWorker | None = None) -> None:
        self.index = index
        self.leaving = inherited is not None
        self.child: Child | None = None
        self.control = None if inherited is None else socket.socket(fileno=inherited.control)
        self.flows = -1 if inherited is None else inherited.flows
        self.backoff = Backoff()

    def let_go(self) -> None:
        """Close the agent's ends; may be called twice."""
        if self.control is not None:
            self.control.close()
            self.control = None
        if self.flows >= 0:
            os.close(self.flows)
            self.flows = -1
