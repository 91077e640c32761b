"""Whether this machine can do what the settings ask, before anything is changed."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice
from pathlib import Path

import msgspec

from pellucid_policy.plan import AddressRule, KernelGroup

from ..settings import NodeSettings
from . import neighbours
from .apply import KernelError, nft
from .instance import claim
from .routing import bridges, collisions, ipv6_available, refuse_ipv6_scope
from .ruleset import ruleset
from .state import KernelState

_CAPABILITIES = {"NET_ADMIN": 12, "NET_RAW": 13}  # capabilities(7)
_OLDEST_NFT = (1, 0)
_MOST_NAMED = 5  # of one kind
_FEATURES = {
    "tproxy": "meta l4proto tcp tproxy ip to 127.0.0.1:1 accept",
    "socket": "meta l4proto tcp socket transparent 1 accept",
    "fib": "fib daddr type local accept",
    "connection marks": "ct direction reply ct mark & 1 == 1 ct mark set ct mark & 0xfffffffe accept",
    "reject before routing": "meta l4proto tcp reject with tcp reset",
}
"""One rule for each thing the kernel may have been built without."""


class Severity(StrEnum):
    ERROR = "error"  # would not work, or would harm somebody: refuse to start
    WARNING = "warning"  # works, but not for everything
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know before the start. cure: what to do, "" where nothing needs doing.

    taken: this machine could, but somebody else has what is needed now."""

    severity: Severity
    what: str
    cure: str = ""
    taken: bool = False

    def __str__(self) -> str:
        return f"{self.severity}: {self.what}" + (f"; {self.cure}" if self.cure else "")


def preflight(settings: NodeSettings) -> list[Finding]:
    """What stands against running with settings, errors first; nothing is changed. Never raises for what it finds."""
    found = [finding for check in _CHECKS for finding in check(settings)]
    return sorted(found, key=lambda finding: list(Severity).index(finding.severity))


def _settings(settings: NodeSettings) -> Iterator[Finding]:
    if not settings.scope:
        yield Finding(
            Severity.ERROR,
            "settings.scope: no addresses are in scope",
            "name the CIDRs of the pods, as in --scope 10.244.0.0/16",
        )
    for field in ("scope", "exclude", "allow_dial"):
        for index, cidr in enumerate(getattr(settings, field)):
            try:
                ipaddress.ip_network(cidr)
            except ValueError as err:
                yield Finding(
                    Severity.ERROR,
                    f"settings.{field}[{index}]: {err}",
                    "write it as ADDRESS/BITS without bits after the prefix",
                )
    marks = settings.marks
    values = (marks.intercept, marks.reply, marks.egress)
    if len({0, *values}) != 4 or any(value & ~marks.mask for value in values) or not 0 < marks.mask <= 0xFFFFFFFF:
        yield Finding(
            Severity.ERROR,
            f"settings.marks: {', '.join(map(hex, values))} are not three different values under the mask {marks.mask:#x}",
            "give the mask two bits, and each mark another value of them but 0",
        )


def _rights(_: NodeSettings) -> Iterator[Finding]:
    held = _effective_capabilities()
    for name, bit in _CAPABILITIES.items():
        if not held >> bit & 1:
            yield Finding(
                Severity.ERROR,
                f"the process lacks the capability {name}",
                "run as root, add the capability to the container, or try it in a sandbox: `pellucid lab`",
            )


def _effective_capabilities() -> int:
    said = re.search(r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(said[1], 16) if said else 0


def _nft(_: NodeSettings) -> Iterator[Finding]:
    try:
        said = nft("--version")
    except KernelError as err:
        yield _error(err)
        return
    version = re.search(r"v(\d+)\.(\d+)", said)
    if version is None or (int(version[1]), int(version[2])) < _OLDEST_NFT:
        yield Finding(Severity.ERROR, f"nft: {said.strip()} is too old", "install nftables 1.0 or later")
    try:
        socket.getprotobyname("tcp")
    except OSError:
        yield Finding(Severity.ERROR, "nft cannot know what tcp is: /etc/protocols is missing", "install netbase")


def _features(settings: NodeSettings) -> Iterator[Finding]:
    """The real rule set in a dry run; where that fails, which feature it is."""
    if any(_settings(settings)) or any(_rights(settings)) or any(_nft(settings)):
        return
    default = AddressRule(None, "DefaultAction", ("0.0.0.0/0", "::/0"), None, False)
    group = KernelGroup(
        (default, default), (default, msgspec.structs.replace(default, networks=None)), closed=True, reject_quic=True
    )
    try:
        nft("-c", "-f", "-", text=ruleset(KernelState(settings, (group,), strangers=0)))
    except (KernelError, ValueError) as err:
        lacking = [name for name, rule in _FEATURES.items() if not _known(rule)]
        if lacking:
            yield Finding(
                Severity.ERROR,
                f"the kernel's nftables lack: {', '.join(lacking)}",
                "load the modules nft_tproxy, nft_socket, nft_fib_inet, nft_ct and nft_reject_inet, or boot a kernel that has them "
                "(Linux 5.10 or later)",
            )
        else:
            yield _error(err)


def _known(rule: str) -> bool:
    try:
        nft(
            "-c",
            "-f",
            "-",
            text=f"table inet pellucid_probe {{ chain c {{ type filter hook prerouting priority mangle; {rule}; }}; }}",
        )
    except KernelError:
        return False
    return True


def _instance(settings: NodeSettings) -> Iterator[Finding]:
    try:
        claim(settings).close()
    except KernelError as err:
        yield replace(_error(err), taken=True)
        return
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        if family == socket.AF_INET6 and not (settings.ipv6 and ipv6_available()):
            continue
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, settings.listen_port))
            except OSError as err:
                yield Finding(
                    Severity.ERROR,
                    f"settings.listen_port: {address} port {settings.listen_port} cannot be had ({err.strerror})",
                    f"choose another, or stop what uses it (`ss -tlnp sport = {settings.listen_port}`)",
                    taken=err.errno == errno.EADDRINUSE,
                )
    try:
        nft("list", "table", "inet", settings.table)
    except KernelError:
        return  # the usual case: there is none
    yield Finding(
        Severity.NOTE, f"the table inet {settings.table} of an earlier run is still there, and will be replaced"
    )


def _routes(settings: NodeSettings) -> Iterator[Finding]:
    try:
        for sentence in collisions(settings):
            what, _, cure = sentence.rpartition("; ")
            yield Finding(Severity.ERROR, what, cure)
    except KernelError as err:
        yield _error(err)


def _neighbours(settings: NodeSettings) -> Iterator[Finding]:
    """Others' rules in nftables and iptables: bits of marks that are ours as well, and listeners that take packets."""
    if any(_rights(settings)) or any(_nft(settings)):
        return
    try:
        lines = neighbours.listing(settings.table)
    except (OSError, subprocess.TimeoutExpired) as err:
        yield Finding(
            Severity.WARNING, f"others' rules cannot be looked through for marks: {err}", "see `nft list ruleset`"
        )
        return
    for line, bits in islice(neighbours.colliding(lines, settings.marks.mask), _MOST_NAMED):
        yield Finding(
            Severity.ERROR,
            f"settings.marks.mask: `{line[:200]}` uses bits {bits:#x} of our mark {settings.marks.mask:#x}",
            "choose two bits that nobody uses (spec.marks.mask of the TransparentProxy object)",
        )
    for line in neighbours.overwriting(lines)[:_MOST_NAMED]:
        yield Finding(
            Severity.WARNING,
            f"`{line[:200]}` sets the whole mark: where it meets packets of pods or of the proxy, they are lost",
            "have it set its own bits only, or leave the pods' traffic out",
        )
    for line in neighbours.proxies(lines)[:_MOST_NAMED]:
        yield Finding(
            Severity.WARNING,
            f"`{line[:200]}` gives packets to another transparent proxy: it does not see what Pellucid takes",
            "leave the pods' traffic to one of the two",
        )


def _ipv6(settings: NodeSettings) -> Iterator[Finding]:
    try:
        refuse_ipv6_scope(settings)
    except KernelError as err:
        yield _error(err)
    if settings.ipv6 and not ipv6_available():
        yield Finding(Severity.NOTE, "IPv6 is off on this machine: only IPv4 is covered, and nothing else can be sent")
    elif settings.ipv6 and not any(":" in cidr for cidr in settings.scope):
        yield Finding(
            Severity.WARNING,
            "settings.scope: no IPv6 address is in scope: IPv6 traffic of pods passes unseen",
            "add the pods' IPv6 CIDRs if they have any",
        )


def _sysctls(_: NodeSettings) -> Iterator[Finding]:
    if _sysctl("net/ipv4/ip_forward") == 0:
        yield Finding(
            Severity.WARNING, "net.ipv4.ip_forward is 0: what is not taken cannot leave this node", "set it to 1"
        )
    if _sysctl("net/ipv4/conf/all/src_valid_mark") == 1:
        yield Finding(
            Severity.NOTE, "net.ipv4.conf.all.src_valid_mark is 1 (a VPN client's): our ip rules allow for it"
        )
    bridged = [name for name in ("iptables", "ip6tables") if _sysctl(f"net/bridge/bridge-nf-call-{name}") == 1]
    behind = bridges() if bridged else []
    if behind:
        yield Finding(
            Severity.WARNING,
            f"net.bridge.bridge-nf-call-{' and -'.join(bridged)} is 1: connections of pods behind a bridge ({', '.join(behind)}) time out",
            "set it to 0, or use a CNI that routes; where no pod is behind a bridge, it does no harm",
        )


def _sysctl(path: str) -> int | None:
    try:
        return int(Path("/proc/sys", path).read_text())
    except (OSError, ValueError):
        return None


def _error(err: Exception) -> Finding:
    what, _, cure = str(err).rpartition("; ")
    return Finding(Severity.ERROR, what or cure, cure if what else "")


_CHECKS: tuple[Callable[[NodeSettings], Iterator[Finding]], ...] = (
    _settings, _rights, _nft, _features, _instance, _routes, _neighbours, _ipv6, _sysctls,
)  # fmt: skip
