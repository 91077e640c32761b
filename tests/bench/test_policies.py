"""Every contender is given the same policy, and Pellucid takes its form of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import policies
from pellucid_policy.objects import Objects
from pellucid_policy.parse import parse_files


@pytest.mark.parametrize("name", policies.PELLUCID)
def test_pellucid_takes_every_policy(name: str) -> None:
    files = policies.pellucid(policies.PELLUCID[name]())
    parsed = parse_files({file: text.encode() for file, text in files.items()})
    assert isinstance(parsed, Objects), parsed


def test_peers_and_pellucid_block_the_same_names(tmp_path: Path) -> None:
    policies.write_all(tmp_path)
    blocked = {*policies.BLOCKED, f".{policies.BLOCKED_DOMAIN}"}
    haproxy = _blocked(tmp_path / "haproxy-names") | set((tmp_path / "haproxy-domains").read_text().split())
    nginx = {name for name, verdict in _pairs(tmp_path / "nginx-names") if verdict == "1;"}
    squid = set((tmp_path / "squid-names").read_text().split())
    envoy = {name.strip('"*') for name in policies.envoy_server_names().split(", ")}
    rule = policies.names()[0]
    pellucid = {each["domain"].removeprefix("*") for each in rule["match"]["destinations"]}  # type: ignore[index]
    assert haproxy == nginx == squid == envoy == pellucid == _blocked(tmp_path / "names") == blocked


def test_as_many_rules_as_asked_for_and_only_the_last_one_matches_the_drivers() -> None:
    for count in (10, 10_000):
        rules = policies.many(count)
        assert len(rules) == len({rule["name"] for rule in rules}) == count
        assert [rule["name"] for rule in rules if "bench.test" in str(rule["match"])] == [rules[-1]["name"]]


def _pairs(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()]


def _blocked(path: Path) -> set[str]:
    return {name for name, verdict in _pairs(path) if verdict == "1"}
