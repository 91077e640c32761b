"""`pellucid lint`: what it says, where, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pellucid_cli.lab.scene import POLICY
from pellucid_cli.main import main

EXAMPLES = Path(__file__).parents[2] / "examples"

GOOD = """\
apiVersion: pellucid.dev/v1alpha1
kind: TransparentPolicy
metadata: {name: api, namespace: shop}
spec:
  podSelector: {}
  rules:
  - match: {destinations: [{domain: www.example.com}]}
    action: Allow
"""
BAD_PORT = GOOD.replace("www.example.com}]", "www.example.com}], ports: [{port: 70000}]")
BAD_ACTION = GOOD.replace("name: api", "name: other").replace("Allow", "Alow")
NOT_YET = GOOD.replace("name: api", "name: third").replace(
    "action: Allow", "action: Allow\n    egress: {interface: wg0}"
)


def lint(*arguments: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, ["lint", *map(str, arguments)], input=stdin)


@pytest.mark.parametrize(
    "folder", [POLICY, *sorted(path for path in EXAMPLES.iterdir() if path.is_dir())], ids=lambda path: path.name
)
def test_takes_every_example(folder: Path) -> None:
    shown = lint(folder)
    assert (shown.exit_code, shown.stdout) == (0, "")
    assert shown.stderr.startswith("good: ")


def test_names_file_line_field_and_cure(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(BAD_ACTION)
    shown = lint(tmp_path)
    assert shown.exit_code == 1
    assert (
        shown.stdout == f"{tmp_path}/a.yaml:8: spec.rules[0].action: 'Alow' is not allowed. Cure: did you mean Allow?\n"
    )
    assert shown.stderr == "1 problem: this would be refused as a whole\n"


def test_tells_of_all_files_and_of_what_this_release_lacks_at_once(tmp_path: Path) -> None:
    for name, text in (("a.yaml", BAD_PORT), ("b.yaml", BAD_ACTION), ("c.yaml", NOT_YET)):
        (tmp_path / name).write_text(text)
    shown = lint(tmp_path)
    assert shown.exit_code == 1
    places = [line.split(": ")[:2] for line in shown.stdout.splitlines()]
    assert places == [
        [f"{tmp_path}/a.yaml:7", "spec.rules[0].match.ports[0].port"],
        [f"{tmp_path}/b.yaml:8", "spec.rules[0].action"],
        [f"{tmp_path}/c.yaml:9", "spec.rules[0].egress.interface"],
    ]
    assert "needs feature EgressInterface" in shown.stdout


def test_several_paths_are_one_policy(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(GOOD)
    two.write_text(GOOD)
    assert lint(one).exit_code == 0
    shown = lint(one, two)
    assert shown.exit_code == 1
    assert f"is there twice, first at {one}:3" in shown.stdout


@pytest.mark.parametrize(("text", "status"), [(GOOD, 0), (BAD_PORT, 1), ("[", 1), ("", 0)])
def test_reads_standard_input(text: str, status: int) -> None:
    shown = lint("-", stdin=text)
    assert shown.exit_code == status
    assert all(line.startswith("<stdin>:") for line in shown.stdout.splitlines())


def test_json_holds_the_same_and_is_json_alone(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(BAD_ACTION)
    shown = lint("-o", "json", tmp_path)
    assert shown.exit_code == 1
    assert shown.stderr == ""
    assert json.loads(shown.stdout) == {
        "files": 1,
        "objects": 0,
        "problems": [
            {
                "file": f"{tmp_path}/a.yaml",
                "line": 8,
                "path": "spec.rules[0].action",
                "message": "'Alow' is not allowed",
                "cure": "did you mean Allow?",
            }
        ],
    }


def test_an_empty_folder_is_refused_as_by_run(tmp_path: Path) -> None:
    shown = lint(tmp_path)
    assert shown.exit_code == 1
    assert f"{tmp_path}:1: holds no manifest" in shown.stdout


@pytest.mark.parametrize("arguments", [[], ["/no/such/folder"], ["-o", "xml", "."]])
def test_wrong_usage_is_status_2(arguments: list[str]) -> None:
    assert lint(*arguments).exit_code == 2
