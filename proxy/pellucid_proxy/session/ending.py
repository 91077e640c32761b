"""Why a connection ended, and whose doing it was."""

from __future__ import annotations

from typing import NamedTuple


class Ending(NamedTuple):
    """by: peers (both streams ended), client, upstream or proxy. why: bounded, a label of metrics and records."""

    by: str
    why: str


ENDINGS: tuple[Ending, ...] = (
    Ending("peers", "End"),
    Ending("client", "ClientReset"),
    Ending("upstream", "UpstreamReset"),
    Ending("upstream", "UpstreamUnreachable"),
    Ending("upstream", "ConnectTimeout"),
    Ending("proxy", "IdleTimeout"),
    Ending("proxy", "Refused"),
    Ending("upstream", "UpstreamProxyRefused"),
    Ending("proxy", "Shutdown"),
    Ending("proxy", "InternalError"),
    Ending("proxy", "PolicyChanged"),  # what the policy that came says of it: another verdict, or another way
    Ending("proxy", "PodChanged"),  # the address is another pod's now, or nobody's
)
"""By the engine's number (engine/relay.py: END … POD_CHANGED)."""
