"""What this node's settings are: the command line, then the folder's TransparentProxy object, then the defaults."""

from __future__ import annotations

import ipaddress
import os

import msgspec

from ..settings import Marks, NodeSettings
from ..supervisor.options import BAD_POLICY, Refusal, RunOptions

CLUSTER_HOLD_S = 2.0  # of a pod's first connections, which may come before its Pod object does


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    """What the TransparentProxy object says of the node; None: nothing. connections, connections_per_pod: of all workers together."""

    scope: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    source_address: str | None = None
    marks_mask: int | None = None
    workers: int | None = None
    connections: int | None = None
    connections_per_pod: int | None = None
    connection_rate_per_pod: int | None = None
    unknown_pod_hold_s: float | None = None
    unknown_pod_action: str | None = None


def node_settings(options: RunOptions, wishes: Wishes) -> NodeSettings:
    """The settings that hold. Raises Refusal naming the field and its cure."""
    scope = _networks("--scope or TransparentProxy spec.podCIDRs", options.scope or wishes.scope or ())
    if not scope:
        raise Refusal(
            "--scope: nothing is in scope; give the pods' networks, as --scope or as spec.podCIDRs of a TransparentProxy",
            BAD_POLICY,
        )
    workers = options.workers or wishes.workers or len(os.sched_getaffinity(0))
    settings = NodeSettings(
        scope=scope,
        exclude=_networks("exclude", options.exclude or wishes.exclude or ()),
        allow_dial=_networks("--allow-dial", options.allow_dial),
        source_address=options.source_address or wishes.source_address or "Pod",
        marks=options.marks or (Marks() if wishes.marks_mask is None else marks(wishes.marks_mask)),
        workers=workers,
        ipv6=any(":" in network for network in scope),
    )
    if options.listen_port is not None:
        settings = msgspec.structs.replace(settings, listen_port=options.listen_port)
    hold_s = CLUSTER_HOLD_S if options.cluster else 0.0
    settings = msgspec.structs.replace(
        settings,
        unknown_pod_hold_s=hold_s if wishes.unknown_pod_hold_s is None else wishes.unknown_pod_hold_s,
        unknown_pod_action=wishes.unknown_pod_action or settings.unknown_pod_action,
    )
    if wishes.connections is not None:
        settings = msgspec.structs.replace(settings, max_connections=-(-wishes.connections // workers))
    if wishes.connections_per_pod is not None:
        settings = msgspec.structs.replace(settings, max_connections_per_pod=-(-wishes.connections_per_pod // workers))
    if wishes.connection_rate_per_pod is not None:
        settings = msgspec.structs.replace(settings, connection_rate_per_pod=wishes.connection_rate_per_pod)
    return settings


def marks(mask: int) -> Marks:
    """The values of the two lowest bits of mask. Raises Refusal if it has fewer."""
    low = mask & -mask
    high = (mask ^ low) & -(mask ^ low)
    if not high:
        cure = "give two that nobody uses, such as 0x1040"
        raise Refusal(f"TransparentProxy spec.marks.mask: {mask:#x} has not two bits; {cure}", BAD_POLICY)
    return Marks(mask=low | high, intercept=high, reply=low, egress=low | high)


LIVE_SOCKETS_HAVE = ("marks", "table", "listen_port", "route_table", "rule_pref", "ipv6")
"""What listeners and connections carry on when another instance takes over."""


def fixed_differences(running: NodeSettings, wished: NodeSettings) -> list[str]:
    """A line for each field that an instance which takes over has to leave as it is."""
    return [
        f"--takeover: {field}: is {_shown(getattr(running, field))}, {_shown(getattr(wished, field))} is asked for; "
        "leave it as it is, or stop the instance that runs and start anew"
        for field in LIVE_SOCKETS_HAVE
        if getattr(running, field) != getattr(wished, field)
    ]


def differences(running: NodeSettings, wished: NodeSettings) -> list[str]:
    """A line for each field that would have to change while it cannot."""
    return [
        f"{field}: is {_shown(getattr(running, field))}, {_shown(getattr(wished, field))} is asked for; needs a restart of pellucid run"
        for field in NodeSettings.__struct_fields__
        if getattr(running, field) != getattr(wished, field)
    ]


def _networks(field: str, texts: tuple[str, ...]) -> tuple[str, ...]:
    """Canonical, sorted, each once, so that equal settings are equal."""
    found = set()
    for text in texts:
        try:
            found.add(ipaddress.ip_network(text))
        except ValueError as err:
            raise Refusal(f"{field}: {err}; write a network such as 10.244.0.0/16", BAD_POLICY) from err
    return tuple(str(network) for network in sorted(found, key=lambda network: (network.version, network)))


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "nothing"
    return f"{value.mask:#x}" if isinstance(value, Marks) else str(value)
