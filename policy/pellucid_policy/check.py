"""What types and bounds cannot say: syntax of addresses and names, and fields that do not go together."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping

from msgspec import UNSET, UnsetType

from . import check_rules
from .check_rules import Finding, exactly_one
from .installation import InterceptionAuthority, TransparentProxy, TransparentSnapshot
from .meta import LabelSelector, Namespace, ObjectMeta, Operator, Pod
from .model import ClusterTransparentPolicy, Policy, RuleAction, Tier, TransparentPolicy
from .objects import Key, Object, Objects, Problem
from .selection import timestamp

_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_LABEL_PART = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")


def findings(each: Object) -> Iterator[Finding]:
    """Yield (path, message, cure) for everything wrong within one object."""
    match each:
        case TransparentPolicy() | ClusterTransparentPolicy():
            yield from _metadata(each.metadata, namespaced=isinstance(each, TransparentPolicy))
            yield from _policy(each)
        case Pod():
            yield from _pod(each)
        case Namespace():
            yield from _object_name("metadata.name", each.metadata.name)
            yield from _labels("metadata.labels", each.metadata.labels)
        case InterceptionAuthority():
            yield from _metadata(each.metadata, namespaced=False)
            yield from _authority(each)
        case TransparentProxy():
            yield from _metadata(each.metadata, namespaced=False)
            yield from _proxy(each)
        case TransparentSnapshot():
            yield from _metadata(each.metadata, namespaced=False)
            yield from exactly_one("spec", {"index": each.spec.index, "piece": each.spec.piece})
        case _:
            yield from _metadata(each.metadata, namespaced=False)


def between(objects: Objects) -> list[Problem]:
    """Return what is wrong between objects: an address that two pods have."""
    problems = []
    owners: dict[str, Key] = {}
    for pod in objects.pods:
        for address in sorted({str(ipaddress.ip_address(text)) for text in pod.addresses()}):
            mine = (pod.kind, pod.metadata.namespace, pod.metadata.name)
            owner = owners.setdefault(address, mine)
            if owner != mine:
                field = "status.podIP" if pod.status.pod_ips is UNSET else "status.podIPs"
                cure = "an address has one pod: delete the object of the one that has ended"
                problems.append(
                    objects.problem(pod, field, f"{address} is also an address of pod {owner[1]}/{owner[2]}", cure)
                )
    return problems


def _object_name(path: str, name: str) -> Iterator[Finding]:
    if not _NAME.fullmatch(name):
        yield path, f"{name!r} is no name of an object", "write lower case letters, digits, - and ."


def _metadata(metadata: ObjectMeta, namespaced: bool) -> Iterator[Finding]:
    yield from _object_name("metadata.name", metadata.name)
    if metadata.namespace is not UNSET:
        if not namespaced:
            yield "metadata.namespace", "is set, but the kind has no namespace", "leave it out"
        yield from _object_name("metadata.namespace", metadata.namespace)
    if isinstance(metadata.creation_timestamp, str):
        try:
            timestamp(metadata.creation_timestamp)
        except ValueError:
            yield (
                "metadata.creationTimestamp",
                f"{metadata.creation_timestamp!r} is no time",
                "write it as 2026-01-31T12:00:00Z",
            )
    yield from _labels("metadata.labels", metadata.labels)


def _labels(path: str, labels: Mapping[str, str] | UnsetType) -> Iterator[Finding]:
    for key, value in () if isinstance(labels, UnsetType) else labels.items():
        yield from _label_key(path, key)
        yield from _label_value(path, value)


def _label_key(path: str, key: str) -> Iterator[Finding]:
    prefix, slash, name = key.rpartition("/")
    if not _LABEL_PART.fullmatch(name) or len(name) > 63 or (slash and not _NAME.fullmatch(prefix)):
        yield path, f"{key!r} is no label key", "write [prefix/]name"


def _label_value(path: str, value: str) -> Iterator[Finding]:
    if value and not _LABEL_PART.fullmatch(value):
        yield path, f"{value!r} is no label value", "write letters, digits, -, _ and ., or nothing"


def _selector(path: str, selector: LabelSelector | UnsetType) -> Iterator[Finding]:
    if selector is UNSET:
        return
    yield from _labels(f"{path}.matchLabels", selector.match_labels)
    for at, each in enumerate(() if selector.match_expressions is UNSET else selector.match_expressions):
        inner = f"{path}.matchExpressions[{at}]"
        yield from _label_key(f"{inner}.key", each.key)
        takes_values = each.operator in (Operator.IN, Operator.NOT_IN)
        if takes_values and each.values is UNSET:
            yield f"{inner}.values", f"is missing: {each.operator} compares with values", "write values: […]"
        if not takes_values and each.values is not UNSET:
            yield f"{inner}.values", f"is set, but {each.operator} takes none", "leave it out"
        for value in () if each.values is UNSET else each.values:
            yield from _label_value(f"{inner}.values", value)


def _policy(policy: Policy) -> Iterator[Finding]:
    spec = policy.spec
    yield from _selector("spec.podSelector", spec.pod_selector)
    if isinstance(policy, ClusterTransparentPolicy):
        yield from _cluster_selectors(policy)
    names: dict[str, int] = {}
    for at, rule in enumerate(spec.rules):
        path = f"spec.rules[{at}]"
        if rule.name is not UNSET:
            first = names.setdefault(rule.name, at)
            if first != at:
                yield (
                    f"{path}.name",
                    f"{rule.name!r} is also the name of rules[{first}]",
                    "names of rules are unique in a policy",
                )
        if (
            rule.action is RuleAction.PASS
            and isinstance(policy, ClusterTransparentPolicy)
            and policy.spec.tier is Tier.BASELINE
        ):
            yield f"{path}.action", "Pass goes on with the next tier, and Baseline is the last", "write Allow or Block"
        yield from check_rules.rule(path, rule)


def _cluster_selectors(policy: ClusterTransparentPolicy) -> Iterator[Finding]:
    spec = policy.spec
    if spec.pod_selector is UNSET and spec.namespace_selector is UNSET and spec.service_accounts is UNSET:
        yield "spec", "has no podSelector, namespaceSelector or serviceAccounts", "for every pod write podSelector: {}"
    yield from _selector("spec.namespaceSelector", spec.namespace_selector)
    for at, each in enumerate(() if spec.service_accounts is UNSET else spec.service_accounts):
        yield from _object_name(f"spec.serviceAccounts[{at}].namespace", each.namespace)
        yield from _object_name(f"spec.serviceAccounts[{at}].name", each.name)


def _pod(pod: Pod) -> Iterator[Finding]:
    yield from _object_name("metadata.name", pod.metadata.name)
    yield from _object_name("metadata.namespace", pod.metadata.namespace)
    yield from _labels("metadata.labels", pod.metadata.labels)
    field = "status.podIP" if pod.status.pod_ips is UNSET else "status.podIPs"
    for address in pod.addresses():
        yield from check_rules.address(field, address)


def _authority(authority: InterceptionAuthority) -> Iterator[Finding]:
    spec = authority.spec
    yield from _each_domain("spec.names", spec.names)
    yield from _each_domain("spec.neverIntercept", () if spec.never_intercept is UNSET else spec.never_intercept)
    yield from _selector("spec.namespaces", spec.namespaces)
    yield from exactly_one("spec.key", {"secretRef": spec.key.secret_ref, "files": spec.key.files})


def _each_domain(path: str, names: tuple[str, ...]) -> Iterator[Finding]:
    for at, name in enumerate(names):
        yield from check_rules.domain(f"{path}[{at}]", name)


def _proxy(proxy: TransparentProxy) -> Iterator[Finding]:
    if proxy.metadata.name != "default":
        yield "metadata.name", f"{proxy.metadata.name!r} is not default", "there is one TransparentProxy, named default"
    spec = proxy.spec
    for at, text in enumerate(() if spec.pod_cidrs is UNSET else spec.pod_cidrs):
        yield from check_rules.cidr(f"spec.podCIDRs[{at}]", text)
    for at, text in enumerate(() if spec.exclude is UNSET else spec.exclude.cidrs):
        yield from check_rules.cidr(f"spec.exclude.cidrs[{at}]", text)
    yield from _labels("spec.nodeSelector", spec.node_selector)
