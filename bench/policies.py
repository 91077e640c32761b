"""The policy that every contender enforces, in the form that each reads: 500 names allowed, 500 blocked, one blocked domain.

A name that is not listed is allowed; those that the drivers use are not listed. The lists of rules and addresses are for Pellucid alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from bench import lab

ALLOWED = tuple(f"svc{i}.ok.test" for i in range(0, 1000, 2))
BLOCKED = tuple(f"host{i}.blocked.test" for i in range(1, 1000, 2))
BLOCKED_DOMAIN = "evil.test"  # every name below it
RULES_PER_POLICY = 1000
CONNECTIONS = 65536
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
        destination = (
            {"domain": f"exact{i}.test"},
            {"domain": f"*.below{i}.test"},
            {"cidr": f"198.18.{i // 256}.{i % 256}/32"},
        )[i % 3]
        yield _rule(f"rule-{i}", "Block", [destination])


def pellucid(rules: list[Rule]) -> dict[str, str]:
    """Policies of the default namespace, where the pods are that nothing is known of, by file name. JSON is YAML.

    A policy holds RULES_PER_POLICY rules at most; the priority keeps their order. All load comes from one pod, which may have it all."""
    chunks = [rules[first : first + RULES_PER_POLICY] for first in range(0, len(rules), RULES_PER_POLICY)]
    installation = {
        "apiVersion": "pellucid.dev/v1alpha1",
        "kind": "TransparentProxy",
        "metadata": {"name": "default"},
        "spec": {"limits": {"connectionsPerPod": CONNECTIONS}},
    }
    files = {f"bench-{i}.yaml": _policy(f"bench-{i}", i, chunk) for i, chunk in enumerate(chunks)}
    return files | {"installation.yaml": json.dumps(installation)}


def _policy(name: str, priority: int, rules: list[Rule]) -> str:
    body = {
        "apiVersion": "pellucid.dev/v1alpha1",
        "kind": "TransparentPolicy",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"podSelector": {}, "priority": priority, "rules": rules},
    }
    return json.dumps(body, indent=1)


PELLUCID: dict[str, Callable[[], list[Rule]]] = {
    "names": names,
    "addresses": addresses,
    "rules-10": partial(many, 10),
    "rules-10000": partial(many, 10_000),
}


def write_all(folder: Path) -> None:
    """Every form lies in the folder: pellucid-NAME/, haproxy-names, haproxy-domains, nginx-names, squid-names, names."""
    verdicts = dict.fromkeys(ALLOWED, 0) | dict.fromkeys(BLOCKED, 1)
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
        for file, text in pellucid(rules()).items():
            (folder / f"pellucid-{name}" / file).write_text(text)


def envoy_server_names() -> str:
    """The blocked names as an inline list of YAML."""
    return ", ".join([*BLOCKED, f'"*.{BLOCKED_DOMAIN}"'])
