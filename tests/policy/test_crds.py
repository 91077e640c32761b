"""The CustomResourceDefinitions say all that the types say. What an API server makes of them: e2e/tests/test_crds.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from pellucid_policy import crds
from pellucid_policy.meta import API_VERSION
from pellucid_policy.parse import KINDS
from tools import crds as tool

DEFINITIONS = {each["spec"]["names"]["kind"]: each for each in crds.definitions()}


def schema(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = DEFINITIONS[kind]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return found


def parts(found: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema within, by the path of its value."""
    yield path, found
    for name, inner in found.get("properties", {}).items():
        yield from parts(inner, f"{path}.{name}")
    for key, step in (("items", "[]"), ("additionalProperties", "{}")):
        if key in found:
            yield from parts(found[key], f"{path}{step}")


ALL = [(f"{kind}{path}", each) for kind in DEFINITIONS for path, each in parts(schema(kind))]


def test_the_file_is_what_the_types_say() -> None:
    assert tool.FILE.read_text() == tool.text(), "run tools/crds.py"
    assert tool.CHART_FILE.read_text() == tool.chart_text(), "run tools/crds.py"


def test_there_is_one_for_every_kind_of_ours() -> None:
    assert set(DEFINITIONS) == {kind for version, kind in KINDS if version == API_VERSION}


@pytest.mark.parametrize(("path", "found"), ALL, ids=[path for path, _ in ALL])
def test_everything_is_bounded_and_no_null_is_dropped(path: str, found: dict[str, Any]) -> None:
    """Of a null that is not nullable an API server makes an absent field, and an absent constraint is everything."""
    if path.endswith((".metadata", ".apiVersion", ".kind")) and path.count(".") == 1:
        return
    kind = found["type"]
    if kind == "array":
        assert "maxItems" in found
    elif kind == "string":
        assert "maxLength" in found or "enum" in found
    elif kind == "object":
        assert "maxProperties" in found or "properties" in found
    required = set(found.get("required", ()))
    for name, inner in found.get("properties", {}).items():
        if name not in ("apiVersion", "kind", "metadata") or path.count("."):
            assert (name in required) != bool(inner.get("nullable")), name


@pytest.mark.parametrize("kind", [kind.type for kind in crds.KINDS], ids=lambda kind: kind.kind)
def test_fields_and_defaults_are_those_of_the_type(kind: type[Any]) -> None:
    spec = next((field for field in msgspec.structs.fields(kind) if field.name == "spec"), None)
    if spec is None:
        return
    found = schema(kind.kind)["properties"]["spec"]
    fields = msgspec.structs.fields(spec.type)
    assert set(found["properties"]) == {field.encode_name for field in fields}
    assert set(found.get("required", ())) == {field.encode_name for field in fields if field.required}
