"""Every port, mark, table, path and limit of a node, once, with its default. ARCHITECTURE.md prints this table."""

from __future__ import annotations

import msgspec


class Marks(msgspec.Struct, frozen=True):
    """Values of a field of two bits in the packet mark, the socket mark and the connection mark.

    Free of the bits of kube-proxy, Calico, Cilium, portmap, AWS CNI, Tailscale and Istio. Set and compared under mask only."""

    mask: int = 0x1040  # the only bits of a mark that are read or written
    intercept: int = 0x1000  # deliver to the proxy's listener or socket
    reply: int = 0x0040  # reply to a socket of the proxy that bears a pod's address
    egress: int = 0x1040  # sent by the proxy itself: never intercepted

    @property
    def ended(self) -> int:
        """In a connection's mark: neither side's packets pass any more. No packet bears it."""
        return self.intercept

    @property
    def kept(self) -> int:
        """In a connection's mark: a rule with onPolicyChange: Keep allowed it. No packet bears it."""
        return self.reply


class NodeSettings(msgspec.Struct, frozen=True):
    """What a node needs to know besides policies. Immutable while it runs."""

    scope: tuple[str, ...]  # CIDRs whose addresses are pods; both families
    exclude: tuple[str, ...] = ()  # destinations never taken, whatever policies say
    table: str = "pellucid"  # nft table, family inet
    listen_port: int = 15001  # on 127.0.0.1 and ::1
    route_table: int = 15001  # routes marked packets to this machine; one for each family
    rule_pref: int = 100  # of the ip rules that lead there, and the one after it
    marks: Marks = Marks()
    source_address: str = "Pod"  # what servers see: Pod | Node
    ipv6: bool = True  # False: IPv6 is left alone altogether
    canary: tuple[str, ...] = ("192.0.2.119", "2001:db8::77")  # nobody's addresses, which workers answer on port 80
    unknown_pod_hold_s: float = 0.0  # how long a connection of an address without a pod waits for its pod
    unknown_pod_action: str = "Allow"  # what becomes of it then: Allow, as a pod without labels, or Block
    workers: int = 1  # processes that share the listeners; more than cores gain nothing
    allow_dial: tuple[str, ...] = ()  # CIDRs taken off the built-in list of targets that are never dialled
    connect_timeout_s: float = 10.0  # for the upstream to answer a dial
    first_bytes_timeout_s: float = 5.0  # for the client to complete the bytes that carry a name
    idle_timeout_s: float = 3600.0  # without a byte in either direction
    server_first_delay_s: float = 0.1  # silence of the client after which a server that speaks first is dialled
    drop_hold_s: float = 30.0  # how long a dropped connection is left unanswered
    max_connections: int = 65536  # of one worker
    max_connections_per_pod: int = 0  # of one worker; the next one is reset; 0: a quarter of what the worker can have
    max_pending_per_pod: int = 0  # of those, without a verdict or an upstream yet; 0: half of them, or 1,024
    max_held_bytes: int = 256 << 20  # of one worker, for peers that do not read; more is read in small pieces
    max_held_bytes_per_pod: int = 64 << 20  # of those, for connections of one pod
    connection_rate_per_pod: int = 0  # new ones a second of one address that the kernel hands over; 0: any number
    flow_buffer_bytes: int = 1 << 20  # flow records waiting for the agent; more are dropped and counted
    repairs_a_minute: int = 60  # of rules that others change, at once; more wait, lest two owners fight at full speed
    audit_interval_s: float = 10.0  # between looks for changes that no notice of the kernel told of
    flow_history_bytes: int = 4 << 20  # the last flow records, kept for who asks later
    max_observers: int = 16  # who may watch flow records at one time
    observer_buffer_bytes: int = 1 << 20  # records waiting for one observer; more are dropped and counted
