"""The document of flow records describes what a worker writes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pellucid_policy.verdict import Action, Reason, RuleKey, Verdict
from pellucid_proxy.session.desk import Desk
from pellucid_proxy.session.ending import ENDINGS
from pellucid_proxy.session.judge import Judge
from pellucid_proxy.session.session import Session
from pellucid_proxy.settings import NodeSettings

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "flow-records.md"


def record() -> dict[str, Any]:
    judge = Judge(NodeSettings(scope=("192.0.2.0/24",)), ())
    session = Session(judge, source=b"\xc0\0\2\1", destination=b"\xc6\x33\x64\1", port=443)
    session.tally = judge.tallies.of(
        Verdict(Action.ALLOW, Reason.RULE_MATCHED, RuleKey("TransparentPolicy", "default", "web", "ok"))
    )
    session.audited = Verdict(Action.BLOCK, Reason.DEFAULT_ACTION)
    desk = Desk(judge, "n", 1 << 20, lambda full: None, lambda: None)
    desk.closed(session, 1234, 0, 1, 2, 3, 4, 5, 6)
    line: dict[str, Any] = json.loads(desk.take())
    return line


def paths(value: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, inner in value.items():
        if isinstance(inner, dict) and key != "audit":
            yield from paths(inner, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_every_field_of_a_record_is_described_and_no_other() -> None:
    table = DOCUMENT.read_text().partition("## In the words")[0]
    first_cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    described = {name for cell in first_cells for name in re.findall("`([^`]+)`", cell)}
    assert described - {"policy"} == set(paths(record()))


def test_every_field_has_its_name_elsewhere() -> None:
    mapping = DOCUMENT.read_text().partition("## In the words")[2]
    assert {path for path in paths(record()) if f"`{path}`" not in mapping} == set()


def test_every_way_to_end_is_described() -> None:
    text = DOCUMENT.read_text()
    assert [each for each in ENDINGS if f"`{each.why}`" not in text or f"`{each.by}`" not in text] == []
