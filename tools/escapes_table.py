#!/usr/bin/env python3
"""Write the table of docs/escapes.md anew from the techniques of tests/escapes, those that pass as yet first.

--check changes nothing and exits with 1 where the table is out of date.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from tests.escapes.corpus import WAYS, Technique, techniques  # noqa: E402 - it is no package that is installed

DOCUMENT = ROOT / "docs" / "escapes.md"
BEGIN = "<!-- escapes: made by tools/escapes_table.py -->\n"
END = "<!-- end of escapes -->\n"


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    document = DOCUMENT.read_text()
    renewed = with_table(document, table(techniques()))
    if arguments:
        if renewed != document:
            print("docs/escapes.md: the table is out of date: run tools/escapes_table.py", file=sys.stderr)
        return int(renewed != document)
    DOCUMENT.write_text(renewed)
    return 0


def with_table(document: str, text: str) -> str:
    """document with text between its two markers. Raises ValueError without them."""
    head, begin, rest = document.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{DOCUMENT.name} lacks the markers {BEGIN.strip()} and {END.strip()}")
    return f"{head}{begin}{text}{end}{tail}"


def table(found: Mapping[str, Technique]) -> str:
    """A section of those that pass, and one for each way."""
    known = {name: each for name, each in found.items() if each.known is not None}
    lines = [
        f"{len(found) - len(known)} techniques fail. {len(known)} pass as yet:\n\n",
        "| technique | why it passes |\n|---|---|\n",
    ]
    lines += [f"| {_link(name)}: {_text(each.title)} | {_text(each.known or '')} |\n" for name, each in known.items()]
    for way, what in WAYS.items():
        lines.append(f"\n## {what[0].upper()}{what[1:]}\n\n| technique | what comes of it | source |\n|---|---|---|\n")
        lines += [
            f"| {_link(name)}: {_text(each.title)} | {_outcome(each)} | {_text(each.source)} |\n"
            for name, each in found.items()
            if each.way == way and each.known is None
        ]
    return "".join(lines)


def _outcome(technique: Technique) -> str:
    expect = technique.expect
    if technique.packets:
        return "no packet arrives"
    if expect.verdict is None:
        return f"{expect.ends}, by the kernel"
    return f"{expect.ends}; {expect.verdict}, {expect.reason}"


def _link(name: str) -> str:
    return f"[{name}](../tests/escapes/techniques/{name}.yaml)"


def _text(text: str) -> str:
    return text.strip().replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
