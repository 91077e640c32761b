#!/usr/bin/env python3
"""Write the table of settings in ARCHITECTURE.md anew from settings.py: each field's name, default, and the comment beside it.

--check changes nothing and exits with 1 where the table is out of date.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "proxy" / "pellucid_proxy" / "settings.py"
DOCUMENT = ROOT / "ARCHITECTURE.md"
BEGIN = "<!-- settings: made by tools/settings_table.py -->\n"
END = "<!-- end of settings -->\n"
PREFIX = {"Marks": "marks."}  # how a class's fields are reached from NodeSettings, where they are not its own


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    document = DOCUMENT.read_text()
    renewed = with_table(document, table(SOURCE.read_text()))
    if arguments:
        if renewed != document:
            print("ARCHITECTURE.md: the table of settings is out of date: run tools/settings_table.py", file=sys.stderr)
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


def table(source: str) -> str:
    """The rows for every field of every class in source, in its order."""
    lines = ["| setting | default | what it is |\n", "|---|---|---|\n"]
    lines += [f"| `{name}` | {default} | {meaning} |\n" for name, default, meaning in rows(source)]
    return "".join(lines)


def rows(source: str) -> Iterator[tuple[str, str, str]]:
    notes = comments(source)
    for body in ast.parse(source).body:
        if not isinstance(body, ast.ClassDef):
            continue
        for field in body.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                value = ast.get_source_segment(source, field.value) if field.value else None
                if value and value.endswith("()") and value[:-2] in PREFIX:
                    continue  # its fields have rows of their own
                meaning = notes.get(field.lineno)
                if not meaning:
                    raise ValueError(
                        f"{SOURCE.name}:{field.lineno}: {field.target.id} lacks a comment that says what it is for"
                    )
                default = f"`{value}`" if value else "must be given"
                yield PREFIX.get(body.name, "") + field.target.id, default, meaning.replace("|", "or")


def comments(source: str) -> dict[int, str]:
    """The comment on each line that has one."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
