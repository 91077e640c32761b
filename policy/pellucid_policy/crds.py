"""CustomResourceDefinitions of the six kinds, made from their types, so that the API server and this package cannot drift apart. Pure.

What types and bounds say becomes a structural schema (apiextensions.k8s.io/v1). What check.py says beyond them becomes a pattern or a CEL
rule, where its cost is bounded: an API server estimates a rule's cost from the bounds of all lists around it, and refuses a definition that
could cost too much. The rest – names that are there twice, what a name or address is beyond its shape – is found by `pellucid lint`, and by
whoever reads the object.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import inspect

from . import installation, meta, model
from .meta import API_VERSION

GROUP, VERSION = API_VERSION.split("/")
Schema = dict[str, Any]


class Kind(msgspec.Struct, frozen=True):
    """What a definition says besides its schema. columns: name, JSON path, type."""

    type: type[Any]
    plural: str
    short: tuple[str, ...]
    namespaced: bool
    columns: tuple[tuple[str, str, str], ...]
    selectable: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return str(self.type.kind)


_MODE = ("Mode", ".spec.mode", "string")
_PRIORITY = ("Priority", ".spec.priority", "integer")
_NODES = ("Nodes", ".status.nodes.summary", "string")
_ACCEPTED = ("Accepted", ".status.conditions[?(@.type=='Accepted')].status", "string")
_AGE = ("Age", ".metadata.creationTimestamp", "date")

KINDS = (
    Kind(model.TransparentPolicy, "transparentpolicies", ("tpol",), True, (_MODE, _PRIORITY, _ACCEPTED, _NODES, _AGE), (".spec.mode",)),
    Kind(
        model.ClusterTransparentPolicy, "clustertransparentpolicies", ("ctpol",), False,
        (("Tier", ".spec.tier", "string"), _MODE, _PRIORITY, _ACCEPTED, _NODES, _AGE), (".spec.mode", ".spec.tier"),
    ),
    Kind(installation.InterceptionAuthority, "interceptionauthorities", ("iauth",), False, (_ACCEPTED, _AGE)),
    Kind(installation.TransparentProxy, "transparentproxies", ("tproxy",), False, (_NODES, _AGE)),
    Kind(
        installation.TransparentSnapshot, "transparentsnapshots", ("tsnap",), False,
        (("Revision", ".spec.index.revision", "string"), _AGE),
    ),
    Kind(
        installation.TransparentNode, "transparentnodes", ("tnode",), False,
        (
            ("Revision", ".status.revision", "string"), ("Version", ".status.version", "string"),
            ("Intercepts", ".status.conditions[?(@.type=='InterceptionVerified')].status", "string"), _AGE,
        ),
    ),
)  # fmt: skip


Check = tuple[str, str, str]
"""CEL rule, message, field that it is about ("": the value itself)."""


def _exactly_one(*fields: str) -> Check:
    """In sums of presence: of `oneOf` an API server says no more than that one of its schemas does not match."""
    present = " + ".join(f"(has(self.{field}) ? 1 : 0)" for field in fields)
    return f"{present} == 1", f"write exactly one of {', '.join(fields)}", ""


def _at_least_one(*fields: str) -> Check:
    return " || ".join(f"has(self.{field})" for field in fields), f"write {', '.join(fields)}, or several of them", ""


def _needs(field: str, other: str) -> Check:
    return f"!has(self.{field}) || has(self.{other})", f"{field} is set without {other}", f".{field}"


def _only_with(field: str, key: str, value: str) -> Check:
    return f"!has(self.{field}) || self.{key} == '{value}'", f"{field} is set, but {key} is not {value}", f".{field}"


def _exactly_with(field: str, key: str, value: str) -> Check:
    message = f"{field} goes with {key} {value}, and is needed there"
    return f"has(self.{field}) == (self.{key} == '{value}')", message, f".{field}"


_LABEL = r"[^.*/:\s]"
_DOMAIN = rf"^(\*\.)?({_LABEL}{{1,63}}\.)*{_LABEL}*[^.*/:\s0-9]{_LABEL}*\.?$"  # the last label is no number
_CIDR = r"^[0-9A-Fa-f:.]+/[0-9]{1,3}$"
_VALUE = r"^[^\r\n\x00]*$"  # RFC 9110 §5.5
_NETWORK = {
    "pattern": _CIDR,
    "maxLength": 49,
    "x-kubernetes-validations": [
        {
            "rule": "isCIDR(self) && cidr(self).masked() == cidr(self)",
            "message": "is no network: write ADDRESS/LENGTH without bits beyond the length, as 192.0.2.0/24 or 2001:db8::/32",
        }
    ],
}
_ADDRESS = r"^[0-9A-Fa-f:.]+$"
_RULE_NAME = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
_INTERFACE = r"^[^\s/:%]{1,15}$"
_LABEL_VALUE = r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"
_LABEL_KEY = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
_TOKEN = r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$"
_ABSOLUTE = r"^/"

_TCP = "!has(p.protocol) || p.protocol == 'TCP'"

CHECKS: Mapping[type[Any], tuple[Check, ...]] = {
    model.Destination: (_exactly_one("cidr", "domain", "service"),),
    model.PortEntry: (
        ("has(self.port) || has(self.protocol)", "has neither port nor protocol; for all TCP ports write protocol: TCP", ""),
        _needs("endPort", "port"),
        ("!has(self.endPort) || !has(self.port) || self.port <= self.endPort", "endPort is lower than port", ".endPort"),
        ("!has(self.port) || !has(self.protocol) || self.protocol != 'ICMP'", "port is set, but ICMP has no ports", ".port"),
    ),
    model.Rule: (
        _only_with("block", "action", "Block"),
        _exactly_with("route", "action", "Route"),
        _exactly_with("intercept", "action", "Intercept"),
        (
            f"!(self.action in ['Route', 'Intercept']) || !has(self.match.ports) || self.match.ports.all(p, {_TCP})",
            "only TCP flows can be routed or intercepted", ".match.ports",
        ),
        ("!has(self.egress) || !(self.action in ['Block', 'Pass'])", "egress is set, but nothing leaves by this action", ".egress"),
    ),
    model.Match: (
        (
            f"!has(self.ports) || !has(self.destinations) || self.ports.exists(p, {_TCP}) || self.destinations.all(d, !has(d.domain))",
            "names are read in TCP flows, and ports has none", ".destinations",
        ),
    ),
    meta.LabelSelector: (
        (f"!has(self.matchLabels) || self.matchLabels.all(k, k.matches('{_LABEL_KEY}'))", "has a key that is none", ".matchLabels"),
    ),
    model.Block: (_only_with("status", "response", "Respond"), _only_with("body", "response", "Respond")),
    model.RouteSpec: (_at_least_one("to", "via"),),
    model.RouteTarget: (
        _exactly_one("address", "service"),
        ("has(self.address) == has(self.port)", "address and port go together", ".port"),
    ),
    model.Egress: (_at_least_one("routeTable", "interface", "sourceAddress"),),
    model.PathMatch: (_exactly_one("exact", "prefix"),),
    model.RequestRule: (
        _only_with("block", "action", "Block"),
        _only_with("request", "action", "Allow"),
        _only_with("response", "action", "Allow"),
    ),
    model.ClusterTransparentPolicySpec: (
        _at_least_one("podSelector", "namespaceSelector", "serviceAccounts"),
        (
            "self.tier != 'Baseline' || self.rules.all(r, r.action != 'Pass')",
            "Pass goes on with the next tier, and Baseline is the last", ".rules",
        ),
    ),
    installation.AuthorityKey: (_exactly_one("secretRef", "files"),),
    installation.SnapshotSpec: (_exactly_one("index", "piece"),),
    meta.LabelRequirement: (
        (
            "(self.operator in ['In', 'NotIn']) == has(self.values)",
            "In and NotIn compare with values, the others take none", ".values",
        ),
    ),
}  # fmt: skip
"""What goes together, beyond types and bounds."""

FIELDS: Mapping[tuple[type[Any], str], Schema] = {
    (model.Destination, "cidr"): {
        "format": "cidr",
        "pattern": _CIDR,
        "maxLength": 49,
    },  # a rule is too dear a million times
    (model.Destination, "domain"): {"pattern": _DOMAIN},
    (model.RouteTarget, "address"): {"pattern": _ADDRESS},
    (model.RouteVia, "address"): {"pattern": _ADDRESS},
    (model.Rule, "name"): {"pattern": _RULE_NAME},
    (model.Egress, "interface"): {"pattern": _INTERFACE},
    (model.PathMatch, "exact"): {"pattern": _ABSOLUTE},
    (model.PathMatch, "prefix"): {"pattern": _ABSOLUTE},
    (model.HeaderFrom, "name"): {"pattern": _TOKEN},
    (model.PolicyStatus, "conditions"): {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    (installation.NodeStatus, "conditions"): {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
}
"""What a field's type does not say."""

ITEMS: Mapping[tuple[type[Any], str], Schema] = {
    (installation.TransparentProxySpec, "podCIDRs"): _NETWORK,
    (installation.Exclude, "cidrs"): _NETWORK,
    (installation.InterceptionAuthoritySpec, "names"): {"pattern": _DOMAIN},
    (installation.InterceptionAuthoritySpec, "neverIntercept"): {"pattern": _DOMAIN},
    (model.RequestMatch, "methods"): {"pattern": _TOKEN},
    (model.RequestChange, "setHeaders"): {"pattern": _VALUE},
    (model.ResponseChange, "setHeaders"): {"pattern": _VALUE},
    (meta.LabelSelector, "matchLabels"): {"pattern": _LABEL_VALUE},
}
"""The same, of what is in a list or map."""


def definitions() -> list[Schema]:
    """All six, in the order of KINDS."""
    return [definition(kind) for kind in KINDS]


def definition(kind: Kind) -> Schema:
    """One CustomResourceDefinition as a value of JSON."""
    singular = kind.name.lower()
    version: Schema = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": _object(kind)},
        "additionalPrinterColumns": [{"name": name, "jsonPath": path, "type": of} for name, path, of in kind.columns],
    }
    if kind.selectable:
        version["selectableFields"] = [{"jsonPath": path} for path in kind.selectable]
    if any(field.encode_name == "status" for field in msgspec.structs.fields(kind.type)):
        version["subresources"] = {"status": {}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced" if kind.namespaced else "Cluster",
            "names": {
                "kind": kind.name, "listKind": f"{kind.name}List", "plural": kind.plural, "singular": singular,
                "shortNames": list(kind.short), "categories": ["pellucid"],
            },
            "versions": [version],
        },
    }  # fmt: skip


def _object(kind: Kind) -> Schema:
    """The schema of a whole object."""
    schema = _struct(kind.type)
    schema["properties"] = {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        **schema["properties"],
    }
    if kind.type is installation.TransparentProxy:
        message = "there is one TransparentProxy, named default"
        schema["x-kubernetes-validations"] = [{"rule": "self.metadata.name == 'default'", "message": message}]
    return schema


def _struct(kind: type[Any]) -> Schema:
    properties, required = {}, []
    for field in inspect.type_info(kind).fields:  # type: ignore[attr-defined]
        name = field.encode_name
        if name == "metadata":  # the API server's own
            properties[name] = {"type": "object"}
            continue
        schema = _schema(field.type)
        if field.required:
            required.append(name)
        elif (default := _default(field.default, field.default_factory)) is not None:
            schema["default"] = default
        schema |= FIELDS.get((kind, name), {})
        if (kind, name) in ITEMS:
            schema["items" if "items" in schema else "additionalProperties"] |= ITEMS[kind, name]
        if not field.required:
            schema["nullable"] = (
                True  # kept, and then refused by who reads it; dropped here, it would be a constraint less
            )
        properties[name] = schema
    found: Schema = {"type": "object", "description": _said(kind), "properties": properties}
    if not found["description"]:
        del found["description"]
    if required:
        found["required"] = required
    if checks := CHECKS.get(kind):
        found["x-kubernetes-validations"] = [
            {"rule": rule, "message": message, **({"fieldPath": path} if path else {})}
            for rule, message, path in checks
        ]
    return found


def _said(kind: type[Any]) -> str:
    """The first paragraph of a type's own docstring: what people read in `kubectl explain`."""
    said = kind.__dict__.get("__doc__") or ""
    return "" if said.startswith(f"{kind.__name__}(") else " ".join(said.split("\n\n")[0].split())


def _default(value: Any, factory: Any) -> Any:
    """What the API server writes where a field is left out; None: nothing."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, bool | int | str):
        return value
    if isinstance(value, msgspec.Struct) or (
        value is msgspec.NODEFAULT and isinstance(factory, type) and issubclass(factory, msgspec.Struct)
    ):
        return {}
    return None


def _schema(found: inspect.Type) -> Schema:
    match found:
        case inspect.Metadata():
            return _schema(found.type)
        case inspect.UnionType():
            return _schema(
                next(each for each in found.types if not isinstance(each, inspect.CustomType | inspect.NoneType))
            )
        case inspect.StructType():
            return _struct(found.cls)
        case inspect.EnumType():
            return {"type": "string", "enum": [each.value for each in found.cls]}
        case inspect.StrType():
            return {
                "type": "string",
                **_bounds(found, minLength="min_length", maxLength="max_length", pattern="pattern"),
            }
        case inspect.IntType():
            return {"type": "integer", "format": "int64", **_bounds(found, minimum="ge", maximum="le")}
        case inspect.VarTupleType():
            bounds = _bounds(found, minItems="min_length", maxItems="max_length")
            return {"type": "array", "x-kubernetes-list-type": "atomic", "items": _schema(found.item_type), **bounds}
        case inspect.DictType():
            bounds = _bounds(found, minProperties="min_length", maxProperties="max_length")
            return {"type": "object", "additionalProperties": _schema(found.value_type), **bounds}
    raise TypeError(f"no schema for {found}")


def _bounds(found: inspect.Type, **names: str) -> Schema:
    values = {name: getattr(found, field) for name, field in names.items()}
    return {name: value for name, value in values.items() if value is not None}
