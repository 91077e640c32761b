"""The two policy kinds: TransparentPolicy and ClusterTransparentPolicy, as frozen types that refuse what they do not know.

installation.py has the other kinds, meta.py what all share. Syntax and coherence beyond types and bounds: check.py.
"""

from __future__ import annotations

import enum
from typing import Annotated, ClassVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from .meta import LabelSelector, LongText, ObjectMeta, Port, Strict, Text
from .verdict import Response

MAX_RULES = 1000  # of one policy: 1,000 full rules stay under etcd's 1.5 MB an object
MAX_DESTINATIONS = 1000  # of one rule
MAX_PORTS = 64


class RuleAction(enum.StrEnum):
    ALLOW = "Allow"
    BLOCK = "Block"
    ROUTE = "Route"
    INTERCEPT = "Intercept"
    PASS = "Pass"  # go on with the next tier


class Mode(enum.StrEnum):
    ENFORCE = "Enforce"
    AUDIT = "Audit"


class FailureMode(enum.StrEnum):
    CLOSED = "Closed"
    OPEN = "Open"


class OnPolicyChange(enum.StrEnum):
    """What becomes of live TCP connections that a rule of the policy decided."""

    KEEP = "Keep"
    REEVALUATE = "Reevaluate"


class Tier(enum.StrEnum):
    ADMIN = "Admin"
    BASELINE = "Baseline"


class Protocol(enum.StrEnum):
    TCP = "TCP"
    UDP = "UDP"
    SCTP = "SCTP"
    ICMP = "ICMP"  # of both families


class ServiceRef(Strict, frozen=True):
    name: Text
    namespace: Text


class Destination(Strict, frozen=True):
    """Exactly one of its fields."""

    cidr: Text | UnsetType = UNSET
    domain: Text | UnsetType = UNSET
    service: ServiceRef | UnsetType = UNSET


class PortEntry(Strict, frozen=True):
    """At least port or protocol. protocol absent: TCP. port absent: all ports. end_port: inclusive."""

    port: Port | UnsetType = UNSET
    end_port: Port | UnsetType = UNSET
    protocol: Protocol | UnsetType = UNSET


class Match(Strict, frozen=True):
    """Every field given must hold, within a list any entry. {} is every flow; without ports it is every protocol."""

    destinations: Annotated[tuple[Destination, ...], Meta(min_length=1, max_length=MAX_DESTINATIONS)] | UnsetType = (
        UNSET
    )
    ports: Annotated[tuple[PortEntry, ...], Meta(min_length=1, max_length=MAX_PORTS)] | UnsetType = UNSET


class Block(Strict, frozen=True):
    """status and body: with Respond only."""

    response: Response = Response.RESET
    status: Annotated[int, Meta(ge=400, le=599)] | UnsetType = UNSET
    body: LongText | UnsetType = UNSET


class RouteService(Strict, frozen=True):
    name: Text
    namespace: Text
    port: Port


class RouteTarget(Strict, frozen=True):
    """Either address and port, or service."""

    address: Text | UnsetType = UNSET
    port: Port | UnsetType = UNSET
    service: RouteService | UnsetType = UNSET


class ProxyProtocol(enum.StrEnum):
    HTTP_CONNECT = "HTTPConnect"
    SOCKS5 = "SOCKS5"


class RouteVia(Strict, frozen=True):
    protocol: ProxyProtocol
    address: Text
    port: Port


class RouteSpec(Strict, frozen=True):
    """to, via or both; via alone keeps the original destination."""

    to: RouteTarget | UnsetType = UNSET
    via: RouteVia | UnsetType = UNSET


class SourceAddress(enum.StrEnum):
    NODE = "Node"
    POD = "Pod"


class Egress(Strict, frozen=True):
    """How the proxy's own connection leaves the node; at least one field."""

    route_table: Annotated[int, Meta(ge=1, le=4294967295)] | UnsetType = UNSET
    interface: Annotated[str, Meta(min_length=1, max_length=15)] | UnsetType = UNSET
    source_address: SourceAddress | UnsetType = UNSET


class PathMatch(Strict, frozen=True):
    """Exactly one of its fields, compared with the normalised path."""

    exact: LongText | UnsetType = UNSET
    prefix: LongText | UnsetType = UNSET


class RequestMatch(Strict, frozen=True):
    methods: Annotated[tuple[Text, ...], Meta(min_length=1, max_length=64)] | UnsetType = UNSET
    path: PathMatch | UnsetType = UNSET


class SecretKeyRef(Strict, frozen=True):
    name: Text
    key: Text


class HeaderFrom(Strict, frozen=True):
    name: Text
    secret_key_ref: SecretKeyRef


HeaderMap = Annotated[dict[Text, LongText], Meta(min_length=1, max_length=64)]
HeaderNames = Annotated[tuple[Text, ...], Meta(min_length=1, max_length=64)]


class RequestChange(Strict, frozen=True):
    set_headers: HeaderMap | UnsetType = UNSET
    remove_headers: HeaderNames | UnsetType = UNSET
    set_headers_from: Annotated[tuple[HeaderFrom, ...], Meta(min_length=1, max_length=64)] | UnsetType = UNSET


class InjectAt(enum.StrEnum):
    HEAD_START = "HeadStart"
    HEAD_END = "HeadEnd"
    BODY_END = "BodyEnd"


class Inject(Strict, frozen=True):
    html: LongText
    at: InjectAt


class ResponseChange(Strict, frozen=True):
    set_headers: HeaderMap | UnsetType = UNSET
    remove_headers: HeaderNames | UnsetType = UNSET
    inject: Inject | UnsetType = UNSET


class RequestAction(enum.StrEnum):
    ALLOW = "Allow"
    BLOCK = "Block"


class RequestRule(Strict, frozen=True):
    """One HTTP rule of an intercepted flow. match {}: every request."""

    match: RequestMatch
    action: RequestAction
    name: Text | UnsetType = UNSET
    request: RequestChange | UnsetType = UNSET
    response: ResponseChange | UnsetType = UNSET
    block: Block | UnsetType = UNSET


class OnClientRejects(enum.StrEnum):
    BLOCK = "Block"
    TUNNEL = "Tunnel"


class Intercept(Strict, frozen=True):
    """requests: in order, first match wins; none matches: Allow."""

    authority: Text
    requests: Annotated[tuple[RequestRule, ...], Meta(min_length=1, max_length=256)]
    on_client_rejects: OnClientRejects = OnClientRejects.BLOCK


class Rule(Strict, frozen=True):
    """mode absent: the policy's. block, route, intercept: with the action of that name only."""

    match: Match
    action: RuleAction
    name: Text | UnsetType = UNSET
    mode: Mode | UnsetType = UNSET
    block: Block | UnsetType = UNSET
    route: RouteSpec | UnsetType = UNSET
    intercept: Intercept | UnsetType = UNSET
    egress: Egress | UnsetType = UNSET


class MissingName(enum.StrEnum):
    BLOCK = "Block"
    CONTINUE = "Continue"


class EncryptedHello(enum.StrEnum):
    BLOCK = "Block"
    USE_OUTER_NAME = "UseOuterName"


class Mismatch(enum.StrEnum):
    BLOCK = "Block"
    CONTINUE = "Continue"


class Quic(enum.StrEnum):
    REJECT = "Reject"
    CONTINUE = "Continue"


class Names(Strict, frozen=True):
    """What a rule that needs a name does where there is none to be trusted.

    missing_sni Continue: the rule does not match, evaluation goes on. host_mismatch Continue: the name is taken as missing.
    quic absent: Reject where an enforced rule of the policy has a domain.
    """

    missing_sni: MissingName = msgspec.field(default=MissingName.CONTINUE, name="missingSNI")
    encrypted_client_hello: EncryptedHello = EncryptedHello.USE_OUTER_NAME
    host_mismatch: Mismatch = Mismatch.BLOCK
    quic: Quic | UnsetType = UNSET


Rules = Annotated[tuple[Rule, ...], Meta(min_length=1, max_length=MAX_RULES)]
Priority = Annotated[int, Meta(ge=0, le=1000)]
DEFAULT_PRIORITY = 500


class TransparentPolicySpec(Strict, frozen=True):
    """pod_selector {}: every pod of the policy's namespace. priority: lower first."""

    pod_selector: LabelSelector
    rules: Rules
    priority: Priority = DEFAULT_PRIORITY
    mode: Mode = Mode.ENFORCE
    failure_mode: FailureMode = FailureMode.CLOSED
    on_policy_change: OnPolicyChange = OnPolicyChange.REEVALUATE
    names: Names = Names()


class ServiceAccountRef(Strict, frozen=True):
    namespace: Text
    name: Text


class ClusterTransparentPolicySpec(Strict, frozen=True):
    """At least one of the three selectors; every one given must hold, within service_accounts any entry."""

    tier: Tier
    rules: Rules
    pod_selector: LabelSelector | UnsetType = UNSET
    namespace_selector: LabelSelector | UnsetType = UNSET
    service_accounts: Annotated[tuple[ServiceAccountRef, ...], Meta(min_length=1, max_length=256)] | UnsetType = UNSET
    priority: Priority = DEFAULT_PRIORITY
    mode: Mode = Mode.ENFORCE
    failure_mode: FailureMode = FailureMode.CLOSED
    on_policy_change: OnPolicyChange = OnPolicyChange.REEVALUATE
    names: Names = Names()


class Condition(Strict, frozen=True):
    type: Text
    status: Text
    reason: Text | UnsetType = UNSET
    message: Annotated[str, Meta(max_length=32768)] | UnsetType = UNSET
    last_transition_time: Text | UnsetType = UNSET
    observed_generation: Annotated[int, Meta(ge=0)] | UnsetType = UNSET


Conditions = Annotated[tuple[Condition, ...], Meta(max_length=16)]
Count = Annotated[int, Meta(ge=0)]


class NodeCounts(Strict, frozen=True):
    desired: Count
    programmed: Count
    summary: Text


class PolicyStatus(Strict, frozen=True):
    """Written by the operator; read by nobody who decides."""

    observed_generation: Count | UnsetType = UNSET
    revision: Text | UnsetType = UNSET
    nodes: NodeCounts | UnsetType = UNSET
    conditions: Conditions | UnsetType = UNSET


class TransparentPolicy(Strict, frozen=True):
    """Rules for pods of its own namespace; tier Application."""

    kind: ClassVar[str] = "TransparentPolicy"
    metadata: ObjectMeta
    spec: TransparentPolicySpec
    status: PolicyStatus | UnsetType = UNSET

    @property
    def namespace(self) -> str:
        return "default" if self.metadata.namespace is UNSET else self.metadata.namespace


class ClusterTransparentPolicy(Strict, frozen=True):
    """The same rules for any pod; tier Admin comes before all namespaced policies, Baseline after."""

    kind: ClassVar[str] = "ClusterTransparentPolicy"
    metadata: ObjectMeta
    spec: ClusterTransparentPolicySpec
    status: PolicyStatus | UnsetType = UNSET

    @property
    def namespace(self) -> str:
        return ""


Policy = TransparentPolicy | ClusterTransparentPolicy
