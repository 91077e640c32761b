"""What is decided of a flow, and why. Every verdict is made when a policy is compiled; deciding only picks one."""

from __future__ import annotations

import enum

import msgspec


class Action(enum.StrEnum):
    ALLOW = "Allow"
    BLOCK = "Block"
    ROUTE = "Route"
    INTERCEPT = "Intercept"


class Response(enum.StrEnum):
    """How a blocked client learns of it."""

    RESET = "Reset"
    DROP = "Drop"
    RESPOND = "Respond"  # HTTP 403, a TLS alert; Reset where neither can be said


class Reason(enum.StrEnum):
    """Bounded: it is a label of metrics."""

    RULE_MATCHED = "RuleMatched"
    DEFAULT_ACTION = "DefaultAction"
    NOT_SELECTED = "NotSelected"  # no policy selects the pod; the connection reached the proxy all the same
    NAME_MISSING = "NameMissing"  # names.missingSNI: Block
    ENCRYPTED_CLIENT_HELLO = "EncryptedClientHello"  # names.encryptedClientHello: Block
    HOST_MISMATCH = "HostMismatch"  # names.hostMismatch: Block
    NOT_ROUTABLE = (
        "NotRoutable"  # a Route or Intercept rule matched a flow that the proxy cannot carry (UDP, a node address)
    )
    DIAL_DENIED = "DialDenied"  # the built-in list of targets that are never dialled on a pod's behalf
    LIMIT_REACHED = "LimitReached"  # the pod has as many connections as it may have: a new one is refused, no old one
    UNKNOWN_POD = "UnknownPod"  # unknownPods: no pod with its address came in time, and then: Block
    UNDECIDABLE = "Undecidable"  # deciding failed: a refusal, never a pass


class RuleKey(msgspec.Struct, frozen=True, gc=False):
    """Names one rule. kind: TransparentPolicy or ClusterTransparentPolicy; namespace: "" for the latter;
    rule: its name, or rules[3] where it has none."""

    kind: str
    namespace: str
    policy: str
    rule: str


class Via(msgspec.Struct, frozen=True, gc=False):
    """An upstream proxy. protocol: HTTPConnect or SOCKS5; address packed."""

    protocol: str
    address: bytes
    port: int


class Route(msgspec.Struct, frozen=True, gc=False):
    """Where a routed flow goes. address and port of None: the original ones, through via."""

    address: bytes | None
    port: int | None
    via: Via | None = None


class Verdict(msgspec.Struct, frozen=True, gc=False):
    """rule is None for the default action. source_address: "Pod", "Node" or None (the installation's).

    keep: a live connection with this verdict stays as it was decided when the policy changes (onPolicyChange: Keep)."""

    action: Action
    reason: Reason
    rule: RuleKey | None = None
    response: Response = Response.RESET
    status: int = 403
    body: str = ""
    route: Route | None = None
    source_address: str | None = None
    keep: bool = False


class NeedName(enum.Enum):
    """The answer of decide when an undecided rule could still win: come back with the name, or with ABSENT."""

    NEED_NAME = "NeedName"


NEED_NAME = NeedName.NEED_NAME
