"""What happens to one connection, without I/O: the engine says what came, the session says what to do next.

Rule 1. A verdict that addresses decide is taken before any byte is read.
Rule 2. Where a name is needed, no byte of the client goes upstream before the verdict.
Rule 3. A client that stays silent may be waiting for the server to speak first (SMTP, SSH, MySQL). Where the rules would allow the
        connection without a name, the upstream is dialled and both are listened to: whoever speaks first decides what is known.
Rule 4. What began as a protocol and did not go on (a hello that stops in the middle) is a mismatch, not an absent name.
Rule 5. A plain HTTP connection admitted by its Host is checked again at every request.
Rule 6. Whatever goes wrong in deciding is a refusal.
Rule 7. A connection is its pod's: it ends when its address is another pod's, or nobody's.
Rule 8. Where unknown pods are held, nothing is decided of an address without a pod until there is one, or the time is over.
Rule 9. When the policy changes, a connection is decided again with its facts, unless a rule of a policy that says Keep decided it. A name
        that was never read counts as absent, for it never will be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pellucid_policy.decide import decide
from pellucid_policy.facts import ABSENT, TCP, UNKNOWN, Facts, Unnamed
from pellucid_policy.plan import same_pod
from pellucid_policy.verdict import NEED_NAME, Action, Reason, Response, Verdict

from ..engine.share import Share
from ..sniff.first_bytes import HTTP1, Sniffed, give_up, sniff
from ..sniff.refusal import refusal
from .http_guard import Refusal, RequestGuard
from .judge import settled
from .record import address_text
from .via import Handshake, handshake

if TYPE_CHECKING:
    from .judge import Identity, Judge
    from .record import Tally

WAIT, DIAL, RACE, REFUSE, HOLD = range(5)
"""The next step: wait for bytes; dial target and relay; dial, and see who speaks first; end with reply(); leave unanswered."""

GOES_ON, POLICY_CHANGED, POD_CHANGED = 0, 10, 11
"""What becomes of a live connection; the latter two are indexes of ending.ENDINGS."""

NO_BYTES, SERVER_FIRST = "None", "ServerFirst"
"""What stands for the protocol where the client's first bytes did not tell it."""

# A member looked up in its enum costs a microsecond in Python 3.11.
ALLOW, BLOCK, ROUTE, INTERCEPT = Action.ALLOW, Action.BLOCK, Action.ROUTE, Action.INTERCEPT
DROP, RESPOND = Response.DROP, Response.RESPOND

UNDECIDABLE = Verdict(action=Action.BLOCK, reason=Reason.UNDECIDABLE)
UNKNOWN_POD = Verdict(action=Action.BLOCK, reason=Reason.UNKNOWN_POD)
LIMIT_REACHED = Verdict(action=Action.BLOCK, reason=Reason.LIMIT_REACHED)
DIAL_DENIED = Verdict(action=Action.BLOCK, reason=Reason.DIAL_DENIED)
NOT_SELECTED = Verdict(action=Action.ALLOW, reason=Reason.NOT_SELECTED)


class Session:
    """Addresses are packed. After DIAL or RACE: target (address, port) or None for the original destination, spoof whether from the
    source's address, handshake with an upstream proxy or None. After DIAL also: redial if a raced upstream is the wrong one; guard, and
    then held, the part of the first bytes that it let pass. Until then held is first bytes that do not say enough yet.

    share: its pod's. too_many: its pod has as many connections as it may, and this one is refused whatever the rules say. unknown: it waits
    for a pod with its address to be known; waited: long enough.

    There are as many of these as connections: what connections have in common (a pod's address, a name) is one object."""

    def __init__(self, judge: Judge, source: bytes, destination: bytes, port: int, share: Share | None = None) -> None:
        self.judge = judge
        self.source = source
        self.destination = destination
        self.port = port
        self.share = Share(source) if share is None else share
        self.too_many = False
        self.unknown = False
        self.waited = False
        self.identity: Identity | None = None
        self.verdict: Verdict = UNDECIDABLE  # until there is one: what a record says if the connection ends before
        self.audited: Verdict | None = None
        self.tally: Tally | None = None
        self.name: str | None = None
        self.protocol = NO_BYTES
        self.encrypted = False
        self.mismatch = False
        self.held = b""
        self.target: tuple[bytes, int] | None = None
        self.spoof = True
        self.handshake: Handshake | None = None
        self.redial = False
        self.guard: RequestGuard | None = None

    # Events

    def opened(self) -> int:
        """The connection is there, its first bytes are not."""
        return self._settle(UNKNOWN, False, False)

    def received(self, data: bytes) -> int:
        """data is all that the client sent so far."""
        first = sniff(data)
        if first is not None:
            return self._believe(first, data)
        begun = self.held
        self.held = data
        return WAIT if begun or self.tally is not None else self.opened()

    def silent(self) -> int:
        """Nothing came for a moment: dial now, if the connection would be allowed without a name."""
        step = self._settle(ABSENT, False, False)
        if step == DIAL:
            return RACE
        self.tally = None  # not the last word
        return WAIT

    def server_spoke(self) -> int:
        """In a race, the server sent bytes first."""
        if self.held:
            return self.gave_up()
        self.protocol = SERVER_FIRST
        return self._settle(ABSENT, False, False)

    def gave_up(self) -> int:
        """The first bytes did not come in time, or the client ended without them."""
        if self.held:
            return self._believe(give_up(self.held), self.held)
        return self._settle(ABSENT, False, False)

    def known(self) -> bool:
        """Whether there is a pod with its address."""
        return self.judge.enforced.identity(self.source).pod is not None

    def found(self) -> None:
        """Its pod is known: what came so far is to be told again."""
        self.unknown = False
        self.judge.unknown_known += 1

    def expired(self) -> int:
        """No pod with its address came to be known in time. WAIT: what came so far is to be told again."""
        self.unknown, self.waited = False, True
        self.judge.unknown_expired += 1
        if self.judge.settings.unknown_pod_action != "Block":
            return WAIT
        self.identity = self.judge.enforced.identity(self.source)
        self._refuse(UNKNOWN_POD)
        return REFUSE

    def reply(self) -> bytes | None:
        """What a refused client is told before the end, None: a reset."""
        if self.verdict.response is not RESPOND:
            return None
        return refusal(self.protocol, self.verdict.status, self.verdict.body)

    # Deciding

    def _believe(self, first: Sniffed, data: bytes) -> int:
        """Decide by what the first bytes said."""
        self.held = b""
        self.protocol = first.protocol
        self.name = first.name
        self.encrypted = first.encrypted
        self.mismatch = first.mismatch
        step = self._settle(ABSENT if first.name is None else first.name, first.encrypted, first.mismatch)
        if step == DIAL and first.protocol == HTTP1 and self._depends_on_name():
            return self._guard(data)
        return step

    def _verdict(self, name: str | Unnamed, encrypted: bool, mismatch: bool) -> Verdict | None:
        """None if a name is needed first. By the policy in force now, unless it may have changed and the one before is to be kept."""
        identity = self.judge.enforced.identity(self.source)
        before = self.identity
        if before is not None and before is not identity:
            if not same_pod(before.pod, identity.pod):
                return UNDECIDABLE
            if self.tally is not None and self.verdict.keep:
                identity = before
        self.identity = identity
        self.source = identity.address
        group = identity.group
        if group is None:
            return NOT_SELECTED
        if encrypted or mismatch or name is ABSENT:
            verdict = decide(group.enforced, Facts(self.destination, self.port, TCP, name, encrypted, mismatch))
        else:
            known = name if isinstance(name, str) else None
            verdict = settled(identity, group, self.destination, self.port, known)
        if group.audited is not None:
            audited = decide(group.audited, Facts(self.destination, self.port, TCP, name, encrypted, mismatch))
            if audited is NEED_NAME:
                return None
            self.audited = audited
        return None if verdict is NEED_NAME else verdict

    def _settle(self, name: str | Unnamed, encrypted: bool, mismatch: bool) -> int:
        if self.too_many:
            self.identity = self.judge.enforced.identity(self.source)
            self._refuse(LIMIT_REACHED)
            return REFUSE
        if self.judge.holds_unknown and not self.waited and not self.known():
            self.unknown = True
            return WAIT
        before = (self.target, self.spoof, self.verdict.route) if self.tally is not None else None
        verdict = self._verdict(name, encrypted, mismatch)
        if verdict is None:
            return WAIT
        if verdict.action is ALLOW or verdict.action is ROUTE:
            verdict = self._aim(verdict)
        self.verdict = verdict
        self.tally = self.judge.tallies.of(verdict)
        if verdict.action is BLOCK:
            return HOLD if verdict.response is DROP else REFUSE
        if verdict.action is INTERCEPT:
            raise RuntimeError(
                "an Intercept rule reached a worker that cannot open TLS: it should have been refused at load"
            )
        self.redial = before is not None and before != (self.target, self.spoof, verdict.route)
        return DIAL

    def _aim(self, verdict: Verdict) -> Verdict:
        """Set target, spoof and handshake. Returns verdict, or the refusal if the target must not be dialled."""
        judge = self.judge
        node_source = (verdict.source_address or judge.source_address) == "Node"
        address, port, route = self.destination, self.port, verdict.route
        self.target = self.handshake = None
        if route is not None:
            address, port = route.address or address, route.port or port
            if judge.dial_denied(address, node_source):
                return DIAL_DENIED
            if route.via is not None:
                named = self.name if route.address is None else None
                self.handshake = handshake(route.via.protocol, named or address_text(address), port)
                address, port = route.via.address, route.via.port
            self.target = (address, port)
        self.spoof = not node_source and len(address) == len(self.source)
        if judge.dial_denied(address, not self.spoof):
            return DIAL_DENIED
        return verdict

    def _depends_on_name(self) -> bool:
        identity = self.identity
        if identity is None or identity.group is None:
            return False
        return settled(identity, identity.group, self.destination, self.port, None) is NEED_NAME

    # After a change of policy

    def review(self) -> int:
        """GOES_ON, or why this connection is to end now. Then verdict says what the policy in force says of it."""
        known = self.identity
        if known is None:
            return GOES_ON
        enforced = self.judge.enforced
        identity = enforced.identity(self.source)
        if identity is known:
            return GOES_ON
        if not same_pod(known.pod, identity.pod):
            return POD_CHANGED
        if self.tally is None or self.verdict.keep:
            return GOES_ON
        if enforced.same_rules(known.group, identity.group):
            self.identity = identity
            return GOES_ON
        return GOES_ON if self._still_allowed() else POLICY_CHANGED

    def _still_allowed(self) -> bool:
        before = self.verdict
        verdict = self._verdict(ABSENT if self.name is None else self.name, self.encrypted, self.mismatch)
        if verdict is None:
            verdict = UNDECIDABLE
        elif verdict.action is before.action and verdict.route == before.route:
            if self.protocol != HTTP1 or self.guard is not None or not self._depends_on_name():
                self.verdict = verdict
                self.tally = self.judge.tallies.of(verdict)
                return True
            verdict = UNDECIDABLE  # its later requests may bear other names, and nothing looks at them
        self._refuse(verdict)
        return False

    # Plain HTTP: the engine hands over what the client sends, and relays what is passed

    @property
    def opaque(self) -> bool:
        """No more requests will come: the connection became something else (101), relay without looking."""
        return self.guard is None or self.guard.opaque

    def feed(self, data: bytes) -> tuple[bytes, Refusal | None]:
        """The part of the client's bytes that may go upstream now, and why the rest never will (None: it may, later)."""
        assert self.guard is not None
        passed, refused = self.guard.feed(data)
        if refused is not None:
            self.distrust(refused)
        return passed, refused

    def responses(self) -> Responses | None:
        """What must see the server's bytes before the client does, or None."""
        return Responses(self) if self.guard is not None and self.guard.awaiting_response else None

    def distrust(self, refused: Refusal) -> None:
        """Note that the guard refused, unless it was because of a verdict, which is noted already."""
        if self.verdict.action is not BLOCK:
            self._refuse(Verdict(BLOCK, Reason.HOST_MISMATCH, self.verdict.rule, RESPOND, refused.status))

    def _guard(self, data: bytes) -> int:
        self.guard = RequestGuard(self._allows)
        self.held, refused = self.feed(data)
        if refused is None:
            return DIAL
        self.guard = None
        return REFUSE

    def _allows(self, name: str | None, mismatch: bool) -> bool:
        """Whether a request may go where the connection goes."""
        verdict = self._verdict(ABSENT if name is None else name, False, mismatch)
        if verdict is not None and verdict.action is self.verdict.action and verdict.route == self.verdict.route:
            return True
        if verdict is None or verdict.action is not BLOCK:
            verdict = UNDECIDABLE  # allowed, but elsewhere: this connection cannot go there
        self.name = name  # the record tells of the request that ended the connection
        self._refuse(verdict)
        return False

    def _refuse(self, verdict: Verdict) -> None:
        self.verdict = verdict
        self.tally = self.judge.tallies.of(verdict)


class Responses:
    """The server's answer to an Upgrade: it tells whether what the client sent behind it may go on. released: that, once."""

    __slots__ = ("_session", "opaque", "released")

    def __init__(self, session: Session) -> None:
        self._session = session
        self.opaque = False
        self.released = b""

    def feed(self, data: bytes) -> tuple[bytes, Refusal | None]:
        """The part of the server's bytes that may go to the client, and why the rest never will."""
        guard = self._session.guard
        assert guard is not None
        self.released, refused = guard.on_response(data)
        self.opaque = not guard.awaiting_response
        if refused is not None:
            self._session.distrust(refused)
            return b"", refused
        return data, None
