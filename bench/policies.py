"""The policy that every contender enforces, in the form that each reads: 500 names allowed, 500 blocked, one blocked domain.

A name that is not listed is allowed; those that the drivers use are not listed. The lists of rules and addresses are for Pellucid alone."""
from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from bench import lab

ALLOWED = tuple(f"svc{i}.ok.test" for i in range(0, 1000, 2))
BLOCKED = tuple(f"host{i}.blocked.test" for i in range(1, 1000, 2))
BLOCKED_DOMAIN = "evil.test"  # every name below it
Rule = dict[str, object]


def _rule(name: str, action: str, destinations: list[dict[str, str]]) -> Rule:
    return {"name": name, "match": {"destinations": destinations}, "action": action}


def _domains(names: Iterable[str]) -> list[dict[str, str]]:
    return [{"domain": name} for name in names]


def names() -> list[Rule]:
    """The policy of the comparison."""
    return [
        _rule("blocked", "Block", _domains([*BLOCKED, f"*.{BLOCKED_DOMAIN}"])),
        _rule("allowed", "Allow", _domains(ALLOWED)),
    ]


def addresses() -> list[Rule]:
    """Addresses alone decide the drivers' connections; a blocked name follows, so that others go to the proxy."""
    return [_rule("servers", "Allow", [{"cidr": lab.SERVER_CIDR}]), _rule("blocked", "Block", _domains(BLOCKED))]


def many(count: int) -> list[Rule]:
    """That many rules of three sorts in turn, none of which matches the drivers' names; the last one allows these."""
    return [*list(_unmatched(count - 1)), _rule("drivers", "Allow", _domains(["*.bench.test"]))]


def _unmatched(count: int) -> Iterator[Rule]:
    yield _rule("first", "Block", _domains([BLOCKED[0]]))
    for i in range(1, count):
        destination = ({"domain": f"exact{i}.test"}, {"domain": f"*.below{i}.test"}, {"cidr": f"198.18.{i // 256}.{i % 256}/32"})[i % 3]
        yield _rule(f"rule-{i}", "Block", [destination])


def pellucid(rules: list[Rule]) -> str:
    """A policy of the default namespace, where the pods are that nothing is known of. JSON is YAML."""
    return json.dumps(
        {
            "apiVersion": "pellucid.dev/v1alpha1",
            "kind": "TransparentPolicy",
            "metadata": {"name": "bench", "namespace": "default"},
            "spec": {"podSelector": {}, "rules": rules},
        },
        indent=1,
    )


PELLUCID = {"names": names, "addresses": addresses, "rules-10": lambda: many(10), "rules-10000": lambda: many(10_000)}


def write_all(folder: Path) -> None:
    """Every form lies in the folder: pellucid-NAME/bench.yaml, haproxy-names, haproxy-domains, nginx-names, squid-names, blocked-names."""
    verdicts = {name: 0 for name in ALLOWED} | {name: 1 for name in BLOCKED}
    lines = {
        "haproxy-names": [f"{name} {verdict}" for name, verdict in verdicts.items()],
        "haproxy-domains": [f".{BLOCKED_DOMAIN}"],
        "nginx-names": [*(f"{name} {verdict};" for name, verdict in verdicts.items()), f".{BLOCKED_DOMAIN} 1;"],
        "squid-names": [*BLOCKED, f".{BLOCKED_DOMAIN}"],
        "names": [*(f"{name} {verdict}" for name, verdict in verdicts.items()), f".{BLOCKED_DOMAIN} 1"],
    }
    for file, content in lines.items():
        (folder / file).write_text("".join(f"{line}\n" for line in content))
    for name, rules in PELLUCID.items():
        (folder / f"pellucid-{name}").mkdir(exist_ok=True)
        (folder / f"pellucid-{name}/bench.yaml").write_text(pellucid(rules()))


def envoy_server_names() -> str:
    """The blocked names as an inline list of YAML."""
    return ", ".join([*BLOCKED, f'"*.{BLOCKED_DOMAIN}"'])
