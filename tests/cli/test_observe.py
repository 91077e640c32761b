"""`pellucid observe` on files: filters, forms of output, and readers that leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from pellucid_cli.main import main

from .test_records import ALLOWED

POLICY = ALLOWED["policy"]
FLOWS: list[dict[str, Any]] = [
    ALLOWED,
    {**ALLOWED, "verdict": "Block", "policy": {**POLICY, "rule": "rest"}, "time": "2026-11-22T22:45:02.123Z"},
    {**ALLOWED, "source": {**ALLOWED["source"], "pod": "free", "namespace": "tools"}},
    {**ALLOWED, "destination": {"address": "2001:db8::1", "port": 25, "name": None}, "policy": None},
    {**ALLOWED, "verdict": "Route", "policy": {**POLICY, "name": "other"}, "ended": {"by": "upstream", "why": "ConnectTimeout"}},
]  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "flows.jsonl"
    path.write_text("".join(json.dumps(flow) + "\n" for flow in FLOWS))
    return path


def observe(file: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["observe", "--file", str(file), *arguments])


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ("", [0, 1, 2, 3, 4]),
        ("--verdict block", [1]),
        ("--verdict Block --verdict Route", [1, 4]),
        ("--pod cart", [0, 1, 3, 4]),
        ("--pod tools/free", [2]),
        ("--pod shop/free", []),
        ("-n tools", [2]),
        ("--policy other", [4]),
        ("--policy shop/cart", [0, 1, 2]),
        ("--rule rest", [1]),
        ("--rule rest --verdict Allow", []),
        ("--name www.example.com", [0, 1, 2, 4]),
        ("--name *.example.com", [0, 1, 2, 4]),
        ("--name example.com", []),
        ("--name *.WWW.example.com", []),
        ("--to 192.0.2.0/24", [0, 1, 2, 4]),
        ("--to 2001:db8::/32 --to 192.0.2.11", [3]),
        ("--port 25", [3]),
        ("--port 400-443", [0, 1, 2, 4]),
        ("--since 2026-11-22T22:00:00Z", [1]),
        ("--since 1s", []),
        ("--last 2", [3, 4]),
        ("--last 1 --verdict Allow", [3]),
        ("--last 0", []),
    ],
)
def test_a_filter_wants_any_of_its_values_and_all_filters_must_hold(
    file: Path, arguments: str, shown: list[int]
) -> None:
    done = observe(file, *arguments.split())
    assert done.exit_code == 0
    assert [json.loads(line) for line in done.stdout.splitlines()] == [FLOWS[at] for at in shown]


def test_a_table_is_a_line_a_flow_and_wide_says_more(file: Path) -> None:
    table = click.unstyle(observe(file, "-o", "table").stdout).splitlines()
    assert len(table) == len(FLOWS)
    assert table[4].endswith("ConnectTimeout (by the upstream)")
    wide = click.unstyle(observe(file, "-o", "wide", "--last", "1").stdout)
    assert (
        "TLS  RuleMatched  from 10.244.1.10 port 40000  first byte 10 ms  0.100 s  upstream: ConnectTimeout  n1 5f2c9e1"
        in wide
    )


def test_a_line_that_is_no_record_is_left_out_and_counted(file: Path) -> None:
    with file.open("a") as opened:
        opened.write("nonsense\n{}\n\n")
    done = observe(file)
    assert (len(done.stdout.splitlines()), done.exit_code) == (len(FLOWS), 0)
    assert "3 lines that are no flow records left out" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--port 70000", "--port"),
        ("--port x", "--port"),
        ("--name 10.0.0.1", "--name"),
        ("--since yesterday", "--since"),
        ("--since 2026-11-22T22:00:00", "no time zone"),
        ("--to 10.0.0.1/8", "did you mean"),
        ("--verdict maybe", "--verdict"),
    ],
)
def test_a_wrong_filter_is_wrong_usage_and_named(file: Path, arguments: str, said: str) -> None:
    done = observe(file, *arguments.split())
    assert done.exit_code == 2
    assert said in done.stderr


def test_a_file_that_is_away_is_named_with_a_cure(tmp_path: Path) -> None:
    done = observe(tmp_path / "away")
    assert done.exit_code == 1
    assert "away: No such file or directory. Cure: " in done.stderr


def test_no_node_is_status_2_with_a_cure(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["observe", "--state", str(tmp_path)])
    assert done.exit_code == 2
    assert "Cure: start `pellucid run`" in done.stderr


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_colours_obey_no_color(file: Path, no_color: str, coloured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    done = CliRunner().invoke(main, ["observe", "--file", str(file), "-o", "table"], color=True)
    assert ("\x1b[" in done.stdout) == coloured


def test_a_reader_that_leaves_ends_it_quietly(file: Path) -> None:
    file.write_text((json.dumps(ALLOWED) + "\n") * 5000)
    command = [sys.executable, "-m", "pellucid_cli", "observe", "--file", str(file), "--last", "5000", "-o", "json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ)) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline()) == ALLOWED
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
