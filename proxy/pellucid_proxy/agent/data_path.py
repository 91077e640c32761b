"""The kernel's part of a node as one thing: table, ip rules and routes, counters."""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import msgspec
from pyroute2 import IPRoute

from pellucid_policy.verdict import RuleKey

from ..control import Series
from ..kernel import conntrack, routing, time_wait, trace, tracking
from ..kernel.apply import Kernel, KernelError, nft
from ..kernel.instance import claim
from ..kernel.judgement import Era, Fate
from ..kernel.nftables import generation
from ..kernel.preflight import Severity, preflight
from ..kernel.review import review
from ..kernel.slipped import Slipped, settle
from ..kernel.state import KernelState
from ..kernel.watch import Cause, Drift, Watch
from ..session.record import rule_labels
from ..settings import NodeSettings
from ..supervisor.options import FAILED, REFUSED, Refusal

log = logging.getLogger(__name__)


_OF_ROUTES = (Cause.IP_RULE, Cause.ROUTE, Cause.LINK)


class DataPath:
    """enforcer.Rules for this machine."""

    def __init__(self, settings: NodeSettings, folder: str) -> None:
        """Owns the table until the process ends; folder: of the run's state. Raises KernelError if another process owns it."""
        self._settings = settings
        self._folder = folder
        self._trace = trace.read(folder)
        self._tracking: socket.socket | None = None
        self._counting = False
        self._applied_ns = self._settled_ns = self._quiet_ns = 0  # quiet: nobody had changed anything then
        self._slipped = Slipped()
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
        self._applied_ns = time.time_ns()
        self._track()
        if state.drain:
            self._free_ports()
        for group in state.groups:
            for rule in (*group.leading, *group.nameless):
                self._actions[rule.rule, rule.reason] = "Allow" if rule.allow else "Block"

    def recognise(self, state: KernelState) -> bool:
        """Whether the kernel holds state already; what follows then changes it. Raises KernelError."""
        self._adopt = False  # rules of ours, these or others, made it track
        if not self._kernel.recognise(state):
            return False
        if self._trace.generation is None or self._trace.generation != self._watch.generation:
            log.info("nftables have changed since the agent before this one: our table is filled anew")
            self._kernel.restore()
        return True

    def remove(self) -> None:
        """Nothing of ours is left, or KernelError. The table first: without routes its packets would be lost."""
        self._kernel.remove()
        routing.remove(self._settings)
        self._routed = False
        if self._tracking is not None:
            self._tracking.close()
            self._tracking = None
        leave_no_trace(self._folder, self._trace)
        self._trace = trace.Trace()
        self._counting = False
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
        loaders = self._kernel.take_loaders()
        now = time.time_ns()
        found = self._watch.read(loaders)
        if not found:
            self._quiet_ns = now
        if loaders:
            self._remember(whole=all(drift.cause in (*_OF_ROUTES, Cause.ADDRESS) for drift in found))
        return found

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
        if repaired:
            self._settle()
        return repaired

    def review(self, eras: Sequence[Era]) -> Counter[Fate]:
        """Live flows that the kernel let pass are decided again (kernel/review.py). Touches nothing of this object. Raises OSError."""
        return review(eras, frozenset(node_addresses()))

    def _track(self) -> None:
        """Connections are tracked, timed and counted from now on, so that what slips through is known."""
        if self._counting:
            return
        self._counting = True
        try:
            self._tracking = tracking.keep(self._settings.table)
        except OSError as err:
            log.info("a flush of all rules would stop connection tracking (%s): Linux 5.12 or later holds it", err)
        before = conntrack.counted()
        off = {name: value for name, value in before.items() if value == "0"}
        self._trace = msgspec.structs.replace(self._trace, sysctls=off | self._trace.sysctls)
        self._write_trace()  # first: whatever happens now, they can be put back
        try:
            conntrack.count(dict.fromkeys(off, "1"))
        except OSError as err:
            log.warning("%s: %s; what slips past rules that others change is not counted", ", ".join(off), err.strerror)

    def _settle(self) -> None:
        state = self._kernel.state
        if state is None or state.drain:
            return
        since = max(self._quiet_ns, self._applied_ns, self._settled_ns)
        self._settled_ns = time.time_ns()
        try:
            found = settle(state, since, node_addresses())
        except OSError as err:
            log.warning("what slipped past rules that others changed cannot be counted: %s", err)
            return
        self._slipped = Slipped(*(a + b for a, b in zip(self._slipped, found, strict=True)))
        if found.packets:
            log.warning(
                "%d packets of pods slipped through meanwhile, in %d connections, %d of which are ended now",
                found.packets,
                found.ended + found.left,
                found.ended,
            )

    def _remember(self, *, whole: bool) -> None:
        """The next agent knows whether anything changed after this. whole: nobody else changed our table before."""
        if self._routed:
            self._trace = msgspec.structs.replace(self._trace, generation=self._watch.generation if whole else None)
            self._write_trace()

    def _write_trace(self) -> None:
        try:
            trace.write(self._folder, self._trace)
        except OSError as err:
            log.debug("%s: %s; the next agent fills the table anew", self._folder, err)

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
        found.append(Series("leaked_packets", "counter", (), self._slipped.packets))
        found.append(Series("leaked_connections", "counter", ("ended",), self._slipped.ended))
        found.append(Series("leaked_connections", "counter", ("left",), self._slipped.left))
        return found


def leave_no_trace(folder: str, left: trace.Trace) -> None:
    """Sysctls are as they were before the run that used folder and left that trace, and nothing there tells of it any more."""
    try:
        conntrack.count(left.sysctls)
    except OSError as err:
        log.warning("%s: %s; they stay on", ", ".join(conntrack.COUNTING), err.strerror)
    trace.remove(folder)


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


def conntrack_use() -> tuple[int | None, int | None]:
    """Entries of the connection tracking table, and how many it may have; None: the kernel does not say."""
    return _conntrack("count"), _conntrack("max")


def conntrack_series() -> list[Series]:
    """How full the connection tracking table is; nothing where the kernel does not say."""
    count, limit = conntrack_use()
    return [Series("conntrack_usage_ratio", "gauge", (), count / limit)] if count is not None and limit else []


def _conntrack(name: str) -> int | None:
    try:
        with open(f"/proc/sys/net/netfilter/nf_conntrack_{name}", encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None
