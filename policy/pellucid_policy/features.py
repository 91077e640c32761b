"""What a release does not do yet is parsed, validated, and then refused by name: never ignored."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import UNSET

from .installation import (
    Exclude,
    InterceptionAuthority,
    Limits,
    TransparentNode,
    TransparentProxy,
    TransparentProxySpec,
    TransparentSnapshot,
)
from .model import ClusterTransparentPolicy, OnPolicyChange, Rule, RuleAction, TransparentPolicy
from .objects import Object, Objects, Problem

INTERCEPTION = "Interception"  # action Intercept, InterceptionAuthority
SECRET_REFS = "SecretRefs"  # header values and keys out of Secrets
EGRESS_ROUTE_TABLE = "EgressRouteTable"
EGRESS_INTERFACE = "EgressInterface"
SERVICES = "Services"  # destinations and routes by Service
REEVALUATE_LIVE = "ReevaluateLive"  # onPolicyChange: Reevaluate
INSTALLATION = (
    "Installation"  # what TransparentProxy says of a node's scope, exclusions, source address, marks, workers and limit
)
UNKNOWN_PODS = "UnknownPods"  # TransparentProxy's unknownPods
EXCLUDE_PORTS = "ExcludePorts"  # TransparentProxy's exclude.ports, unless empty
CONNECTIONS_PER_POD = "ConnectionsPerPod"  # TransparentProxy's limits.connectionsPerPod
CONNECTION_RATE_PER_POD = "ConnectionRatePerPod"  # TransparentProxy's limits.connectionRatePerPod
PLACEMENT = "Placement"  # TransparentProxy's nodeSelector and images
CLUSTER = "Cluster"  # TransparentSnapshot, TransparentNode

BASE = frozenset({
    "Allow", "Block", "Route", "Pass", "Audit", "Names", "FailureMode", "EgressSourceAddress", "OnPolicyChangeKeep", "DefaultAction",
})  # fmt: skip
ONE_NODE = BASE | {UNKNOWN_PODS, INSTALLATION, CONNECTIONS_PER_POD, CONNECTION_RATE_PER_POD, REEVALUATE_LIVE}
"""What this release implements."""
ALL = ONE_NODE | {
    INTERCEPTION, SECRET_REFS, EGRESS_ROUTE_TABLE, EGRESS_INTERFACE, SERVICES, REEVALUATE_LIVE, UNKNOWN_PODS, EXCLUDE_PORTS,
    PLACEMENT, CLUSTER,
}  # fmt: skip

Need = tuple[str, str]
"""A path within an object, and the feature that it needs."""


def unsupported(objects: Objects, supported: frozenset[str] = ONE_NODE) -> list[Problem]:
    """Return a problem for every field that needs a feature which supported does not hold, sorted by file and line."""
    return sorted(
        objects.problem(each, path, f"needs feature {feature}", "this release does not have it: leave it out")
        for each in objects.all()
        for path, feature in needs(each)
        if feature not in supported
    )


def needs(each: Object) -> Iterator[Need]:
    """Yield the features beyond BASE that an object needs, with the path of what needs it."""
    match each:
        case TransparentPolicy() | ClusterTransparentPolicy():
            if each.spec.on_policy_change is OnPolicyChange.REEVALUATE:
                yield "spec.onPolicyChange", REEVALUATE_LIVE
            for at, rule in enumerate(each.spec.rules):
                for path, feature in _rule_needs(rule):
                    yield f"spec.rules[{at}].{path}", feature
        case InterceptionAuthority():
            yield "kind", INTERCEPTION
            if each.spec.key.secret_ref is not UNSET:
                yield "spec.key.secretRef", SECRET_REFS
        case TransparentProxy():
            yield from _installation_needs(each.spec)
        case TransparentSnapshot() | TransparentNode():
            yield "kind", CLUSTER


def _installation_needs(spec: TransparentProxySpec) -> Iterator[Need]:
    exclude = Exclude() if spec.exclude is UNSET else spec.exclude
    limits = Limits() if spec.limits is UNSET else spec.limits
    for path, given, feature in (
        ("podCIDRs", spec.pod_cidrs is not UNSET, INSTALLATION),
        ("sourceAddress", spec.source_address is not UNSET, INSTALLATION),
        ("exclude.cidrs", bool(exclude.cidrs), INSTALLATION),
        ("exclude.ports", bool(exclude.ports), EXCLUDE_PORTS),
        ("marks", spec.marks is not UNSET, INSTALLATION),
        ("workers", spec.workers is not UNSET, INSTALLATION),
        ("limits.connections", limits.connections is not UNSET, INSTALLATION),
        ("limits.connectionsPerPod", limits.connections_per_pod is not UNSET, CONNECTIONS_PER_POD),
        ("limits.connectionRatePerPod", limits.connection_rate_per_pod is not UNSET, CONNECTION_RATE_PER_POD),
        ("unknownPods", spec.unknown_pods is not UNSET, UNKNOWN_PODS),
        ("nodeSelector", spec.node_selector is not UNSET, PLACEMENT),
        ("images", spec.images is not UNSET, PLACEMENT),
    ):
        if given:
            yield f"spec.{path}", feature


def _rule_needs(rule: Rule) -> Iterator[Need]:
    for at, destination in enumerate(() if rule.match.destinations is UNSET else rule.match.destinations):
        if destination.service is not UNSET:
            yield f"match.destinations[{at}].service", SERVICES
    if rule.action is RuleAction.INTERCEPT:
        yield "action", INTERCEPTION
    for at, request in enumerate(() if rule.intercept is UNSET else rule.intercept.requests):
        if request.request is not UNSET and request.request.set_headers_from is not UNSET:
            yield f"intercept.requests[{at}].request.setHeadersFrom", SECRET_REFS
    if rule.route is not UNSET and rule.route.to is not UNSET and rule.route.to.service is not UNSET:
        yield "route.to.service", SERVICES
    if rule.egress is not UNSET:
        if rule.egress.route_table is not UNSET:
            yield "egress.routeTable", EGRESS_ROUTE_TABLE
        if rule.egress.interface is not UNSET:
            yield "egress.interface", EGRESS_INTERFACE
