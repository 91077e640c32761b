"""Flow records as a terminal shows them."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import pytest

from pellucid_cli.records import Tail, flow_text

ALLOWED: dict[str, Any] = {
    "time": "2026-11-22T21:45:02.123Z",
    "verdict": "Allow",
    "reason": "RuleMatched",
    "policy": {"kind": "TransparentPolicy", "namespace": "shop", "name": "cart", "rule": "own-sites"},
    "revision": "5f2c9e1",
    "source": {
        "namespace": "shop",
        "pod": "cart",
        "uid": "",
        "serviceAccount": "",
        "address": "10.244.1.10",
        "port": 40000,
    },
    "destination": {"address": "192.0.2.10", "port": 443, "name": "www.example.com"},
    "protocol": "TLS",
    "bytes": {"up": 999, "down": 1_234_567},
    "durationSeconds": 0.1,
    "firstByteSeconds": 0.01,
    "ended": {"by": "peers", "why": "End"},
    "node": "n1",
}
AUDIT = {
    "verdict": "Block",
    "reason": "RuleMatched",
    "policy": {**ALLOWED["policy"], "name": "b", "rule": "x"},
}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {},
            "21:45:02.123  Allow   shop/cart → www.example.com (192.0.2.10:443)  cart/own-sites  999 B up, 1.2 MB down",
        ),
        (
            {"verdict": "Block", "bytes": {"up": 0, "down": 0}, "ended": {"by": "proxy", "why": "Refused"}},
            "21:45:02.123  Block   shop/cart → www.example.com (192.0.2.10:443)  cart/own-sites  0 B up, 0 B down  Refused",
        ),
        (
            {
                "policy": None,
                "reason": "DefaultAction",
                "destination": {"address": "2001:db8::1", "port": 25, "name": None},
            },
            "21:45:02.123  Allow   shop/cart → [2001:db8::1]:25  DefaultAction  999 B up, 1.2 MB down",
        ),
        (
            {
                "audit": AUDIT,
                "destination": {**ALLOWED["destination"], "name": "a.example"},
                "source": {**ALLOWED["source"], "pod": "", "namespace": ""},
            },
            "21:45:02.123  Allow   10.244.1.10 → a.example (192.0.2.10:443)  cart/own-sites, on trial Block by b/x  999 B up, 1.2 MB down",
        ),
    ],
    ids=["allowed", "blocked", "without a name or rule", "audited, of an unknown pod"],
)
def test_a_record_is_one_line(change: dict[str, Any], text: str) -> None:
    assert click.unstyle(flow_text(json.dumps({**ALLOWED, **change}).encode())) == text


@pytest.mark.parametrize("line", [b"", b"{}", b"[]", b"null", b'{"source": 1}', b"not json"])
def test_what_is_no_record_is_told(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"no flow record|Expecting value"):
        flow_text(line)


def test_tail_gives_whole_lines_once(tmp_path: Path) -> None:
    path = tmp_path / "flows.json"
    path.touch()
    with path.open("ab", buffering=0) as file, closing(Tail(path)) as tail:
        assert tail.lines() == []
        file.write(b"one\ntw")
        assert tail.lines() == [b"one"]
        file.write(b"o\n\nthree\n")
        assert tail.lines() == [b"two", b"", b"three"]
        assert tail.lines() == []
