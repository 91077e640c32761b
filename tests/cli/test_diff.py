"""`pellucid diff` on files: what changes, what does not, and what a record does not tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pellucid_cli.main import main
from pellucid_policy.compile import compile_policies
from pellucid_policy.objects import Objects
from pellucid_policy.parse import parse_files

from .test_records import ALLOWED

PODS = """
apiVersion: v1
kind: Pod
metadata: {name: cart, namespace: shop, labels: {app: cart}}
status: {podIPs: [{ip: 10.244.1.10}]}
---
apiVersion: pellucid.dev/v1alpha1
kind: TransparentProxy
metadata: {name: default}
spec: {podCIDRs: [10.244.1.0/24]}
---
apiVersion: pellucid.dev/v1alpha1
kind: TransparentPolicy
metadata: {name: other, namespace: shop}
spec: {podSelector: {matchLabels: {app: other}}, rules: [{match: {}, action: Block}]}
"""


def policy(rules: str, names: str = "") -> str:
    return (
        "apiVersion: pellucid.dev/v1alpha1\nkind: TransparentPolicy\nmetadata: {name: cart, namespace: shop}\n"
        f"spec:\n  podSelector: {{matchLabels: {{app: cart}}}}\n  {names}\n  rules:\n{rules}"
    )


SITE = "  - {name: site, match: {destinations: [{domain: www.example.com}]}, action: ACTION}\n"
REST = "  - {name: rest, match: {}, action: ACTION}\n"
NOW = policy(SITE.replace("ACTION", "Allow") + REST.replace("ACTION", "Block"))
RULE = {"kind": "TransparentPolicy", "namespace": "shop", "name": "cart", "rule": "site"}
TLS = {**ALLOWED, "policy": RULE}
BLOCKED = {
    **ALLOWED,
    "verdict": "Block",
    "policy": {**RULE, "rule": "rest"},
    "destination": {**ALLOWED["destination"], "name": "ads.example"},
}


def revision(text: str) -> str:
    objects = parse_files({"a.yaml": f"{PODS}---\n{text}".encode()})
    assert isinstance(objects, Objects), objects
    return compile_policies(objects).revision


def diff(
    folder: Path, changed: str, flows: list[dict[str, Any]], now: str = NOW, of_now: bool = True
) -> tuple[int, dict[str, Any]]:
    (folder / "now").mkdir()
    (folder / "now" / "a.yaml").write_text(f"{PODS}---\n{now}")
    (folder / "changed.yaml").write_text(changed)
    known = revision(now) if of_now else "0" * 16
    (folder / "flows").write_text("".join(json.dumps({**flow, "revision": known}) + "\n" for flow in flows))
    done = _run(folder, "-o", "json")
    assert done.stderr == ""
    return done.exit_code, json.loads(done.stdout)


def _run(folder: Path, *more: str) -> Result:
    paths = ["-f", str(folder / "changed.yaml"), "--policy", str(folder / "now"), "--flows", str(folder / "flows")]
    return CliRunner().invoke(main, ["diff", *paths, *more])


def test_a_verdict_that_changes_is_told_by_pod_destination_and_rule(tmp_path: Path) -> None:
    status, said = diff(tmp_path, policy(REST.replace("ACTION", "Block")), [TLS, TLS, BLOCKED])
    assert (status, said["changed"], said["unchanged"], said["cannotTell"]) == (1, 2, 1, 0)
    assert said["changes"] == [
        {
            "source": "shop/cart",
            "destination": "www.example.com:443",
            "before": "Allow by cart/site",
            "after": "Block (Reset) by cart/rest",
            "flows": 2,
        }
    ]
    text = _run(tmp_path, "-o", "text").stdout.splitlines()
    assert text[-1] == "3 recorded flows: 2 change, 1 do not, 0 cannot be told"


def test_another_rule_that_says_the_same_is_no_change(tmp_path: Path) -> None:
    other = "  - {name: all, match: {destinations: [{domain: '*.example.com'}]}, action: Allow}\n"
    status, said = diff(tmp_path, policy(other + REST.replace("ACTION", "Block")), [TLS, BLOCKED])
    assert (status, said["unchanged"]) == (0, 2)


def test_objects_of_the_change_are_added_to_those_there(tmp_path: Path) -> None:
    admin = """
apiVersion: pellucid.dev/v1alpha1
kind: ClusterTransparentPolicy
metadata: {name: admin}
spec: {tier: Admin, podSelector: {}, rules: [{name: never, match: {destinations: [{domain: "*.example.com"}]}, action: Block}]}
"""
    _, said = diff(tmp_path, admin, [TLS, BLOCKED])
    assert [each["after"] for each in said["changes"]] == ["Block (Reset) by admin/never"]


@pytest.mark.parametrize(
    ("flow", "changed", "of_now", "why"),
    [
        ({**TLS, "source": {**TLS["source"], "pod": "gone"}}, NOW, True, "its pod is not among the objects"),
        ({**TLS, "verdict": "None", "reason": "Undecided", "policy": None}, NOW, True, "ended before it was decided"),
        ({**TLS, "reason": "DialDenied", "verdict": "Block", "policy": None}, NOW, True, "a fact is not in the record"),
        (
            TLS,
            policy(
                SITE.replace("ACTION", "Allow") + REST.replace("ACTION", "Block"),
                "names: {encryptedClientHello: Block}",
            ),
            True,
            "whether its hello was encrypted",
        ),
        (
            {**TLS, "protocol": "None", "destination": {**TLS["destination"], "name": None}},
            NOW,
            False,
            "a rule asks for the name, which was not read",
        ),
    ],
)
def test_a_fact_that_is_missing_counts_as_cannot_tell(
    tmp_path: Path, flow: dict[str, Any], changed: str, of_now: bool, why: str
) -> None:
    status, said = diff(tmp_path, changed, [flow], of_now=of_now)
    assert (status, said["cannotTell"], said["unchanged"]) == (3, 1, 0)
    assert why in said["why"][0]["why"]


def test_lines_that_are_no_records_count_too(tmp_path: Path) -> None:
    diff(tmp_path, NOW, [TLS])
    (tmp_path / "flows").write_text("nonsense\n")
    assert _run(tmp_path, "-o", "json").exit_code == 3


def test_a_change_that_is_refused_is_told_with_its_problems(tmp_path: Path) -> None:
    diff(tmp_path, NOW, [TLS])
    (tmp_path / "changed.yaml").write_text(NOW.replace("action: Allow", "action: Alow"))
    done = _run(tmp_path)
    assert done.exit_code == 1
    assert "'Alow'" in done.stderr


def test_no_node_is_status_2_with_a_cure(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(NOW)
    done = CliRunner().invoke(main, ["diff", "-f", str(tmp_path / "a.yaml"), "--state", str(tmp_path)])
    assert done.exit_code == 2
    assert "which need no node" in done.stderr
