"""A change of policy under traffic, measured: from the moment the file was written to the first and the last connection that show it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from .clients import Traffic, Try
from .servers import Journal

LIMIT_S = 1.0  # from written to enforced, at most
SETTLED = 40  # connections in a row with the new verdict
TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Edit:
    """first_s, last_s: from the file's replacement to the end of the first connection decided anew, and to the beginning of the
    last one decided as before. connections: during the edit; odd: those that ended in neither of the two ways."""

    first_s: float
    last_s: float
    connections: int
    odd: tuple[str, ...]

    @property
    def good(self) -> bool:
        """Every connection was decided by the old policy or the new one, and by the new one within LIMIT_S."""
        return not self.odd and 0 <= self.first_s < LIMIT_S and self.last_s < LIMIT_S


def replace_text(path: Path, text: str) -> float:
    """path holds text, by an atomic rename; returns time.monotonic() right after it. Raises OSError."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text)
    os.replace(draft, path)
    return time.monotonic()


def edit_under(traffic: Traffic, path: Path, text: str, before: str, after: str) -> Edit:
    """Write text to path while traffic flows, whose connections must end as before, and soon as after (clients.Answer.end)."""
    begin = len(traffic.tries())
    written = replace_text(path, text)
    traffic.wait(lambda each: each.answer.end == after, TIMEOUT_S, SETTLED)
    tries = traffic.tries()[begin:]
    anew = [each for each in tries if each.answer.end == after]
    return Edit(
        first_s=anew[0].ended - written if anew else float("inf"),
        last_s=max((each.started - written for each in tries if each.answer.end == before), default=0.0),
        connections=len(tries),
        odd=tuple(_describe(each) for each in tries if each.answer.end not in (before, after)),
    )


def arrivals_agree(
    journal: Journal, begin: int, tries: list[Try], name: str, timeout_s: float = 5.0
) -> tuple[int, int]:
    """Connections for name that the servers saw from index begin on, and those that clients saw answered; equal if all is well.

    Waits for the servers to be done, timeout_s at most."""
    answered = sum(each.answer.end == "answered" for each in tries)
    journal.wait(lambda seen: sum(each.name == name and each.ended for each in seen) >= answered, timeout_s, begin)
    return sum(each.name == name for each in journal.arrivals(begin)), answered


def _describe(each: Try) -> str:
    return f"{each.answer.end} {each.answer.text}".strip()
