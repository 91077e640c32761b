"""What `pellucid run` was asked for, and how it ends."""

from __future__ import annotations

import msgspec

from ..settings import Marks

STOPPED, FAILED, BAD_POLICY, REFUSED = 0, 1, 2, 3
"""Exit statuses: stopped on request; other failure; wrong usage or bad policy at the start; no rights, or preflight refused."""


LAST_GOOD = "last-good.msgpack"
"""In the state folder: the last good policy (agent/last_good.py). Known here, for the processes that have no policy load no parser."""


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The command line, not yet checked. What is None or empty is taken from the folder's TransparentProxy object, or else the default.

    policy: folder of YAML files; "": the cluster's API server says (cluster). scope, exclude, allow_dial: CIDRs (settings.NodeSettings).
    state: folder of lock, status socket and last good policy; made if missing.
    metrics: ADDR:PORT to serve Prometheus on. flows: file that flow records are appended to, - for standard output; None: no records.
    drain_s: how long live connections may go on after the first SIGTERM or SIGINT. node: this node's name, by default the host's.
    takeover: take the place of the instance that runs with this state folder, if one does.
    handover_drain_s: how long live connections may go on after another instance has taken this one's place.
    instance: what this run is called among those that take each other's place; "": by its process id.
    worker_user: whose workers are: NAME, UID, UID:GID, or same; "": rights/users.py.
    """

    policy: str = ""
    cluster: bool = False
    scope: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    allow_dial: tuple[str, ...] = ()
    state: str = "/var/lib/pellucid"
    metrics: str | None = None
    flows: str | None = None
    drain_s: float = 30.0
    node: str = ""
    workers: int | None = None
    source_address: str | None = None
    listen_port: int | None = None
    marks: Marks | None = None
    log_level: str = "INFO"
    takeover: bool = False
    handover_drain_s: float = 86400.0
    worker_user: str = ""
    instance: str = ""


class Refusal(Exception):
    """The run cannot go on: what is wrong and its cure, and the exit status that says so."""

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status
