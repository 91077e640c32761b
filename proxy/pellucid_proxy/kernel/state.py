"""What the kernel should hold: one value, from which the rule set follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pellucid_policy.plan import KernelGroup

from ..settings import NodeSettings

if TYPE_CHECKING:
    from pellucid_policy.compile import PolicySet


@dataclass(frozen=True, slots=True)
class KernelState:
    """The rules depend on this alone, never on what was there before.

    members: packed address of a selected pod → index into groups. direct: packed addresses of pods that no policy selects.
    strangers: the group of other addresses in scope, None where no policy selects them.
    hold: there is no policy yet: connections wait at the listener, everything else new is dropped.
    drain: nothing new is taken; what the proxy carries goes on.
    adopt: nothing tracked connections here before, so that for a minute those of closed pods pass which are in their middle. Later
    such packets are taken for leftovers of the proxy's own.
    revision: of the policy that this enforces.
    """

    settings: NodeSettings
    groups: tuple[KernelGroup, ...] = ()
    members: Mapping[bytes, int] = field(default_factory=dict)
    direct: frozenset[bytes] = frozenset()
    strangers: int | None = None
    hold: bool = False
    drain: bool = False
    adopt: bool = False
    revision: str = ""

    def __post_init__(self) -> None:
        wrong = {group for group in (*self.members.values(), self.strangers) if group is not None} - set(
            range(len(self.groups))
        )
        if wrong:
            raise ValueError(f"KernelState: group {min(wrong)} is named but there are {len(self.groups)}")
        both = self.direct & self.members.keys()
        if both:
            raise ValueError(f"KernelState: address {min(both).hex()} is both direct and member of a group")


def boot_hold(settings: NodeSettings) -> KernelState:
    """The state until the first policy is there."""
    return KernelState(settings, hold=True)


def kernel_state(policy: PolicySet, settings: NodeSettings) -> KernelState:
    """The state that enforces policy. Of two pods with one address the later one counts, as in the workers."""
    group_of = {address: pod.group for pod in policy.pods for address in pod.addresses}
    return KernelState(
        settings,
        groups=tuple(group.kernel for group in policy.groups),
        members={address: group for address, group in group_of.items() if group is not None},
        direct=frozenset(address for address, group in group_of.items() if group is None),
        strangers=policy.strangers,
        revision=policy.revision,
    )
