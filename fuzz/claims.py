"""What targets are made of: inputs cut in places, outcomes of parsers, and claims that must hold."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable

CUTS = 4

Parser = Callable[[bytes], object]


def cuts(data: bytes) -> list[int]:
    """Places in data, the same for the same data; the last byte's among them."""
    choose = random.Random(zlib.crc32(data))
    return sorted({max(len(data) - 1, 0), *(choose.randrange(len(data) + 1) for _ in range(CUTS))})


def hold(claim: bool, *shown: object) -> None:
    """Raises AssertionError with what is shown unless the claim is true."""
    if not claim:
        raise AssertionError(shown)


def outcome(parser: Parser, data: bytes) -> tuple[str, object]:
    """value, more (bytes are needed) or never, and the value or why."""
    try:
        value = parser(data)
    except ValueError as error:
        return "never", str(error)
    return ("more", None) if value is None else ("value", value)


def three_outcomes(parser: Parser, data: bytes) -> tuple[str, object]:
    """The outcome of data. A prefix has the same, or needs more bytes; and nothing needs more bytes after an answer."""
    whole = outcome(parser, data)
    answered = False
    for cut in cuts(data):
        part = outcome(parser, data[:cut])
        if part[0] == "more":
            hold(not answered, cut)
            continue
        answered = True
        hold(part[0] == whole[0], cut, part, whole)
        hold(part[0] == "never" or part == whole, cut, part, whole)
    return whole
