"""From the bytes of a folder's files to Objects, or to every problem that can be told: a folder is taken or refused as a whole."""

from __future__ import annotations

import difflib
import enum
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args, get_type_hints

import msgspec

from . import check
from .installation import InterceptionAuthority, TransparentNode, TransparentProxy, TransparentSnapshot
from .meta import API_VERSION, Namespace, Pod
from .model import MAX_RULES, ClusterTransparentPolicy, Rule, TransparentPolicy
from .objects import Key, Object, Objects, Origin, Problem, collect, key_of, path_of, steps_of
from .yaml_tree import Lines, UnreadableError, documents

KINDS: dict[tuple[str, str], type[Any]] = {
    **{
        (API_VERSION, kind.kind): kind
        for kind in (
            TransparentPolicy, ClusterTransparentPolicy, InterceptionAuthority,
            TransparentProxy, TransparentSnapshot, TransparentNode,
        )
    },
    ("v1", "Pod"): Pod,
    ("v1", "Namespace"): Namespace,
}  # fmt: skip

MAX_OBJECTS = 100_000
MAX_PROBLEMS = 1000

_WHERE = re.compile(r"(?P<what>.*?) - at (?P<key>`key` in )?`\$(?P<path>[^`]*)`\Z", re.DOTALL)
_FIELD = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`")
_EMPTY = re.compile(r"Expected `(.*)` of length >= 1\Z")
_ENUM = re.compile(r"Invalid enum value (.*)", re.DOTALL)

Item = tuple[Any, Origin]


def parse_files(files: Mapping[str, bytes]) -> Objects | list[Problem]:
    """Return the objects of YAML or JSON files by name, or the problems, sorted by file and line.

    Every broken object yields at least one problem, and each of its broken rules one. Several documents a file, and v1 List, are read.
    """
    problems: list[Problem] = []
    return _objects((item for file in sorted(files) for item in _items(file, files[file], problems)), problems)


def parse_values(values: Iterable[tuple[str, Any]]) -> Objects | list[Problem]:
    """Return the objects of values that were decoded already, each with what to call its source, or the problems."""
    return _objects(((value, Origin(source, (), 0)) for source, value in values), [])


def _objects(items: Iterable[Item], problems: list[Problem]) -> Objects | list[Problem]:
    found: list[Object] = []
    origins: dict[Key, Origin] = {}
    for value, origin in items:
        each = _object(value, origin, problems)
        if each is None:
            continue
        first = origins.setdefault(key_of(each), origin)
        if first is not origin:
            at = first.problem("metadata.name", "")
            problems.append(
                origin.problem(
                    "metadata.name", f"{_said(each)} is there twice, first at {at.file}:{at.line}", "keep one"
                )
            )
            continue
        found.append(each)
    if len(found) > MAX_OBJECTS:
        problems.append(Problem("", 1, "", f"{len(found)} objects are more than {MAX_OBJECTS}"))
    objects = collect(found, origins)
    problems += check.between(objects)
    return sorted(problems)[:MAX_PROBLEMS] if problems else objects


def _said(each: Object) -> str:
    kind, namespace, name = key_of(each)
    return f"{kind} {namespace}/{name}" if namespace else f"{kind} {name}"


def _items(file: str, data: bytes, problems: list[Problem]) -> Iterator[Item]:
    """Yield the objects of a file, those of Lists one by one."""
    if file.endswith(".json"):
        data = data.replace(
            b"\t", b" "
        )  # JSON may be indented by tabs, YAML not; within JSON's strings a tab is written \t
    try:
        found = documents(data)
    except UnreadableError as err:
        problems.append(Problem(file, err.line, path_of(err.steps), err.message, err.cure))
        return
    for value, lines in found:
        yield from _of_list(value, Origin(file, (), lines), lines, problems)


def _of_list(value: Any, origin: Origin, lines: Lines, problems: list[Problem]) -> Iterator[Item]:
    if not (isinstance(value, dict) and value.get("kind") == "List" and value.get("apiVersion") == "v1"):
        yield value, origin
        return
    items = value.get("items")
    unknown = [key for key in value if key not in ("apiVersion", "kind", "metadata", "items")]
    if not isinstance(items, list) or unknown:
        problems.append(
            origin.problem(unknown[0] if unknown else "items", "a v1 List has a list of items and no other field")
        )
        return
    for at, item in enumerate(items):
        yield item, Origin(origin.file, ("items", at), lines)


def _object(value: Any, origin: Origin, problems: list[Problem]) -> Object | None:
    """Return the object, or None with its problems added."""
    kind = _kind(value, origin, problems)
    if kind is None:
        return None
    body = {key: inner for key, inner in value.items() if key not in ("apiVersion", "kind")}
    try:
        each: Object = msgspec.convert(body, kind)
    except msgspec.ValidationError as err:
        problems.extend(_type_problems(body, kind, str(err), origin))
        return None
    wrong = [origin.problem(*finding) for finding in check.findings(each)]
    problems.extend(wrong)
    return None if wrong else each


def _kind(value: Any, origin: Origin, problems: list[Problem]) -> type[Any] | None:
    if not isinstance(value, dict):
        problems.append(origin.problem("", "is no object", "an object has apiVersion, kind, metadata and spec"))
        return None
    for field in ("apiVersion", "kind"):
        if not isinstance(value.get(field), str):
            problems.append(
                origin.problem(field, "is missing" if field not in value else "is no string", f"write {field}: …")
            )
            return None
    version, kind = value["apiVersion"], value["kind"]
    if (version, kind) in KINDS:
        return KINDS[version, kind]
    versions = [known for known, name in KINDS if name == kind]
    if versions:
        problems.append(origin.problem("apiVersion", f"{kind} has no version {version!r}", f"write {versions[0]}"))
        return None
    kinds = [name for _, name in KINDS]
    problems.append(
        origin.problem(
            "kind", f"{version} {kind} is not read here", _meant(kind, kinds) or f"known are {', '.join(kinds)}"
        )
    )
    return None


def _meant(given: str, known: list[str]) -> str:
    close = difflib.get_close_matches(given, known, 1, 0.6) or [each for each in known if each.lower() == given.lower()]
    return f"did you mean {close[0]}?" if close else ""


def _type_problems(body: dict[str, Any], kind: type[Any], first: str, origin: Origin) -> list[Problem]:
    """Return the first problem of the object and, as decoding stops there, one for each broken rule after it."""
    problems = [_type_problem(body, kind, first, "", origin)]
    spec = body.get("spec")
    rules = spec.get("rules") if isinstance(spec, dict) else None
    if kind in (TransparentPolicy, ClusterTransparentPolicy) and isinstance(rules, list):
        for at, rule in enumerate(rules[:MAX_RULES]):
            try:
                msgspec.convert(rule, Rule)
            except msgspec.ValidationError as err:
                problem = _type_problem(rule, Rule, str(err), f"spec.rules[{at}]", origin)
                if problem not in problems:
                    problems.append(problem)
    return problems


def _type_problem(value: Any, kind: type[Any], error: str, prefix: str, origin: Origin) -> Problem:
    """Put msgspec's words into ours: path, value, cure."""
    where = _WHERE.match(error)
    what = where["what"] if where else error
    inner = (where["path"] if where else "").replace("[...]", "").removeprefix(".")
    steps = steps_of(inner)
    if where and not where["key"] and where["path"].endswith("[...]"):
        steps += _wrong_key(_at(value, steps))
    message, cure = what, ""
    if unknown := _FIELD.match(what):
        known = _fields_at(kind, steps)
        steps += (unknown[1],)
        message, cure = "is an unknown field", _meant(unknown[1], known) or f"known are {', '.join(known)}"
    elif missing := _MISSING.match(what):
        steps += (missing[1],)
        message, cure = "is missing", _WHOLE.get(missing[1], "write it out: what is left out is never everything")
    elif where and where["key"]:
        message = f"has a key that is not allowed: {what}"
    elif "got `null`" in what:
        message, cure = (
            "is null",
            _WHOLE.get(str(steps[-1]) if steps else "", "give it a value, or leave the field out"),
        )
    elif _EMPTY.match(what):
        message, cure = "is empty", "an empty field is never everything: fill it, or leave it out"
    else:
        message, cure = _value_problem(_at(value, steps), what, steps, kind)
    return origin.problem(steps_of(prefix) + steps, message, cure)


_WHOLE = {
    "podSelector": "for every pod write podSelector: {}",
    "namespaceSelector": "for every namespace write namespaceSelector: {}",
    "namespaces": "for every namespace write namespaces: {}",
    "match": "for every flow write match: {}",
}


def _value_problem(value: Any, what: str, steps: tuple[str | int, ...], kind: type[Any]) -> tuple[str, str]:
    shown = "that" if isinstance(value, dict | list) else repr(value)[:80]
    if enum := _ENUM.match(what):
        choices = [str(each) for each in _type_at(kind, steps)] if _type_at(kind, steps) else []
        return f"{enum[1]} is not allowed", _meant(str(value), choices) or (
            f"write {' or '.join(choices)}" if choices else ""
        )
    if steps and steps[-1] in ("port", "endPort") and isinstance(value, int) and not isinstance(value, bool):
        return f"{shown} is not a port (1-65535)", ""
    cure = ""
    if "Expected `str`" in what and isinstance(value, bool | int | float):
        cure = f'it is no string in YAML: write "{str(value).lower() if isinstance(value, bool) else value}"'
    return f"{shown}: {what[0].lower()}{what[1:].replace('`', '')}", cure


def _wrong_key(labels: Any) -> tuple[str, ...]:
    """Return the first key of a map of strings whose value is none, as msgspec does not say it."""
    return (
        next(((key,) for key, value in labels.items() if not isinstance(value, str)), ())
        if isinstance(labels, dict)
        else ()
    )


def _at(value: Any, steps: tuple[str | int, ...]) -> Any:
    for step in steps:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return value
    return value


def _type_at(kind: Any, steps: tuple[str | int, ...]) -> Any:
    """Return the struct or enum that a path of the API leads to, or None."""
    for step in steps:
        if isinstance(step, int):
            continue
        if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
            return None
        hints = get_type_hints(kind)
        names = {field.encode_name: field.name for field in msgspec.structs.fields(kind)}
        if step not in names:
            return None
        kind = _inner(hints[names[step]])
    return kind


def _inner(hint: Any) -> Any:
    """Return the struct or enum within Annotated, unions and tuples, or the hint."""
    for each in get_args(hint):
        found = _inner(each)
        known = isinstance(found, type) and issubclass(found, msgspec.Struct | enum.Enum)
        if known and found is not msgspec.UnsetType:
            return found
    return hint


def _fields_at(kind: type[Any], steps: tuple[str | int, ...]) -> list[str]:
    at = _type_at(kind, steps)
    if isinstance(at, type) and issubclass(at, msgspec.Struct):
        return [field.encode_name for field in msgspec.structs.fields(at)]
    return []
