"""Random small policies and flows out of small alphabets, so that rules meet. Fast, and a function of the random source alone."""

from __future__ import annotations

import ipaddress
from random import Random
from typing import Any

import msgspec

from pellucid_policy.facts import ABSENT, ICMP, ICMPV6, SCTP, TCP, UDP, UNKNOWN, Facts
from pellucid_policy.meta import Namespace, Pod
from pellucid_policy.model import ClusterTransparentPolicy, TransparentPolicy
from pellucid_policy.objects import Object, Objects, collect

CIDRS = (
    "0.0.0.0/0", "192.0.0.0/3", "192.0.2.0/24", "192.0.2.0/25", "192.0.2.64/26", "192.0.2.7/32", "192.0.2.6/32",
    "192.0.2.64/32", "10.0.0.1/32", "192.0.3.0/24", "10.0.0.0/24", "203.0.113.0/24", "198.51.100.0/24",
    "198.51.100.0/23", "203.0.113.9/32",
    "::/0", "2001:db8::/32", "2001:db8::/33", "2001:db8:0:1::/64", "2001:db8::42/127", "2001:db8::42/128", "fc00::/7",
)  # fmt: skip
ADDRESSES = tuple(
    ipaddress.ip_address(text).packed
    for text in (
        "192.0.2.7", "192.0.2.6", "192.0.2.64", "192.0.2.127", "192.0.2.128", "192.0.3.0", "198.51.100.1", "198.51.102.1",
        "203.0.113.9", "10.0.0.1", "2001:db8::42", "2001:db8::43", "2001:db8:0:1::1", "2001:db8:8000::1", "2001:db9::1",
        "fdff::1", "fe00::1",
    )
)  # fmt: skip
DOMAINS = (
    "example.com", "*.example.com", "a.example.com", "*.a.example.com", "b.a.example.com", "*.com", "example.org", "Example.ORG.",
    "*.example.org", "com",
)  # fmt: skip
NAMES = (
    "example.com", "a.example.com", "b.a.example.com", "c.b.a.example.com", "xexample.com", "example.org", "a.example.org", "com", "net",
)  # fmt: skip
PORTS = (
    {"port": 443}, {"port": 80}, {"port": 80, "endPort": 443}, {"port": 1, "endPort": 65535}, {"protocol": "TCP"},
    {"port": 443, "protocol": "UDP"},
    {"port": 53, "endPort": 54, "protocol": "UDP"}, {"protocol": "UDP"}, {"protocol": "ICMP"}, {"protocol": "SCTP"},
    {"port": 79, "endPort": 81},
)  # fmt: skip
FLOW_PORTS = (443, 443, 80, 53, 54, 79, 81, 442, 444, 1, 65535)
LABELS: tuple[dict[str, str], ...] = ({}, {"app": "a"}, {"app": "b"}, {"app": "a", "tier": "x"})
SELECTORS: tuple[dict[str, Any], ...] = (
    {}, {}, {"matchLabels": {"app": "a"}}, {"matchExpressions": [{"key": "app", "operator": "In", "values": ["a", "b"]}]},
    {"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["a"]}]},
    {"matchExpressions": [{"key": "tier", "operator": "Exists"}]},
    {"matchLabels": {"app": "a"}, "matchExpressions": [{"key": "tier", "operator": "DoesNotExist"}]},
)  # fmt: skip
ROUTES = (
    {"to": {"address": "192.0.2.99", "port": 8443}},
    {"via": {"protocol": "SOCKS5", "address": "192.0.2.98", "port": 1080}},
    {
        "to": {"address": "2001:db8::99", "port": 1},
        "via": {"protocol": "HTTPConnect", "address": "2001:db8::98", "port": 3128},
    },
)
BLOCKS = (
    {"response": "Reset"},
    {"response": "Drop"},
    {"response": "Respond", "status": 451, "body": "no"},
    {"response": "Respond"},
)
RULES = (1, 2, 2, 3, 3, 4, 4, 5, 5, 20)  # how many of a policy
CREATED = ("2026-01-01T00:00:00Z", "2026-01-01T01:30:00+02:00", "2026-06-01T00:00:00Z", None)


def _some(random: Random, choices: tuple[Any, ...], most: int) -> list[Any]:
    return [random.choice(choices) for _ in range(random.randint(1, most))]


def match(random: Random) -> dict[str, Any]:
    """A match; one in ten has no destinations."""
    out: dict[str, Any] = {}
    if random.random() < 0.9:
        kind = random.random()
        cidrs = [{"cidr": each} for each in _some(random, CIDRS, 3)] if kind > 0.5 else []
        domains = [{"domain": each} for each in _some(random, DOMAINS, 3)] if kind < 0.65 else []
        out["destinations"] = cidrs + domains
    if random.random() < 0.6:
        out["ports"] = [dict(each) for each in _some(random, PORTS, 3)]
        if any("domain" in each for each in out.get("destinations", ())):
            out["ports"].append({"port": random.choice((443, 80, 9))})
    return out


def rule(
    random: Random, actions: tuple[str, ...] = ("Allow", "Block", "Block", "Route", "Pass", "Intercept")
) -> dict[str, Any]:
    """A rule that parse would take."""
    action = random.choice(actions)
    out: dict[str, Any] = {"match": match(random), "action": action}
    if action in ("Route", "Intercept") and "ports" in out["match"]:
        out["match"]["ports"] = [each for each in out["match"]["ports"] if each.get("protocol", "TCP") == "TCP"] or [
            {"port": 443}
        ]
    if action == "Route":
        out["route"] = random.choice(ROUTES)
    if action == "Intercept":
        out["intercept"] = {"authority": "ca", "requests": [{"match": {}, "action": "Allow"}]}
    if action == "Block" and random.random() < 0.5:
        out["block"] = random.choice(BLOCKS)
    if action in ("Allow", "Route") and random.random() < 0.2:
        out["egress"] = {"sourceAddress": random.choice(("Node", "Pod"))}
    if random.random() < 0.2:
        out["mode"] = random.choice(("Enforce", "Audit"))
    return out


def _spec(random: Random, actions: tuple[str, ...]) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "rules": [rule(random, actions) for _ in range(random.choice(RULES))],
        "priority": random.choice((0, 500, 500, 1000)),
    }
    if random.random() < 0.15:
        spec["mode"] = "Audit"
    if random.random() < 0.7:
        spec["names"] = {
            "missingSNI": random.choice(("Block", "Continue")),
            "encryptedClientHello": random.choice(("Block", "UseOuterName")),
            "hostMismatch": random.choice(("Block", "Continue")),
        }
        if random.random() < 0.3:
            spec["names"]["quic"] = random.choice(("Reject", "Continue"))
    if random.random() < 0.5:
        spec["failureMode"] = "Open"
    return spec


ACTIONS = ("Allow", "Block", "Block", "Route", "Pass", "Intercept")


def manifest(random: Random, number: int) -> dict[str, Any]:
    """A policy of either kind, without kind and apiVersion; what has a tier is a ClusterTransparentPolicy."""
    metadata: dict[str, Any] = {"name": f"p{number}"}
    if created := random.choice(CREATED):
        metadata["creationTimestamp"] = created
    if random.random() < 0.5:
        tier = random.choice(("Admin", "Baseline"))
        spec = _spec(random, ACTIONS if tier == "Admin" else ("Allow", "Block", "Route"))
        spec["tier"] = tier
        chosen = random.random()
        if chosen < 0.7:
            spec["podSelector"] = random.choice(SELECTORS)
        if chosen > 0.6:
            spec["namespaceSelector"] = random.choice(
                ({}, {"matchLabels": {"team": "x"}}, {"matchLabels": {"kubernetes.io/metadata.name": "default"}})
            )
        if random.random() < 0.1:
            spec["serviceAccounts"] = [{"namespace": "default", "name": random.choice(("default", "sa"))}]
        return {"metadata": metadata, "spec": spec}
    metadata["namespace"] = random.choice(("default", "default", "other"))
    return {"metadata": metadata, "spec": {**_spec(random, ACTIONS), "podSelector": random.choice(SELECTORS)}}


def typed(manifest: dict[str, Any]) -> Object:
    """Return the policy of a manifest."""
    kind: Any = ClusterTransparentPolicy if "tier" in manifest["spec"] else TransparentPolicy
    each: Object = msgspec.convert(manifest, kind)
    return each


PODS: tuple[Object, ...] = (
    *(
        msgspec.convert(
            {"metadata": {"name": f"pod{at}-{namespace}", "namespace": namespace, "labels": labels},
             "spec": {"serviceAccountName": "sa" if at % 2 else "default"},
             "status": {"podIPs": [{"ip": f"10.0.{len(namespace)}.{at}"}]}},
            Pod,
        )
        for namespace in ("default", "other") for at, labels in enumerate(LABELS)
    ),
    msgspec.convert({"metadata": {"name": "other", "labels": {"team": "x"}}}, Namespace),
)  # fmt: skip


def objects(random: Random, most: int = 4) -> Objects:
    """Return a folder of up to most policies, over a fixed set of pods."""
    return collect([*PODS, *(typed(manifest(random, number)) for number in range(random.randint(1, most)))], {})


def facts(random: Random) -> Facts:
    """Return a flow; most are TCP."""
    protocol = TCP if random.random() < 0.75 else random.choice((UDP, UDP, SCTP, ICMP, ICMPV6, 47))
    port = random.choice(FLOW_PORTS) if protocol in (TCP, UDP, SCTP) else 0
    name = random.choice((UNKNOWN, UNKNOWN, UNKNOWN, ABSENT, *NAMES))
    return Facts(random.choice(ADDRESSES), port, protocol, name, random.random() < 0.15, random.random() < 0.15)
