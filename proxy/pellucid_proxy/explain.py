"""A flow explained: scope, exclusions, pod, kernel rules, the proxy's own session, and why no earlier rule decided. Pure.

Who may dial what is the session's word (session/rehearsal.py), everything else pellucid_policy.explain's.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

import msgspec
from msgspec import UNSET

from pellucid_policy import explain as policy_explain
from pellucid_policy.explain import KERNEL, LEADING, NAMELESS, PROXY, Considered, Node, Outcome
from pellucid_policy.facts import ABSENT, TCP, UNKNOWN, Facts, Unnamed
from pellucid_policy.model import Policy
from pellucid_policy.objects import Objects, Origin
from pellucid_policy.plan import Pod
from pellucid_policy.program import PolicySet
from pellucid_policy.verdict import Action, Reason, RuleKey, Verdict

from .kernel.ruleset import counter_name
from .session.judge import Enforced, Judge
from .session.record import address_text
from .session.rehearsal import Rehearsal, rehearse
from .settings import NodeSettings
from .sniff.first_bytes import give_up, sniff

MAX_FIRST_BYTES = 2048  # of a question
MAX_SHOWN = 100  # rules, nearest to the one that decided
MAX_POSSIBLE = 16  # outcomes, where the address is not known

SCOPE, EXCLUDE, POD, KERNEL_RULES, NAME, PROGRAM, DIAL = "scope", "exclude", "pod", "kernel", "name", "rules", "dial"
"""Steps, in the order in which a flow takes them; it ends at the one that decides."""


class Question(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A new flow. source: namespace/name of a pod, or an address. destination: an address; None: not known. port: 0 for ICMP.

    first: what the client of a TCP connection sends first; empty: nothing, or nothing with a name; None: not known."""

    source: str
    destination: str | None
    port: int
    protocol: int = TCP
    first: bytes | None = None


class Rule(msgspec.Struct, frozen=True):
    """As in flow records, and where it is written: file:line, "" where the folder's files are not at hand."""

    kind: str
    namespace: str
    name: str
    rule: str
    written: str = ""


class Step(msgspec.Struct, frozen=True):
    """step: one of those above."""

    step: str
    said: str


class Earlier(msgspec.Struct, frozen=True):
    """A rule before the one that decided, and why it did not. near: but for that one thing it would have."""

    policy: Rule
    action: str
    why: str
    near: bool


class Would(msgspec.Struct, frozen=True):
    """The verdict if rules in mode Audit were enforced."""

    verdict: str
    reason: str
    policy: Rule | None


class Possible(msgspec.Struct, frozen=True, rename="camel"):
    """One of the outcomes where the address or the name is not known. when: for which of them."""

    verdict: str | None
    reason: str
    policy: Rule | None
    decided_by: str
    when: str


class Explanation(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """verdict: Allow, Block, Route; None: it cannot be told, possible says what it may be. policy: None: no rule decided.

    decided_by: kernel or proxy. response: how a blocked client learns of it. earlier: the last MAX_SHOWN, and how many more.
    kernel_counter: the nft counter that counts the flow, "" where the proxy decides. packets: how often that rule has decided in the
    kernel since the agent started; None where nobody can say. recent: flow records of the same pod and rule, newest last.
    advice: what to do if that is not what was expected."""

    verdict: str | None
    reason: str
    policy: Rule | None
    decided_by: str
    response: str = ""
    route: str = ""
    revision: str = ""
    source: str
    source_address: str
    destination: str | None
    port: int
    protocol: str
    name: str | None = None
    first_bytes: str = ""
    steps: tuple[Step, ...] = ()
    earlier: tuple[Earlier, ...] = ()
    earlier_more: int = 0
    audit: Would | None = None
    possible: tuple[Possible, ...] = ()
    kernel_counter: str = ""
    packets: int | None = None
    recent: tuple[msgspec.Raw, ...] = ()
    advice: str = ""


class Unexplainable(ValueError):
    """The question is about nothing that is known here. cure: what to ask instead."""

    def __init__(self, what: str, cure: str) -> None:
        super().__init__(what)
        self.cure = cure


def explain(
    question: Question, policies: PolicySet, objects: Objects | None, settings: NodeSettings, addresses: Iterable[bytes]
) -> Explanation:
    """What becomes of the flow, and why. objects: what policies was compiled from, None where that is gone. addresses: the node's, packed.

    Raises Unexplainable."""
    return _Explainer(question, policies, objects, settings, frozenset(addresses)).explained()


class _Explainer:
    """One question on its way."""

    def __init__(
        self,
        question: Question,
        policies: PolicySet,
        objects: Objects | None,
        settings: NodeSettings,
        addresses: frozenset[bytes],
    ) -> None:
        self._policies = policies
        self._objects = objects
        self._node = Node(settings.scope, settings.exclude, addresses)
        self._settings = settings
        # What becomes of a connection once the wait for its pod is over
        self._judge = Judge(msgspec.structs.replace(settings, unknown_pod_hold_s=0.0), addresses)
        self._judge.enforced = Enforced(policies)
        self._question = question
        self._destination = None if question.destination is None else _packed(question.destination)
        self._check()
        self._source, self._pod = self._who()
        self._group = policies.strangers if self._pod is None else self._pod.group
        self._steps: list[Step] = []

    def _check(self) -> None:
        question = self._question
        if not (0 <= question.port <= 65535 and 0 <= question.protocol <= 255):
            raise Unexplainable(
                f"port {question.port} or protocol {question.protocol} does not exist", "give 0-65535 and 0-255"
            )
        if question.first is not None and len(question.first) > MAX_FIRST_BYTES:
            raise Unexplainable(f"{len(question.first)} first bytes", f"give at most {MAX_FIRST_BYTES}")

    def _who(self) -> tuple[bytes, Pod | None]:
        text, wanted = self._question.source, self._destination
        if "/" not in text:
            source = _packed(text)
            if wanted is not None and len(source) != len(wanted):
                raise Unexplainable(
                    f"{text} and {self._question.destination} are of two IP versions", "give both of one"
                )
            known = {address: pod for pod in self._policies.pods for address in pod.addresses}
            return source, known.get(source)
        namespace, _, name = text.partition("/")
        pod = next((pod for pod in self._policies.pods if (pod.namespace, pod.name) == (namespace, name)), None)
        if pod is None:
            like = sorted(f"{each.namespace}/{each.name}" for each in self._policies.pods if each.name == name)
            cure = (
                f"did you mean {like[0]}?"
                if like
                else "give namespace/name of a Pod object in the folder, or an address"
            )
            raise Unexplainable(f"no pod {text} is known here, or it is on the host's network", cure)
        for address in pod.addresses:
            if wanted is None or len(address) == len(wanted):
                return address, pod
        has = ", ".join(map(address_text, pod.addresses)) or "none"
        raise Unexplainable(
            f"pod {text} has no address of the IP version of {self._question.destination}", f"it has {has}"
        )

    def explained(self) -> Explanation:
        if self._stays_unknown():
            return self._of_unknown_pod()
        if self._destination is None:
            return self._without_address()
        question, heard = self._question, None
        facts = Facts(self._destination, question.port, question.protocol, UNKNOWN)
        found = self._outcome(facts)
        if found.decided_by == PROXY:
            heard = rehearse(self._judge, self._source, self._destination, question.port, question.first)
            facts = Facts(
                self._destination, question.port, TCP, heard.name, encrypted=heard.encrypted, mismatch=heard.mismatch
            )
            found = self._outcome(facts)
            if heard.verdict is not None and found.verdict is not None:
                found = msgspec.structs.replace(
                    found, verdict=heard.verdict, reason=heard.verdict.reason.value, audited=heard.audited
                )
        elif found.rules == NAMELESS:
            facts = msgspec.structs.replace(facts, name=ABSENT)
        by_policy = policy_explain.outcome(self._policies, self._node, self._source, self._group, facts)
        self._describe(found, facts, heard, by_policy)
        return self._answer(found, facts, heard, by_policy)

    def _stays_unknown(self) -> bool:
        """Whether all that it may have is refused, unless a pod with its address comes."""
        return (
            self._held()
            and self._settings.unknown_pod_action == "Block"
            and self._node.takes(self._source)
            and not (self._destination is not None and self._node.excludes(self._destination))
        )

    def _held(self) -> bool:
        return self._pod is None and self._settings.unknown_pod_hold_s > 0

    def _of_unknown_pod(self) -> Explanation:
        local = self._destination is not None and self._node.owns(self._destination)
        waits = self._question.protocol == TCP and not local
        self._say(SCOPE, f"{address_text(self._source)} is in scope")
        self._say(POD, self._pod_said())
        return msgspec.structs.replace(
            self._undecided(),
            verdict=Action.BLOCK.value,
            reason=Reason.UNKNOWN_POD.value,
            decided_by=PROXY if waits else KERNEL,
            response="a TCP reset" if waits else "nothing answers",
            steps=tuple(self._steps),
            advice=_ADVICE[Reason.UNKNOWN_POD.value],
        )

    def _outcome(self, facts: Facts) -> Outcome:
        return policy_explain.outcome(self._policies, self._node, self._source, self._group, facts)

    # The steps

    def _describe(self, found: Outcome, facts: Facts, heard: Rehearsal | None, by_policy: Outcome) -> None:
        if not self._on_the_way(found, facts):
            return
        self._at_the_kernel(found, facts)
        if found.decided_by == KERNEL:
            return
        assert heard is not None
        if found.verdict is None and heard.verdict is None:
            self._say(NAME, "a rule asks for the name (SNI or Host), which the question does not tell")
            return
        if self._asks(facts):
            self._say(NAME, _name_said(heard))
        assert found.verdict is not None
        assert by_policy.verdict is not None
        self._say(PROGRAM, _decision_said(by_policy.verdict))
        if found.verdict.reason is Reason.DIAL_DENIED:
            self._say(DIAL, "the target is one that is never dialled on a pod's behalf: loopback, metadata, the node")

    def _on_the_way(self, found: Outcome, facts: Facts) -> bool:
        source = address_text(self._source)
        if found.reason == policy_explain.OUT_OF_SCOPE:
            self._say(
                SCOPE, f"{source} is in no network of the scope ({', '.join(self._node.scope)}): it passes unseen"
            )
            return False
        self._say(SCOPE, f"{source} is in scope")
        if found.reason == policy_explain.EXCLUDED:
            self._say(EXCLUDE, f"{address_text(facts.address)} is excluded: never taken, whatever policies say")
            return False
        self._say(POD, self._pod_said())
        return found.reason != policy_explain.NOT_SELECTED or found.decided_by != KERNEL

    def _pod_said(self) -> str:
        pod = self._pod
        who = (
            f"pod {pod.namespace}/{pod.name}" if pod else "no pod's address: a pod of namespace default without labels"
        )
        if self._held():
            hold_s = f"{self._settings.unknown_pod_hold_s:g} s"
            if self._settings.unknown_pod_action == "Block":
                return (
                    f"no pod's address: TCP waits {hold_s} for its pod and is refused then; all else is dropped at once"
                )
            who += f", once TCP has waited {hold_s} for its pod"
            if self._group is None:
                return f"{who}; no policy selects it"
        if self._group is None:
            return f"{who}; no policy selects it, so the kernel lets its flows pass"
        keys = [
            f"{key.namespace}/{key.name}" if key.namespace else key.name
            for key in self._policies.groups[self._group].policies
        ]
        return f"{who}; policies in order: {', '.join(keys[:8])}{f' and {len(keys) - 8} more' if len(keys) > 8 else ''}"

    def _at_the_kernel(self, found: Outcome, facts: Facts) -> None:
        if found.reason == policy_explain.QUIC_REJECTED:
            self._say(
                KERNEL_RULES, "UDP 443 is refused (names.quic), so that clients fall back to TCP, which has a name"
            )
        elif found.rules == NAMELESS:
            what = (
                "the node's own address"
                if facts.protocol == TCP
                else policy_explain.protocol_said(facts.protocol, facts.port)
            )
            self._say(KERNEL_RULES, f"{what}: the proxy never carries that, the kernel decides without a name")
        elif found.rules == LEADING:
            self._say(KERNEL_RULES, "addresses decide, before any rule that needs the proxy")
        else:
            self._say(KERNEL_RULES, "no leading rule decides: a worker of the proxy takes the connection")
        if found.rules:
            assert found.verdict is not None
            self._say(KERNEL_RULES, _decision_said(found.verdict))

    def _asks(self, facts: Facts) -> bool:
        return (
            self._outcome(msgspec.structs.replace(facts, name=UNKNOWN, encrypted=False, mismatch=False)).verdict is None
        )

    def _say(self, step: str, said: str) -> None:
        self._steps.append(Step(step, said))

    # The answer

    def _answer(self, found: Outcome, facts: Facts, heard: Rehearsal | None, by_policy: Outcome) -> Explanation:
        verdict = found.verdict
        decider = by_policy.verdict.rule if by_policy.verdict else None
        earlier = self._earlier(found, facts, decider)
        asked = heard is not None and heard.protocol != ""
        return msgspec.structs.replace(
            self._undecided(),
            verdict=verdict.action.value if verdict else None,
            reason=found.reason,
            policy=self._rule(verdict.rule if verdict else None),
            decided_by=found.decided_by,
            response=policy_explain.blocked_how(verdict, found.decided_by, facts.protocol)
            if verdict and verdict.action is Action.BLOCK
            else "",
            route=_route_said(verdict),
            name=facts.name if isinstance(facts.name, str) else None,
            first_bytes=heard.protocol if heard is not None and asked else "",
            steps=tuple(self._steps),
            earlier=tuple(self._shown(each) for each in earlier[-MAX_SHOWN:]),
            earlier_more=max(0, len(earlier) - MAX_SHOWN),
            audit=self._would(found.audited, by_policy.verdict),
            possible=self._by_name(facts) if verdict is None else (),
            kernel_counter=self._counter(found),
            advice=self._advice(found, earlier, by_policy),
        )

    def _undecided(self) -> Explanation:
        """What was asked about, without an answer."""
        pod, question = self._pod, self._question
        return Explanation(
            verdict=None,
            reason="",
            policy=None,
            decided_by=PROXY,
            revision=self._policies.revision,
            source=f"{pod.namespace}/{pod.name}" if pod else address_text(self._source),
            source_address=address_text(self._source),
            destination=None if self._destination is None else address_text(self._destination),
            port=question.port,
            protocol=policy_explain.protocol_said(question.protocol, question.port).split(" ")[0],
        )

    def _counter(self, found: Outcome) -> str:
        if found.reason == policy_explain.QUIC_REJECTED:
            return "quic_rejected"
        if found.rules and self._group is not None:
            return counter_name(found.rules, self._group, found.position)
        return ""

    def _earlier(self, found: Outcome, facts: Facts, decider: RuleKey | None) -> list[Considered]:
        if self._objects is None or self._group is None or not (found.rules or found.decided_by == PROXY):
            return []
        try:
            tiers = policy_explain.rules_of(self._objects, self._policies.groups[self._group])
        except LookupError:
            return []
        return policy_explain.considered(tiers, facts, decider)

    def _shown(self, each: Considered) -> Earlier:
        rule = self._rule(each.rule)
        assert rule is not None
        return Earlier(rule, each.action, each.why, each.near)

    def _would(self, audited: Verdict | None, enforced: Verdict | None) -> Would | None:
        """None where rules in mode Audit change nothing."""
        if audited is None or enforced is None or (audited.action, audited.rule) == (enforced.action, enforced.rule):
            return None
        return Would(audited.action.value, audited.reason.value, self._rule(audited.rule))

    def _rule(self, key: RuleKey | None) -> Rule | None:
        return None if key is None else Rule(key.kind, key.namespace, key.policy, key.rule, self._written(key))

    def _written(self, key: RuleKey) -> str:
        objects = self._objects
        origin: Origin | None = objects.origins.get((key.kind, key.namespace, key.policy)) if objects else None
        if objects is None or origin is None:
            return ""
        policies: tuple[Policy, ...] = (*objects.policies, *objects.cluster_policies)
        for policy in policies:
            if (policy.kind, policy.namespace, policy.metadata.name) == (key.kind, key.namespace, key.policy):
                for at, rule in enumerate(policy.spec.rules):
                    if key.rule == (f"rules[{at}]" if rule.name is UNSET else rule.name):
                        problem = origin.problem(f"spec.rules[{at}]", "")
                        return f"{problem.file}:{problem.line}"
        return ""

    def _advice(self, found: Outcome, earlier: list[Considered], by_policy: Outcome) -> str:
        near = [each for each in earlier if each.near and not each.audit]
        wanted = "Allow" if found.verdict and found.verdict.action is Action.BLOCK else "Block"
        almost = next((each for each in reversed(near) if each.action == wanted), None)
        if almost is not None and found.verdict is not None and found.reason != Reason.DIAL_DENIED.value:
            return f"rule {almost.rule.rule} of {almost.rule.policy} would {wanted.lower()} it, but {almost.why}"
        return _ADVICE.get(found.reason, "")

    # What is not known

    def _by_name(self, facts: Facts) -> tuple[Possible, ...]:
        """The outcome without a name; with one it depends on that."""
        said = self._outcome(msgspec.structs.replace(facts, name=ABSENT))
        return (
            self._possible(said, "the client says no name"),
            Possible(None, "NameUnknown", None, PROXY, "it says one: ask with --sni or --request"),
        )

    def _possible(self, said: Outcome, when: str) -> Possible:
        verdict = said.verdict
        return Possible(
            verdict.action.value if verdict else None,
            said.reason,
            self._rule(verdict.rule) if verdict else None,
            said.decided_by,
            when,
        )

    def _without_address(self) -> Explanation:
        question = self._question
        version = 4 if len(self._source) == 4 else 6
        self._say(
            SCOPE, f"{address_text(self._source)} is {'in scope' if self._node.takes(self._source) else 'not in scope'}"
        )
        self._say(POD, self._pod_said())
        heard = _heard(question.first)
        facts = Facts(bytes(len(self._source)), question.port, question.protocol, *heard)
        if not self._node.takes(self._source):
            one = self._outcome(facts)
            return self._uncertain([(one, "any address")], facts, certain=True)
        found = policy_explain.regions(self._policies, self._node, self._group, facts, version)
        if found is None:
            return self._uncertain([], facts, certain=False)
        by: dict[tuple[object, ...], list[policy_explain.Region]] = {}
        for region in found:
            verdict = region.outcome.verdict
            key = (
                verdict and verdict.action,
                region.outcome.reason,
                verdict and verdict.rule,
                region.outcome.decided_by,
            )
            by.setdefault(key, []).append(region)
        ordered = sorted(by.values(), key=_size, reverse=True)
        outcomes = [
            (each[0].outcome, "any other address" if not at and len(ordered) > 1 else _addresses_said(each))
            for at, each in enumerate(ordered)
        ]
        return self._uncertain(outcomes, facts, certain=len(ordered) == 1 and outcomes[0][0].verdict is not None)

    def _uncertain(self, outcomes: list[tuple[Outcome, str]], facts: Facts, *, certain: bool) -> Explanation:
        """certain: there is one outcome. Where there are several that act alike, the verdict is certain and its rule is not."""
        one = outcomes[0][0] if certain else None
        verdict = one.verdict if one else None
        actions = {each.verdict.action.value if each.verdict else None for each, _ in outcomes}
        if verdict is not None:
            said = f"whatever the address is: {_decision_said(verdict)}"
        elif len(actions) == 1 and None not in actions:
            said = f"{next(iter(actions))}, whatever the address is; by which rule depends on it"
        else:
            said = "what happens depends on the address, which the question does not tell"
        self._say(PROGRAM, said)
        return msgspec.structs.replace(
            self._undecided(),
            verdict=next(iter(actions)) if len(actions) == 1 else None,
            reason=one.reason if one else "AddressUnknown",
            policy=self._rule(verdict.rule) if verdict else None,
            decided_by=one.decided_by if one else PROXY,
            name=facts.name if isinstance(facts.name, str) else None,
            steps=tuple(self._steps),
            possible=() if certain else tuple(self._possible(each, when) for each, when in outcomes[:MAX_POSSIBLE]),
            advice="unless it is one of the node's own addresses, or one that is never dialled"
            if len(actions) == 1
            else "ask again with --address, as the pod's resolver answers",
        )


_ADVICE = {
    policy_explain.OUT_OF_SCOPE: "to have it taken, add its network to --scope, or to podCIDRs of the TransparentProxy object",
    policy_explain.EXCLUDED: "to have it taken, take the network out of exclude.cidrs of the TransparentProxy object",
    policy_explain.NOT_SELECTED: "to have it decided, let the podSelector of a policy match the labels of its Pod object",
    policy_explain.QUIC_REJECTED: "to let UDP 443 be decided by rules, set names.quic: Continue in the policies of this pod",
    Reason.DEFAULT_ACTION.value: "no rule matches; add one, or change defaultAction of the TransparentProxy object",
    Reason.NAME_MISSING.value: "the rule wants a name; put a rule for this address before it, or set names.missingSNI: Continue",
    Reason.HOST_MISMATCH.value: "the names disagree, or the bytes break their protocol; hostMismatch: Continue takes that for no name",
    Reason.ENCRYPTED_CLIENT_HELLO.value: "the hello is encrypted; names.encryptedClientHello: UseOuterName compares the name outside",
    Reason.NOT_ROUTABLE.value: "Route works for TCP through the proxy alone; put a rule for this protocol before it",
    Reason.DIAL_DENIED.value: "if it must be reached, --allow-dial takes it off that list",
    Reason.UNKNOWN_POD.value: "see to its Pod object, with this address; or unknownPods of the TransparentProxy: then: Allow",
    "NameUnknown": "ask again with --sni NAME, --request 'GET http://NAME/', or --no-name",
}  # fmt: skip


def _packed(text: str) -> bytes:
    try:
        address = ipaddress.ip_address(text)
    except ValueError as err:
        raise Unexplainable(
            f"{text} is neither an address nor namespace/name", "write 10.244.1.7 or shop/cart"
        ) from err
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).packed


def _heard(first: bytes | None) -> tuple[str | Unnamed, bool, bool]:
    """name, encrypted and mismatch of first bytes, as a worker reads them where it reads them at all."""
    if first is None:
        return UNKNOWN, False, False
    said = (sniff(first) or give_up(first)) if first else None
    return (ABSENT, False, False) if said is None else (said.name or ABSENT, said.encrypted, said.mismatch)


def _name_said(heard: Rehearsal) -> str:
    protocol = heard.protocol or "no first bytes: the client waits for the server to speak"
    if heard.mismatch:
        return f"{protocol}: its names disagree, or it breaks its protocol, so no name in it is trusted"
    if isinstance(heard.name, str):
        return f"{protocol} asks for {heard.name}{', the outer name of an encrypted hello' if heard.encrypted else ''}"
    return f"{protocol}: it has no name"


def _decision_said(verdict: Verdict) -> str:
    if verdict.rule is None:
        return (
            f"no rule matches: {verdict.action.value} by the default action"
            if verdict.reason is Reason.DEFAULT_ACTION
            else f"{verdict.action.value}, {verdict.reason.value}"
        )
    said = "matches" if verdict.reason is Reason.RULE_MATCHED else f"refuses it: {verdict.reason.value}"
    return f"rule {verdict.rule.rule} of {verdict.rule.policy} {said}: {verdict.action.value}"


def _route_said(verdict: Verdict | None) -> str:
    if verdict is None or verdict.route is None:
        return ""
    route, said = verdict.route, []
    if route.address is not None:
        said.append(f"to {_place(route.address, route.port or 0)}")
    if route.via is not None:
        said.append(f"via {route.via.protocol} {_place(route.via.address, route.via.port)}")
    return " ".join(said)


def _place(address: bytes, port: int) -> str:
    text = address_text(address)
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"


def _size(regions: list[policy_explain.Region]) -> int:
    return sum(int.from_bytes(each.last, "big") - int.from_bytes(each.first, "big") + 1 for each in regions)


def _addresses_said(regions: list[policy_explain.Region]) -> str:
    shown = ", ".join(_span(each) for each in regions[:3])
    return f"{shown} and {len(regions) - 3} more" if len(regions) > 3 else shown


def _span(region: policy_explain.Region) -> str:
    first, last = ipaddress.ip_address(region.first), ipaddress.ip_address(region.last)
    networks = list(ipaddress.summarize_address_range(first, last))
    return str(networks[0]) if len(networks) == 1 else f"{first}-{last}"
