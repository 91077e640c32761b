"""The process behind `pellucid run`: it owns the listening sockets, starts agent and workers, and ends them in order.

Belongs here: sockets, processes, signals, the lock of the state folder. Does not: policy, parsing, kernel rules. It is what must not
crash, and is started again where it does (guardian.py).
"""

from .main import run
from .options import BAD_POLICY, FAILED, REFUSED, STOPPED, RunOptions

__all__ = ["BAD_POLICY", "FAILED", "REFUSED", "STOPPED", "RunOptions", "run"]
