"""What every session of a worker shares: the policy in force, who the pods are, what must never be dialled."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from pellucid_policy.compile import Group, PolicySet
from pellucid_policy.decide import decide
from pellucid_policy.facts import TCP, UNKNOWN, Facts
from pellucid_policy.plan import Pod
from pellucid_policy.verdict import NeedName, Verdict

from ..settings import NodeSettings
from .dial_deny import denied, networks
from .record import Tallies, source_fragment

CACHED = 4096
"""Addresses whose answer is kept; past that the cache starts anew."""


class Identity(msgspec.Struct, frozen=True):
    """Who an address is, by one revision of the policy. address: packed. group: None if no policy selects it. pod: None: a stranger.

    source: the start of a flow record's source object. decided: verdicts of the group on facts that were decided before.
    """

    address: bytes
    revision: str
    group: Group | None
    source: str
    decided: dict[object, Verdict | NeedName]
    pod: Pod | None = None


def settled(identity: Identity, group: Group, destination: bytes, port: int, name: str | None) -> Verdict | NeedName:
    """What the enforced rules of group say of a TCP flow with this name, or of one whose name is not known yet (None).

    Deciding is pure and clients ask for the same again and again, so answers are kept as long as the policy.
    """
    key = (destination, port, name)
    known = identity.decided.get(key)
    if known is None:
        known = decide(group.enforced, Facts(destination, port, TCP, UNKNOWN if name is None else name))
        if len(identity.decided) >= CACHED:
            identity.decided.clear()
        identity.decided[key] = known
    return known


class Enforced:
    """A policy set as a worker uses it. Immutable but for its cache; replaced as a whole."""

    def __init__(self, policy: PolicySet) -> None:
        self.revision = policy.revision
        self._groups = policy.groups
        self._strangers = policy.strangers
        self._pods = {address: pod for pod in policy.pods for address in pod.addresses}
        self.first_address = {other: pod.addresses[0] for pod in policy.pods for other in pod.addresses[1:]}
        """By every further address of a pod: all of a pod's connections count as those of its first."""
        self._known: dict[bytes, Identity] = {}
        self._decided: dict[int, dict[object, Verdict | NeedName]] = {}
        self._compared: dict[tuple[int, int], tuple[Group, Group, bool]] = {}

    def identity(self, address: bytes) -> Identity:
        """The pod that has address; a stranger is a pod of namespace default without labels."""
        known = self._known.get(address)
        if known is not None:
            return known
        pod = self._pods.get(address)
        if pod is None:
            number = self._strangers
            source = source_fragment(address, "default", "", "", "default")
        else:
            number = pod.group
            source = source_fragment(address, pod.namespace, pod.name, pod.uid, pod.service_account)
        group = None if number is None else self._groups[number]
        decided = {} if number is None else self._decided.setdefault(number, {})
        known = Identity(address, self.revision, group, source, decided, pod)
        if len(self._known) >= CACHED:
            self._known.clear()
        self._known[address] = known
        return known

    def same_rules(self, before: Group | None, now: Group | None) -> bool:
        """Whether a group of the policy before decides as one of this policy does, by the same rules. Compared once, and then known."""
        if before is None or now is None:
            return before is now
        key = (id(before), id(now))
        known = self._compared.get(key)
        if known is None:
            same = before.enforced == now.enforced and before.audited == now.audited
            if len(self._compared) >= CACHED:
                self._compared.clear()
            known = self._compared[key] = (before, now, same)  # with the groups: their ids are not used again meanwhile
        return known[2]


class Judge:
    """enforced is what new decisions go by; the worker replaces it."""

    def __init__(self, settings: NodeSettings, node_addresses: Iterable[bytes]) -> None:
        self.enforced: Enforced
        self.tallies = Tallies()
        self.source_address = settings.source_address
        self.settings = settings
        self.holds_unknown = settings.unknown_pod_hold_s > 0
        self.unknown_known = self.unknown_expired = 0  # connections that waited for their pod, by how that ended
        self._node_addresses = frozenset(node_addresses)
        self._allowed = networks(settings.allow_dial)
        self._denied: dict[tuple[bytes, bool], bool] = {}

    def set_node_addresses(self, addresses: Iterable[bytes]) -> None:
        """The node's own addresses, packed, are these from now on."""
        self._node_addresses = frozenset(addresses)
        self._denied.clear()

    def dial_denied(self, address: bytes, node_source: bool) -> bool:
        """Whether address is one that is never dialled on a pod's behalf. node_source: the node's own address would be used."""
        key = (address, node_source)
        answer = self._denied.get(key)
        if answer is None:
            answer = denied(address, node_source=node_source, node_addresses=self._node_addresses, allow=self._allowed)
            if len(self._denied) >= CACHED:
                self._denied.clear()
            self._denied[key] = answer
        return answer
