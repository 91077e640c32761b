"""The API server takes and refuses what `pellucid lint` does, and names the same field: every manifest of the corpus is put before both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from pellucid_policy.meta import API_VERSION
from pellucid_policy.parse import parse_files

from .conftest import Cluster, Figure
from .product import Product

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "tests" / "policy" / "manifests"
TO_THE_READER = {
    "cidr-host-bits": "a rule about it would be too dear, as a policy may have a million networks",
    "cidr-mapped": "the same",
    "cluster-with-namespace": "kubectl leaves the namespace out where a kind has none",
    "destinations-null": "null is kept and then refused: it never becomes an absent field",
    "domain-bad-alabel": "takes IDNA",
    "names-null": "as destinations-null",
    "object-twice": "the second one takes the place of the first",
    "rule-name-twice": "to compare all names would be too dear",
}
"""What an API server lets pass; whoever reads the object refuses it, and says so in its status."""
SPELLING = ("port-octal", "port-sexagesimal", "port-underscore")
"""Of YAML, as are all of bad/yaml-*: kubectl reads it, and the API server never sees it."""
OTHER_PATHS = {
    "api-version": "kubectl finds no such version",
    "baseline-pass": "the rules as a whole",
    "cluster-namespace-selector-null": "it is taken as absent by the rule that wants one of three",
    "domain-udp-only": "the destinations as a whole",
    "metadata-created": "kubectl cannot read the time",
    "proxy-name": "the object as a whole",
    "route-udp": "the ports as a whole",
}  # fmt: skip


class Case(NamedTuple):
    name: str
    value: dict[str, Any]
    problem: str  # the path that parse names, "": none


def _cases() -> Iterator[Case]:
    for file in sorted([*CORPUS.glob("good/*.yaml"), *CORPUS.glob("bad/*.yaml")]):
        if file.stem in SPELLING or (file.parent.name == "bad" and file.stem.startswith("yaml-")):
            continue
        found = parse_files({file.name: file.read_bytes()})
        problem = found[0].path if isinstance(found, list) else ""
        try:
            documents = list(yaml.safe_load_all(file.read_text()))
        except yaml.YAMLError:
            continue
        for value in documents:
            if isinstance(value, dict) and str(value.get("apiVersion")).startswith(API_VERSION.partition("/")[0]):
                yield Case(file.stem, value, problem)


CASES = list(_cases())


@pytest.fixture
def api(pellucid: Product) -> Cluster:
    """With the kinds as the chart brings them."""
    cluster = pellucid.cluster
    for namespace in sorted(
        {case.value["metadata"].get("namespace") or "default" for case in CASES if case.value.get("metadata")}
    ):
        cluster.kubectl("create", "namespace", str(namespace), check=False)
    return cluster


def _refused(api: Cluster, value: dict[str, Any]) -> str:
    """Why the API server refuses it; "": it does not."""
    if isinstance(value.get("metadata"), dict):  # opaque in the corpus, and the API server's own to check
        value = value | {
            "metadata": {k: v for k, v in value["metadata"].items() if k not in ("ownerReferences", "managedFields")}
        }
    try:
        api.kubectl("create", "--dry-run=server", "--validate=strict", "-f", "-", text=json.dumps(value))
    except RuntimeError as err:
        return "" if "AlreadyExists" in str(err) else str(err)  # valid, and the installed product's
    return ""


def test_api_server_and_lint_agree_on_every_manifest(api: Cluster, figure: Figure) -> None:
    wrong, same_path = [], 0
    refused = 0
    for case in CASES:
        said = _refused(api, case.value)
        expected = bool(case.problem) and case.name not in TO_THE_READER
        if bool(said) != expected:
            wrong.append(f"{case.name}: {said or 'taken'}")
        elif said:
            refused += 1
            if case.problem in said:
                same_path += 1
            elif case.name not in OTHER_PATHS:
                wrong.append(f"{case.name}: {case.problem} is not named: {said}")
    left = sum(case.name in TO_THE_READER for case in CASES)
    figure(
        "CRDs",
        f"of {len(CASES)} manifests the API server agrees with lint on {len(CASES) - left - len(wrong)}; it names the same field in "
        f"{same_path} of {refused} refusals; {left} are left to who reads them",
    )
    assert wrong == []


def test_a_null_is_kept_for_its_reader(api: Cluster) -> None:
    """Were it dropped, the rule would be for every destination."""
    case = next(case for case in CASES if case.name == "destinations-null")
    stored = json.loads(api.kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", text=json.dumps(case.value)))
    assert stored["spec"]["rules"][0]["match"] == {"destinations": None}
    assert isinstance(parse_files({"stored.json": json.dumps(stored).encode()}), list)


def test_columns_short_names_and_selectable_fields(api: Cluster) -> None:
    policy = next(case.value for case in CASES if case.name == "cart" and case.value["kind"] == "TransparentPolicy")
    api.kubectl("apply", "-f", "-", text=json.dumps(policy))
    try:
        namespace = policy["metadata"]["namespace"]
        shown = api.kubectl("get", "tpol", "-n", namespace, "--field-selector=spec.mode=Enforce").splitlines()
        assert shown[0].split() == ["NAME", "MODE", "PRIORITY", "ACCEPTED", "NODES", "AGE"]
        assert len(shown) == 2
        assert "transparentpolicies" in api.kubectl("api-resources", "--categories=pellucid", "-o", "name")
    finally:
        api.kubectl("delete", "-f", "-", text=json.dumps(policy))
