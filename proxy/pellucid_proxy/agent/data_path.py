"""The kernel's part of a node as one thing: table, ip rules and routes, counters."""

from __future__ import annotations

import logging
import socket
from dataclasses import replace

from pyroute2 import IPRoute

from pellucid_policy.verdict import RuleKey

from ..control import Series
from ..kernel import routing, time_wait
from ..kernel.apply import Kernel, KernelError, nft
from ..kernel.instance import claim
from ..kernel.nftables import generation
from ..kernel.preflight import Severity, preflight
from ..kernel.state import KernelState
from ..kernel.watch import Cause, Drift, Watch
from ..session.record import rule_labels
from ..settings import NodeSettings
from ..supervisor.options import FAILED, REFUSED, Refusal

log = logging.getLogger(__name__)


_OF_ROUTES = (Cause.IP_RULE, Cause.ROUTE, Cause.LINK)


class DataPath:
    """enforcer.Rules for this machine."""

    def __init__(self, settings: NodeSettings) -> None:
        """Owns the table until the process ends. Raises KernelError if another process does."""
        self._settings = settings
        self._claim = claim(settings)
        self._kernel = Kernel(settings)
        try:
            self._watch = Watch(settings)
        except OSError as err:
            raise KernelError(f"netlink: no notices of changes ({err}); permit AF_NETLINK sockets") from err
        self._routed = False
        self._adopt = not _conntrack("count")  # before our rules make it track
        self._actions: dict[
            tuple[RuleKey | None, str], str
        ] = {}  # by rule and reason; of rules that are gone too: they were counted

    def apply(self, state: KernelState) -> None:
        """The kernel holds state, or KernelError. Routes first: without them the proxy's packets would be lost."""
        if not self._routed:
            routing.install(self._settings)
            self._routed = True
        if not (state.hold or state.drain):
            state, self._adopt = replace(state, adopt=self._adopt), False
        self._kernel.apply(state)
        if state.drain:
            self._free_ports()
        for group in state.groups:
            for rule in (*group.leading, *group.nameless):
                self._actions[rule.rule, rule.reason] = "Allow" if rule.allow else "Block"

    def recognise(self, state: KernelState) -> bool:
        """Whether the kernel holds state already; what follows then changes it. Raises KernelError."""
        return self._kernel.recognise(state)

    def remove(self) -> None:
        """Nothing of ours is left, or KernelError. The table first: without routes its packets would be lost."""
        self._kernel.remove()
        routing.remove(self._settings)
        self._routed = False
        self._free_ports()

    def _free_ports(self) -> None:
        """Connections that now pass may use the ports of those that the proxy had."""
        try:
            time_wait.forget(self._settings, frozenset(node_addresses()))
        except OSError as err:
            log.warning("sockets in TIME_WAIT: %s; new connections with their ports fail for a minute", err)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Readable while drifted() may have something to tell."""
        return self._watch.descriptors

    def drifted(self) -> list[Drift]:
        """What others changed among our rules since the last call."""
        return self._watch.read(self._kernel.take_loaders())

    def audit(self) -> list[Drift]:
        """What others changed, and what may have changed without a notice. Raises KernelError."""
        try:
            now = generation()
        except OSError as err:
            raise KernelError(f"netlink: {err}; the process needs the capability NET_ADMIN") from err
        found = self.drifted()
        heard = self._watch.generation
        if heard is None or heard < now:
            self._watch.generation = now
            found.append(Drift(Cause.UNSEEN))
        if self._routed and routing.wrong(self._settings):
            found.append(Drift(Cause.ROUTE))
        return found

    def repair(self, drifts: list[Drift]) -> list[Drift]:
        """All is as it was applied last; returns those of drifts that were about something of ours. Raises KernelError."""
        repaired = [drift for drift in drifts if drift.cause not in _OF_ROUTES]
        if repaired:
            self._kernel.restore()
        of_routes = [drift for drift in drifts if drift.cause in (*_OF_ROUTES, Cause.UNSEEN)]
        if self._routed and of_routes:
            for what in routing.repair(self._settings):
                log.warning("%s: put right", what)
                repaired += [of_routes[0]] if of_routes[0] not in repaired else []
        return repaired

    def present(self) -> bool:
        """Whether a table of ours is there, perhaps of a run that was killed. Raises KernelError."""
        try:
            nft("--terse", "list", "table", "inet", self._settings.table)
        except KernelError as err:
            if "No such file or directory" in str(err):
                return False
            raise
        return True

    def series(self) -> list[Series]:
        """What the kernel counted since this object was made. Raises KernelError."""
        found = [
            Series("kernel_events", "counter", (event,), packets)
            for event, (packets, _) in self._kernel.events().items()
        ]
        for key, (packets, _) in self._kernel.counters().items():
            labels = (*rule_labels(key.rule), self._actions[key.rule, key.reason])
            found.append(Series("kernel_decided_packets", "counter", labels, packets))
        return found


def refuse_unfit(settings: NodeSettings) -> None:
    """This machine can carry settings, and nobody else does; what is worth knowing besides is logged. Raises Refusal with every reason."""
    errors, only_taken = [], True
    for finding in preflight(settings):
        said = f"{finding.what}; {finding.cure}" if finding.cure else finding.what
        if finding.severity is Severity.ERROR:
            errors.append(said)
            only_taken = only_taken and finding.taken
        else:
            log.log(logging.WARNING if finding.severity is Severity.WARNING else logging.INFO, "%s", said)
    if errors:
        raise Refusal("\n".join(errors), FAILED if only_taken else REFUSED)
    if not settings.ipv6 and routing.ipv6_available():
        log.warning(
            "no IPv6 network is in scope: IPv6 traffic of pods passes unseen; add the pods' IPv6 networks if they have any"
        )


def node_addresses() -> tuple[bytes, ...]:
    """The machine's own addresses as they are now, packed, in order."""
    with IPRoute() as netlink:
        texts = {message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS") for message in netlink.get_addr()}
    return tuple(
        sorted(socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text) for text in texts if text)
    )


def conntrack_series() -> list[Series]:
    """How full the connection tracking table is; nothing where the kernel does not say."""
    count, limit = _conntrack("count"), _conntrack("max")
    return [Series("conntrack_usage_ratio", "gauge", (), count / limit)] if count is not None and limit else []


def _conntrack(name: str) -> int | None:
    try:
        with open(f"/proc/sys/net/netfilter/nf_conntrack_{name}", encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None
