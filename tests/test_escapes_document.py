"""docs/escapes.md says what the corpus of escapes holds."""

from __future__ import annotations

from tests.escapes.corpus import WAYS, policies, techniques
from tools import escapes_table

ALL = techniques()


def test_the_document_lists_every_technique_as_its_file_says() -> None:
    document = escapes_table.DOCUMENT.read_text()
    assert escapes_table.with_table(document, escapes_table.table(ALL)) == document, "run tools/escapes_table.py"


def test_at_least_150_techniques_fail_and_every_way_has_some() -> None:
    failing = [each for each in ALL.values() if each.known is None]
    assert len(failing) >= 150
    assert {each.way for each in failing} == set(WAYS)


def test_every_policy_has_a_technique_and_every_technique_a_policy() -> None:
    assert {each.policy for each in ALL.values()} == set(policies())
