"""features: what a release does not do is refused by name, at its path."""

from __future__ import annotations

from pathlib import Path

from pellucid_policy.features import ALL, BASE, ONE_NODE, unsupported
from pellucid_policy.objects import Objects
from pellucid_policy.parse import parse_files

MANIFESTS = Path(__file__).parent / "manifests" / "good"


def objects_of(name: str) -> Objects:
    found = parse_files({name: (MANIFESTS / name).read_bytes()})
    assert isinstance(found, Objects)
    return found


def test_every_feature_beyond_this_release_is_named_at_its_path() -> None:
    found = unsupported(objects_of("every-field.yaml"), BASE)
    assert {(each.path, each.message.removeprefix("needs feature ")) for each in found} == {
        ("spec.rules[0].match.destinations[2].service", "Services"),
        ("spec.rules[1].egress.routeTable", "EgressRouteTable"),
        ("spec.rules[1].egress.interface", "EgressInterface"),
        ("spec.rules[2].route.to.service", "Services"),
        ("spec.rules[3].action", "Interception"),
        ("spec.rules[3].intercept.requests[0].request.setHeadersFrom", "SecretRefs"),
        ("spec.onPolicyChange", "ReevaluateLive"),
        ("kind", "Interception"), ("spec.key.secretRef", "SecretRefs"),
        ("kind", "Cluster"),
        ("spec.podCIDRs", "Installation"), ("spec.sourceAddress", "Installation"), ("spec.exclude.cidrs", "Installation"),
        ("spec.marks", "Installation"), ("spec.workers", "Installation"), ("spec.limits.connections", "Installation"),
        ("spec.exclude.ports", "ExcludePorts"), ("spec.limits.connectionsPerPod", "ConnectionsPerPod"),
        ("spec.limits.connectionRatePerPod", "ConnectionRatePerPod"),
        ("spec.unknownPods", "UnknownPods"), ("spec.nodeSelector", "Placement"), ("spec.images", "Placement"),
    }  # fmt: skip
    assert all(each.file == "every-field.yaml" and each.line > 1 and each.cure for each in found)


def test_a_release_with_every_feature_refuses_nothing() -> None:
    assert unsupported(objects_of("every-field.yaml"), ALL) == []


def test_one_node_takes_what_it_implements() -> None:
    assert unsupported(objects_of("cart.yaml"), ONE_NODE) == []
    assert "Installation" not in {each.message.split()[-1] for each in unsupported(objects_of("every-field.yaml"))}
