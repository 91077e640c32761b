"""From objects to a PolicySet: which pods have which policies, and a program and kernel rules for each set of policies that occurs."""

from __future__ import annotations

import ipaddress

from msgspec import UNSET
from msgspec.structs import replace

from . import index, kernel_rules, plan
from .meta import Pod
from .model import FailureMode, Policy, Quic
from .objects import Objects
from .prepare import Prepared, keeps, prepare
from .program import Group, PolicyKey, PolicySet, decode, encode, revised
from .selection import TIERS, in_order, namespace_labels, selects, tier_of
from .verdict import Action, Reason, Verdict

__all__ = ["Group", "PolicyKey", "PolicySet", "compile_policies", "decode", "encode"]

STRANGER_NAMESPACE = "default"

Identity = tuple[str, tuple[tuple[str, str], ...], str]
"""What selectors see of a pod: namespace, labels, service account."""


def compile_policies(objects: Objects, *, default_action: str | None = None) -> PolicySet:
    """Return what a node enforces. The order of objects makes no difference.

    default_action: Allow or Block; None: that of the TransparentProxy named default, or Allow. Raises ValueError for objects that
    parse would refuse, or that need a feature which compiling does not have (features.py tells them beforehand).
    """
    return _Compiler(objects, _default(objects, default_action)).compiled()


def _default(objects: Objects, given: str | None) -> Verdict:
    if given is None:
        given = next(
            (str(each.spec.default_action.value) for each in objects.proxies if each.spec.default_action is not UNSET),
            "Allow",
        )
    if given not in ("Allow", "Block"):
        raise ValueError(f"default action {given!r} is neither Allow nor Block")
    return Verdict(Action(given), Reason.DEFAULT_ACTION)


class _Compiler:
    """Holds what is shared while one PolicySet is made: prepared rules by policy, and the groups by their policies."""

    def __init__(self, objects: Objects, default: Verdict) -> None:
        self._pods = sorted(objects.pods, key=lambda pod: (pod.metadata.namespace, pod.metadata.name))
        self._policies = in_order((*objects.policies, *objects.cluster_policies))
        self._labels = namespace_labels(objects.namespaces)
        self._default = default
        self._prepared = [prepare(policy) for policy in self._policies]
        self._known: dict[Identity, tuple[int, ...]] = {}  # thousands of pods are a few kinds of pods

    def compiled(self) -> PolicySet:
        pods = [pod for pod in self._pods if not pod.spec.host_network]
        chosen = [self._chosen(_identity(pod)) for pod in pods]
        stranger = self._chosen((STRANGER_NAMESPACE, (), "default"))
        number = {policies: at for at, policies in enumerate(sorted({*chosen, stranger} - {()}))}
        return revised(PolicySet(
            "",
            tuple(self._group(policies) for policies in number),
            tuple(_pod(pod, number.get(policies)) for pod, policies in zip(pods, chosen, strict=True)),
            number.get(stranger),
            tuple(sorted(map(_key, self._policies))),
        ))  # fmt: skip

    def _chosen(self, identity: Identity) -> tuple[int, ...]:
        """Return the places of the policies that hold for such a pod, in order."""
        known = self._known.get(identity)
        if known is None:
            namespace, labels, service_account = identity
            known = self._known[identity] = tuple(
                at
                for at, policy in enumerate(self._policies)
                if selects(policy, namespace, dict(labels), service_account, self._labels)
            )
        return known

    def _group(self, chosen: tuple[int, ...]) -> Group:
        every: list[list[Prepared]] = [[] for _ in TIERS]
        for at in chosen:
            every[tier_of(self._policies[at])] += self._prepared[at]
        enforced = [[rule for rule in tier if rule.enforced] for tier in every]
        audits = any(not rule.enforced for tier in every for rule in tier)
        policies = [(self._policies[at], self._prepared[at]) for at in chosen]
        default = replace(self._default, keep=all(keeps(policy) for policy, _ in policies))
        return Group(
            tuple(_key(policy) for policy, _ in policies),
            index.build(enforced, default),
            index.build(every, default) if audits else None,
            plan.KernelGroup(
                kernel_rules.leading(every, default),
                kernel_rules.nameless(every, default),
                any(_closes(policy, rules) for policy, rules in policies),
                any(_rejects_quic(policy, rules) for policy, rules in policies),
            ),
        )


def _identity(pod: Pod) -> Identity:
    labels = () if pod.metadata.labels is UNSET else tuple(sorted(pod.metadata.labels.items()))
    return pod.metadata.namespace, labels, pod.spec.service_account_name


def _closes(policy: Policy, rules: tuple[Prepared, ...]) -> bool:
    """A policy that only audits does not act, also when there is no proxy."""
    return policy.spec.failure_mode is FailureMode.CLOSED and any(rule.enforced for rule in rules)


def _rejects_quic(policy: Policy, rules: tuple[Prepared, ...]) -> bool:
    quic = policy.spec.names.quic
    if quic is UNSET:
        return any(rule.enforced and rule.names for rule in rules)
    return quic is Quic.REJECT and any(rule.enforced for rule in rules)


def _key(policy: Policy) -> PolicyKey:
    return PolicyKey(policy.kind, policy.namespace, policy.metadata.name)


def _pod(pod: Pod, group: int | None) -> plan.Pod:
    return plan.Pod(
        pod.metadata.namespace,
        pod.metadata.name,
        "" if pod.metadata.uid is UNSET else pod.metadata.uid,
        pod.spec.service_account_name,
        "" if pod.spec.node_name is UNSET else pod.spec.node_name,
        tuple(sorted({ipaddress.ip_address(address).packed for address in pod.addresses()})),
        group,
    )
