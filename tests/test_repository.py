"""What must hold of the tree itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import pytest

from pellucid_policy.features import unsupported
from pellucid_policy.objects import Objects
from pellucid_policy.parse import parse_files
from pellucid_proxy.settings import Marks, NodeSettings
from tests.conftest import form
from tools import settings_table

ROOT = Path(__file__).resolve().parent.parent

# Spelt in pieces, so that this file does not name them.
REGISTRY_HOSTS = [
    "pypi" + r"\.org",
    "python" + r"hosted\.org",
    "npm" + r"js\.(org|com)",
    r"crates" + r"\.io",
    "proxy" + r"\.golang\.org",
    "repo" + r"\.maven\.apache\.org",
    "deb" + r"\.debian\.org",
    "index" + "-url",
    "find" + "-links",
]
OUTSIDE = [r"\.\./" + "shared", "/work/" + "shared", r"/work/" + r"\.library", "/work/" + "main"]


def tracked() -> list[str]:
    """The files of the tree, without what was made in it. Where git is not installed, hidden folders but .ci are left out instead."""
    if shutil.which("git"):
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
        if listed.returncode == 0:
            return [name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]
    made = {"build", "dist", "__pycache__"}
    inside = [path.relative_to(ROOT) for path in sorted(ROOT.rglob("*")) if path.is_file()]
    folders = [(path, set(path.parts[:-1])) for path in inside]
    return [
        str(path) for path, parents in folders if not parents & made and not any(p[0] == "." for p in parents - {".ci"})
    ]


@pytest.mark.parametrize("pattern", REGISTRY_HOSTS + OUTSIDE)
def test_no_file_names_a_registry_host_or_a_place_outside_the_tree(pattern: str) -> None:
    wanted = re.compile(pattern)
    allowed = {"Makefile": "--no-emit-"}  # the options that keep such names out of the lock
    hits = []
    for name in tracked():
        for number, line in enumerate((ROOT / name).read_text(errors="replace").splitlines(), 1):
            if wanted.search(line) and allowed.get(name, "\0") not in line:
                hits.append(f"{name}:{number}: {line.strip()[:100]}")
    assert hits == []


def test_every_requirement_is_pinned_by_hash() -> None:
    for lock in [name for name in tracked() if name.endswith(".lock")]:
        entries = re.split(r"\n(?=[a-z0-9])", (ROOT / lock).read_text().strip())
        unpinned = [
            entry.split()[0] for entry in entries if not entry.startswith("#") and "--hash=sha256:" not in entry
        ]
        assert unpinned == [], lock


def test_operator_is_no_package_because_it_would_shadow_the_standard_library() -> None:
    assert not (ROOT / "operator" / "__init__.py").exists()


def test_every_folder_of_tests_is_a_package() -> None:
    folders = {(ROOT / name).parent for name in tracked() if name.startswith("tests/") and name.endswith(".py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_tests_live_in_tests_alone() -> None:
    stray = [
        name
        for name in tracked()
        if Path(name).name.startswith("test_") and not name.startswith(("tests/", "bench/tests/", "e2e/tests/"))
    ]
    assert stray == []


def test_no_compiled_module_lies_among_the_sources() -> None:
    assert [name for name in tracked() if name.endswith((".so", ".pyc", ".o"))] == []
    assert [
        str(found) for room in ("policy", "proxy", "operator", "cli") for found in (ROOT / room).rglob("*.so")
    ] == []


def test_every_compiled_module_of_pyproject_exists() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    folders = [(ROOT / package).parent for package in wheel["packages"]]
    patterns = wheel["hooks"]["custom"]["compiled"]
    assert [pattern for pattern in patterns if not any(list(folder.glob(pattern)) for folder in folders)] == []


def test_architecture_lists_every_setting_with_its_default() -> None:
    table = settings_table.table(settings_table.SOURCE.read_text())
    assert settings_table.with_table(settings_table.DOCUMENT.read_text(), table) == settings_table.DOCUMENT.read_text()
    names = [f"marks.{field}" for field in Marks.__struct_fields__]
    names += [field.name for field in msgspec.structs.fields(NodeSettings) if field.name != "marks"]
    assert re.findall(r"^\| `([\w.]+)`", table, re.MULTILINE) == names


def test_links_in_documents_lead_somewhere() -> None:
    links = [
        (name, target)
        for name in tracked()
        if name.endswith(".md")
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / name).read_text())
        if "://" not in target
    ]
    broken = [f"{name}: {target}" for name, target in links if not ((ROOT / name).parent / target).exists()]
    assert broken == []


def test_the_policies_that_documents_and_examples_show_are_accepted() -> None:
    shown = {}
    for name in tracked():
        if name.endswith(".md"):
            blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)
            shown.update(
                {f"{name}[{at}].yaml": {f"{name}[{at}].yaml": block.encode()} for at, block in enumerate(blocks)}
            )
        elif name.startswith("examples/") and name.endswith((".yaml", ".yml")):
            shown.setdefault(str(Path(name).parent), {})[name] = (ROOT / name).read_bytes()
    assert "README.md[0].yaml" in shown
    for where, files in shown.items():
        objects = parse_files(files)
        assert isinstance(objects, Objects), (where, objects)
        assert unsupported(objects) == [], where


SKIPPING = """
import pytest

def test_runs():
    pass

@pytest.mark.{mark}
def test_does_not_run():
    assert False
"""


@pytest.mark.parametrize("mark", ["skip(reason='no')", "xfail(reason='no', strict=True)"])
def test_a_test_that_does_not_run_fails_the_run_and_is_named(mark: str, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(SKIPPING.format(mark=mark))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(place) for place in sys.path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, env=here, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    assert "does not run is a failure" in done.stdout
    assert "test_it.py::test_does_not_run" in done.stdout


def test_a_run_in_the_wrong_form_is_refused() -> None:
    wrong = {"compiled": "uncompiled", "uncompiled": "compiled"}[form()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_repository.py"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PELLUCID_FORM": wrong}, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"PELLUCID_FORM={wrong}" in done.stdout + done.stderr
