"""What must hold of policies and decisions whatever files, clients and servers say."""

from __future__ import annotations

import ipaddress
import zlib
from collections.abc import Callable

import msgspec

from fuzz.claims import cuts, hold
from pellucid_policy.compile import PolicySet, compile_policies, decode, encode
from pellucid_policy.features import unsupported
from pellucid_policy.objects import Objects
from pellucid_policy.parse import parse_files
from pellucid_policy.verdict import Action
from pellucid_proxy.session.dial_deny import denied, networks
from pellucid_proxy.session.judge import Enforced, Judge
from pellucid_proxy.session.session import DIAL, HOLD, RACE, REFUSE, WAIT, Session
from pellucid_proxy.settings import NodeSettings

POD, SERVER = bytes((10, 244, 1, 10)), bytes((192, 0, 2, 10))
POLICY = b"""
apiVersion: pellucid.dev/v1alpha1
kind: TransparentPolicy
metadata: {name: p, namespace: default}
spec:
  podSelector: {}
  names: {missingSNI: %s, encryptedClientHello: Block}
  rules:
  - {name: evil, match: {destinations: [{domain: evil.example}, {domain: "*.evil.example"}]}, action: Block}
  - {name: sites, match: {destinations: [{domain: a.example}, {domain: "*.example.com"}]}, action: Allow}
  - name: elsewhere
    match: {destinations: [{domain: b.example}]}
    action: Route
    route: {to: {address: 192.0.2.99, port: 8080}}
  - {name: rest, match: {}, action: %s}
"""


def _judge(missing: bytes, rest: bytes) -> Judge:
    objects = parse_files({"p.yaml": POLICY % (missing, rest)})
    assert isinstance(objects, Objects), objects
    made = Judge(NodeSettings(scope=("10.244.0.0/16",)), [bytes((192, 0, 2, 1))])
    made.enforced = Enforced(compile_policies(objects))
    return made


JUDGES = [_judge(b"Continue", b"Allow"), _judge(b"Continue", b"Block"), _judge(b"Block", b"Allow")]


def session(data: bytes) -> str:
    """A connection is decided by what its client sent, however it came; what is passed began what came, and no forbidden name is."""
    judge = JUDGES[zlib.crc32(data) % len(JUDGES)]
    whole = _decided(judge, data, [], silence=False)
    for silence in (False, True):
        again = _decided(judge, data, cuts(data), silence=silence)
        hold(again == whole, silence, again, whole)
    return " ".join(whole)


def _decided(judge: Judge, data: bytes, places: list[int], *, silence: bool) -> tuple[str, str, str, str]:
    """What becomes of the connection, its name, protocol and verdict. silence: the client is silent first."""
    flow = Session(judge, POD, SERVER, 443)
    step = flow.opened()
    if silence and step == WAIT:
        step = flow.silent()
    passed, came, refused = b"", 0, False
    for end in sorted({*places, len(data)} - {0}):
        if step in (WAIT, RACE):
            step = flow.received(data[:end])
            passed = flow.held if flow.guard is not None else b""
        elif flow.guard is not None and not refused:
            more, refusal = flow.feed(data[came:end])
            passed, refused = passed + more, refusal is not None
        came = end
    if step in (WAIT, RACE):
        step = flow.gave_up()
    hold(step in (DIAL, REFUSE, HOLD), step)
    hold(data.startswith(passed), passed)
    hold((step == DIAL and not refused) == (flow.verdict.action is not Action.BLOCK), step, flow.verdict)
    if flow.name is not None and (flow.name == "evil.example" or flow.name.endswith(".evil.example")):
        hold(step != DIAL or refused, flow.name)
    reply = flow.reply() if step == REFUSE else None
    hold(reply is None or reply.startswith((b"HTTP/1.1 4", b"\x15\x03")), reply)
    became = "dialled" if step == DIAL and not refused else "refused"
    return became, str(flow.name), flow.protocol, f"{flow.verdict.action} {flow.verdict.reason}"


def policy_file(data: bytes) -> str:
    """A file of policies is refused with problems that name a cure, or it compiles, the same each time, and survives its storage."""
    found = parse_files({"p.yaml": data})
    if not isinstance(found, Objects):
        hold(bool(found) and all(problem.message for problem in found), found)
        return f"refused {min(len(found), 3)} {found[0].path.count('.')}"
    if unsupported(found):
        return "unsupported"
    made = compile_policies(found)
    stored = encode(made)
    hold(encode(decode(stored)) == stored)
    hold(encode(compile_policies(found)) == stored)
    return f"compiled {min(len(made.groups), 3)} {min(len(made.pods), 3)}"


def policy_set(data: bytes) -> str:
    """What a worker gets as its policy is read or refused."""
    try:
        made: PolicySet = decode(data)
    except (msgspec.MsgspecError, ValueError) as error:
        return str(error).partition(" - ")[0][:60]
    return f"{len(made.groups)}"


def dial_deny(data: bytes) -> str:
    """Nothing is let through that ipaddress takes for special, however it is embedded."""
    address = data[:4].ljust(4, b"\0") if len(data) < 16 else data[:16]
    refused = denied(address, node_source=True, node_addresses=frozenset({SERVER}))
    number = ipaddress.ip_address(address)
    special = (
        number.is_loopback or number.is_link_local or number.is_multicast or number.is_unspecified or address == SERVER
    )
    if isinstance(number, ipaddress.IPv6Address):
        within = number.ipv4_mapped or number.sixtofour
        special = special or number.ipv4_mapped is not None or bool(within and within.is_loopback)
    hold(refused or not special, number)
    allowed = denied(
        address, node_source=True, node_addresses=frozenset(), allow=networks([f"{number}/{len(address) * 8}"])
    )
    hold(not allowed, number)
    return f"{len(address)} {refused} {number.is_private}"


TARGETS: dict[str, Callable[[bytes], str]] = {
    "session": session,
    "policy_file": policy_file,
    "policy_set": policy_set,
    "dial_deny": dial_deny,
}
