"""YAML (and so JSON) as plain values, with the line of each: strict, bounded, and never guessing a type.

Read from the parser's events and not from its nodes: composing recurses, and a file of brackets would end the process. Not supported, each
with its own message: tags, merge keys, duplicate keys, and plain scalars that YAML 1.1 and 1.2 read differently (on, yes, 0644, 12:30).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

MAX_FILE_BYTES = 16 << 20
MAX_DEPTH = 64
MAX_VALUES = 1_000_000  # of one file, aliases counted as what they stand for
MAX_INTEGER_DIGITS = 20

Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Lines = Any
"""The line of each value, in the shape of the value: an int for a scalar, (line, {key: Lines}) or (line, [Lines])."""

_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULLS = ("", "~", "null", "Null", "NULL")
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_WORDS = re.compile(r"(?:yes|no|on|off|y|n)", re.IGNORECASE)
_ODD_NUMBER = re.compile(
    r"[-+]?(?:0[0-9_]+|0o[0-7]+|0b[01_]+|[0-9][0-9_]*_[0-9_]*|[0-9]+(?::[0-5]?[0-9])+(?:\.[0-9]*)?)"
)


class UnreadableError(Exception):
    """A file that is no YAML of the kind that is read here. line: from 1. steps: the path of what is wrong within its document."""

    def __init__(self, line: int, message: str, cure: str = "") -> None:
        super().__init__(message)
        self.line, self.message, self.cure = line, message, cure
        self.steps: tuple[str | int, ...] = ()


@dataclass(slots=True)
class _Open:
    """A list or map that has not ended. size: values in it so far, itself counted."""

    value: dict[str, Any] | list[Any]
    lines: dict[str, Lines] | list[Lines]
    line: int
    anchor: str | None
    size: int = 1
    key: str | None = None


def documents(data: bytes) -> list[tuple[Any, Lines]]:
    """Return the value and the lines of every document of a file; empty documents are left out.

    Raises UnreadableError.
    """
    if len(data) > MAX_FILE_BYTES:
        raise UnreadableError(1, f"has {len(data)} bytes, more than {MAX_FILE_BYTES}", "split the file")
    builder = _Builder()
    try:
        text = data.decode("utf-8-sig")
        for event in yaml.parse(text, Loader=Loader):
            builder.take(event)
    except UnreadableError as err:
        err.steps = builder.steps()
        raise
    except UnicodeDecodeError as err:
        raise UnreadableError(data.count(b"\n", 0, err.start) + 1, "is not UTF-8", "save the file as UTF-8") from err
    except yaml.MarkedYAMLError as err:
        mark = err.problem_mark or err.context_mark
        why = err.problem or err.context or "is not YAML"
        raise UnreadableError(mark.line + 1 if mark else 1, f"is not YAML: {why}") from err
    except yaml.YAMLError as err:
        raise UnreadableError(1, f"is not YAML: {err}".splitlines()[0]) from err
    return builder.documents


class _Builder:
    """Turns events into values, without recursion."""

    def __init__(self) -> None:
        self.documents: list[tuple[Any, Lines]] = []
        self._open: list[_Open] = []
        self._anchors: dict[str, tuple[Any, Lines, int]] = {}
        self._values = 0  # in the documents that have ended

    def take(self, event: Any) -> None:
        line = event.start_mark.line + 1
        match event:
            case yaml.ScalarEvent():
                self._scalar(event, line)
            case yaml.MappingStartEvent() | yaml.SequenceStartEvent():
                self._begin(event, line)
            case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                done = self._open.pop()
                self._add(done.value, (done.line, done.lines), done.size, done.line, done.anchor)
            case yaml.AliasEvent():
                if event.anchor not in self._anchors:
                    raise UnreadableError(line, f"*{event.anchor} stands for no value that has ended before it")
                value, lines, size = self._anchors[event.anchor]
                self._add(value, lines, size, line, None)
            case yaml.DocumentStartEvent():
                self._anchors.clear()

    def steps(self) -> tuple[str | int, ...]:
        """Return the path of the value that comes next."""
        at = (len(each.value) if isinstance(each.value, list) else each.key for each in self._open)
        return tuple(step for step in at if step is not None)

    def _begin(self, event: Any, line: int) -> None:
        if event.tag not in (None, "!"):
            raise UnreadableError(line, f"has the tag {event.tag}", "leave the tag out")
        if len(self._open) >= MAX_DEPTH:
            raise UnreadableError(line, f"is nested deeper than {MAX_DEPTH}")
        if self._open and isinstance(self._open[-1].value, dict) and self._open[-1].key is None:
            raise UnreadableError(line, "has a list or a map as a key", "keys are strings")
        if event.anchor is not None:
            self._anchors.pop(event.anchor, None)  # until it ends it stands for nothing, so that no value holds itself
        if isinstance(event, yaml.MappingStartEvent):
            self._open.append(_Open({}, {}, line, event.anchor))
        else:
            self._open.append(_Open([], [], line, event.anchor))

    def _scalar(self, event: Any, line: int) -> None:
        if event.tag not in (None, "!"):
            raise UnreadableError(
                line, f"has the tag {event.tag}", "leave the tag out and quote the value if it is a string"
            )
        plain = not event.style and event.implicit[0]  # libyaml says "", PyYAML None
        value = _plain(event.value, line) if plain else event.value
        self._add(value, line, 1, line, event.anchor)

    def _add(self, value: Any, lines: Lines, size: int, line: int, anchor: str | None) -> None:
        """Put a whole value where it belongs: a key, an item, or the document."""
        if anchor is not None:
            self._anchors[anchor] = (value, lines, size)
        if not self._open:
            self._values += size
            if value is not None:
                self.documents.append((value, lines))
            return
        top = self._open[-1]
        top.size += size
        if self._values + top.size > MAX_VALUES:
            raise UnreadableError(line, f"has more than {MAX_VALUES} values", "use fewer aliases, or split the file")
        if isinstance(top.value, list):
            top.value.append(value)
            top.lines.append(lines)  # type: ignore[union-attr]  # the same shape as value
        elif top.key is None:
            top.key = _key(value, top.value, line)
        else:
            top.value[top.key] = value
            top.lines[top.key] = lines  # type: ignore[call-overload]
            top.key = None


def _key(value: Any, into: dict[str, Any], line: int) -> str:
    if not isinstance(value, str):
        raise UnreadableError(line, f"has a key that is no string: {value}", "quote it")
    if value == "<<":
        raise UnreadableError(line, "has a merge key (<<)", "write the fields out")
    if value in into:
        raise UnreadableError(line, f"has the key {value!r} twice", "keep one")
    return value


def _plain(text: str, line: int) -> Any:
    """Return the value of an unquoted scalar. Raises UnreadableError where YAML 1.1 and 1.2 disagree."""
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    first = text[0]
    if not (first.isdigit() or first in "+-."):
        if len(text) <= 3 and _WORDS.fullmatch(text):
            raise UnreadableError(
                line, f"{text} is a boolean in YAML 1.1 and a string in YAML 1.2", f'write "{text}", or true or false'
            )
        return text
    if len(text) > 64:
        return text
    if _INTEGER.fullmatch(text) and len(text) <= MAX_INTEGER_DIGITS:
        return int(text)
    if _HEX.fullmatch(text):
        return int(text, 16)
    if _ODD_NUMBER.fullmatch(text):
        raise UnreadableError(
            line, f"{text} is read as different numbers by YAML 1.1 and 1.2", "write it in decimal, or quote it"
        )
    return (
        float(text.replace(".inf", "inf").replace(".nan", "nan"))
        if _FLOAT.fullmatch(text) and "n" not in text.lower()
        else text
    )


def line_at(lines: Lines, steps: tuple[str | int, ...]) -> int:
    """Return the line of the value at steps, or of its nearest ancestor that is written; 1 if nothing is known."""
    for step in steps:
        if isinstance(lines, int):
            break
        _, inner = lines
        try:
            lines = inner[step]
        except (KeyError, IndexError, TypeError):
            break
    line = lines if isinstance(lines, int) else lines[0]
    return int(line) or 1
