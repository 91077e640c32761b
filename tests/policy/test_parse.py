"""parse: the corpus of manifests, where problems are told, and what bounds a hostile file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pellucid_policy import yaml_tree
from pellucid_policy.compile import compile_policies
from pellucid_policy.features import unsupported
from pellucid_policy.objects import Objects, Problem
from pellucid_policy.parse import parse_files

MANIFESTS = Path(__file__).parent / "manifests"
EXAMPLES = Path(__file__).parents[2] / "examples"
BAD = sorted((MANIFESTS / "bad").glob("*.yaml"))
GOOD = sorted((MANIFESTS / "good").iterdir())
POLICY = """\
apiVersion: pellucid.dev/v1alpha1
kind: TransparentPolicy
metadata: {name: p, namespace: shop}
spec:
  podSelector: {}
  rules:
  - match: {}
    action: Block
"""


def problems_of(text: str | bytes, name: str = "a.yaml") -> list[Problem]:
    found = parse_files({name: text.encode() if isinstance(text, str) else text})
    return [] if isinstance(found, Objects) else found


@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.stem)
def test_takes_every_good_manifest(path: Path) -> None:
    assert [str(each) for each in problems_of(path.read_bytes(), path.name)] == []


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_refuses_every_bad_manifest_at_its_field_with_the_cure(path: Path) -> None:
    text = path.read_text()
    said = dict(re.findall(r"^# (path|says): ?(.*)$", text, re.MULTILINE))
    found = problems_of(text, path.name)
    assert any(each.path == said["path"] and said["says"] in str(each) for each in found), [str(each) for each in found]
    assert all(2 < each.line <= text.count("\n") for each in found), "the line is in the manifest, below the header"


def test_the_corpus_of_bad_manifests_is_large() -> None:
    assert len(BAD) >= 40


@pytest.mark.parametrize("folder", sorted(p for p in EXAMPLES.iterdir() if p.is_dir()), ids=lambda path: path.name)
def test_this_release_takes_every_example(folder: Path) -> None:
    found = parse_files({str(path): path.read_bytes() for path in folder.glob("*.yaml")})
    assert isinstance(found, Objects), [str(each) for each in found]
    assert unsupported(found) == []
    assert compile_policies(found).groups


def test_a_problem_names_file_line_path_message_cure() -> None:
    found = problems_of(POLICY.replace("action: Block", "action: Blok"), "cart.yaml")
    assert [str(each) for each in found] == [
        "cart.yaml:8: spec.rules[0].action: 'Blok' is not allowed; did you mean Block?"
    ]


def test_every_broken_object_and_rule_is_told() -> None:
    broken = (
        POLICY.replace("action: Block", "action: Blok") + "  - match: {}\n  - {match: {prots: []}, action: Allow}\n"
    )
    found = problems_of(broken + "---\n" + broken.replace("name: p", "name: q") + "---\nkind: Pod\n")
    assert [each.path for each in found] == [
        "spec.rules[0].action", "spec.rules[1].action", "spec.rules[2].match.prots",
        "spec.rules[0].action", "spec.rules[1].action", "spec.rules[2].match.prots", "apiVersion",
    ]  # fmt: skip


def test_one_bad_file_refuses_the_folder_and_every_bad_file_is_told() -> None:
    found = parse_files({"good.yaml": POLICY.encode(), "bad.yaml": b"a: [", "worse.yaml": b"- 1"})
    assert isinstance(found, list)
    assert {each.file for each in found} == {"bad.yaml", "worse.yaml"}


def test_an_object_in_two_files_is_refused_with_both_places() -> None:
    found = parse_files({"a.yaml": POLICY.encode(), "b.yaml": b"\n" + POLICY.encode()})
    assert isinstance(found, list)
    assert [(each.file, each.line) for each in found] == [("b.yaml", 4)]
    assert "a.yaml:3" in found[0].message


def test_the_order_of_files_does_not_matter() -> None:
    files = {path.name: path.read_bytes() for path in (EXAMPLES / "quickstart").glob("*.yaml")}
    assert parse_files(files) == parse_files(dict(reversed(files.items())))


def test_empty_files_and_documents_hold_nothing() -> None:
    assert parse_files({"a.yaml": b"", "b.yaml": b"# only this\n---\n---\n"}) == Objects()


@pytest.mark.parametrize("text", [
    b"[" * 100_000, b"{a: " * 100_000, b"- " * 100_000, b"? " * 50_000,
], ids=["lists", "maps", "block-lists", "keys"])  # fmt: skip
def test_deep_nesting_is_refused_without_recursion(text: bytes) -> None:
    assert problems_of(text)[0].message


@pytest.mark.parametrize(("text", "says"), [
    (b"a: \xff\xfe", "not UTF-8"), (b"a: \x00", "not YAML"), (b"\x80", "not UTF-8"),
    (b"x" * (yaml_tree.MAX_FILE_BYTES + 1), "more than"), (b"a: &x 1\nb: *y\n", "stands for no value"),
    (b"? [a]\n: b\n", "as a key"), (b"a: !!python/object:os.system x\n", "tag"), (b"%YAML 3.0\n---\na: b\n", "is not YAML"),
], ids=["bytes", "nul", "latin", "large", "alias", "list-key", "object", "version"])  # fmt: skip
def test_a_hostile_file_is_refused(text: bytes, says: str) -> None:
    assert says in str(problems_of(text)[0])


@pytest.mark.parametrize("cut", range(len(POLICY)))
def test_a_file_cut_anywhere_is_taken_or_refused(cut: int) -> None:
    found = parse_files({"a.yaml": POLICY[:cut].encode()})
    if isinstance(found, Objects):
        assert found in (Objects(), parse_files({"a.yaml": POLICY.encode()}))
