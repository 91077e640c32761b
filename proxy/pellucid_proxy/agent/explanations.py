"""Why a flow is decided as it is, asked of a running node: its enforced policy, its counters, its latest flow records."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from pellucid_policy.objects import Objects
from pellucid_policy.verdict import RuleKey

from ..control import Series
from ..explain import Explanation, Question, Unexplainable, explain
from ..replay import RecordedRule
from ..session.record import rule_labels
from .flow_hub import FlowHub
from .policy import Accepted, Fresh
from .report import Report
from .status import PATIENCE_S, VERSION, NotRunning, connected, refusal, translated

MAX_RECENT = 5
MAX_LOOKED_AT = 5000  # records, for the recent ones
ANSWER_S = 10.0  # for the client's patience: an explanation takes milliseconds, a machine under load may take longer


class ExplainRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """get: explain."""

    get: str = "explain"
    version: int = VERSION
    flow: Question


class _Refused(msgspec.Struct, frozen=True):
    error: str
    cure: str = ""


class _Source(msgspec.Struct, frozen=True):
    address: str


class _Record(msgspec.Struct, frozen=True):
    """What of a flow record is compared with an explanation."""

    verdict: str
    policy: RecordedRule | None
    source: _Source


class Explanations:
    """Answers ExplainRequests, one at a time."""

    def __init__(self, report: Report, hub: FlowHub, addresses: Callable[[], tuple[bytes, ...]]) -> None:
        self._report = report
        self._hub = hub
        self._addresses = addresses
        self._objects: tuple[str, Objects | None] = ("", None)  # by the revision that was compiled from them
        self._one_at_a_time = asyncio.Lock()

    def enforced(self, accepted: Accepted) -> None:
        """This is in force from now on."""
        objects = accepted.objects if isinstance(accepted, Fresh) else None
        self._objects = (accepted.policy.revision, objects)

    async def answer(self, line: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """status.Answer."""
        writer.write(await self._answer(line) + b"\n")
        async with asyncio.timeout(PATIENCE_S):
            await writer.drain()

    async def _answer(self, line: bytes) -> bytes:
        try:
            question = msgspec.json.decode(line, type=ExplainRequest).flow
        except (msgspec.MsgspecError, UnicodeDecodeError) as err:
            return refusal(f"{err}", "ask as pellucid_proxy.agent.explanations.ExplainRequest says")
        try:
            async with self._one_at_a_time:
                return msgspec.json.encode(await self._explained(question))
        except Unexplainable as err:
            return refusal(str(err), err.cure)

    async def _explained(self, question: Question) -> Explanation:
        report = self._report
        policies = report.enforcer.enforced if report.enforcer else None
        if policies is None or report.settings is None:
            raise Unexplainable("no policy is enforced yet", "ask again when `pellucid status` says that it enforces")
        revision, objects = self._objects
        addresses = await asyncio.to_thread(self._addresses)
        found = await asyncio.to_thread(
            explain, question, policies, objects if revision == policies.revision else None, report.settings, addresses
        )
        assert report.enforcer is not None
        if found.kernel_counter:
            packets = _packets(found, await report.enforcer.kernel_series())
            found = msgspec.structs.replace(found, packets=packets)
        recent = await asyncio.to_thread(_recent, found, self._hub.kept())
        return msgspec.structs.replace(found, recent=tuple(map(msgspec.Raw, recent)))


def _packets(found: Explanation, series: list[Series]) -> int:
    """How often the kernel decided by the rule of found."""
    name, labels = "kernel_events", tuple[str, ...](("quic_rejected",))
    if found.kernel_counter != "quic_rejected":
        said = found.policy
        rule = None if said is None else RuleKey(said.kind, said.namespace, said.name, said.rule)
        name, labels = "kernel_decided_packets", (*rule_labels(rule), found.verdict or "")
    return int(sum(each.value for each in series if each.name == name and each.labels == labels))


def _recent(found: Explanation, kept: list[bytes]) -> list[bytes]:
    """The last records of the same source that the same rule decided, oldest first."""
    lines: list[bytes] = []
    looked_at = 0
    for chunk in reversed(kept):
        for line in reversed(chunk.splitlines()):
            looked_at += 1
            if len(lines) == MAX_RECENT or looked_at > MAX_LOOKED_AT:
                return lines[::-1]
            if _is_of(line, found):
                lines.append(line)
    return lines[::-1]


def _is_of(line: bytes, found: Explanation) -> bool:
    try:
        said = msgspec.json.decode(line, type=_Record)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False
    rule = found.policy and RecordedRule(
        found.policy.kind, found.policy.namespace, found.policy.name, found.policy.rule
    )
    return (said.policy, said.verdict, said.source.address) == (rule, found.verdict, found.source_address)


def read_explanation(state: str, question: Question, timeout_s: float = ANSWER_S) -> Explanation:
    """Ask the node whose state folder this is. Raises NotRunning, Unexplainable."""
    with connected(state, timeout_s) as client, translated(state):
        client.sendall(msgspec.json.encode(ExplainRequest(flow=question)) + b"\n")
        with client.makefile("rb") as answer:
            said = answer.read()
        if not said:
            raise NotRunning(f"{state}: pellucid ended while it was asked")
        if said.startswith(b'{"error"'):
            refused = msgspec.json.decode(said, type=_Refused)
            raise Unexplainable(refused.error, refused.cure)
        return msgspec.json.decode(said, type=Explanation)
