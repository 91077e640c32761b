"""A worker's session for a connection that is only asked about: the very code that would decide it, fed with bytes made up for it."""

from __future__ import annotations

from dataclasses import dataclass

from pellucid_policy.facts import ABSENT, UNKNOWN, Unnamed
from pellucid_policy.verdict import Verdict

from ..sniff.first_bytes import Sniffed, give_up, sniff
from .judge import Judge
from .session import WAIT, Session


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """verdict: None: the session waits for first bytes, and none were given. audited: with Audit rules enforced, None without such rules.

    protocol, name, encrypted, mismatch: what the first bytes said; they are read only where a rule asks for the name."""

    verdict: Verdict | None
    audited: Verdict | None
    protocol: str
    name: str | Unnamed
    encrypted: bool
    mismatch: bool


def rehearse(judge: Judge, source: bytes, destination: bytes, port: int, first: bytes | None) -> Rehearsal:
    """What a worker would decide of a connection. first: all that the client sends before an answer; empty: it waits for the server to
    speak; None: not known. Addresses are packed."""
    session = Session(judge, source, destination, port)
    said: Sniffed | None = None
    step = session.opened()
    if step == WAIT and first is not None:
        said = sniff(first) or give_up(first) if first else None
        step = session.received(first) if first else WAIT
        if step == WAIT:
            session.gave_up()
    waits = step == WAIT and first is None
    return Rehearsal(
        None if waits else session.verdict,
        None if waits else session.audited,
        session.protocol if said else "",
        UNKNOWN if first is None else ABSENT if said is None or said.name is None else said.name,
        said is not None and said.encrypted,
        said is not None and said.mismatch,
    )
