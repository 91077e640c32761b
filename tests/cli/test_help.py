"""Help, completion and versions: what people meet first."""

from __future__ import annotations

import json
import subprocess
import sys

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from pellucid_cli.main import COMMANDS, main


def command(name: str) -> click.Command:
    found = main.get_command(click.Context(main), name)
    assert found is not None
    return found


def test_help_names_every_command_with_its_summary() -> None:
    shown = CliRunner().invoke(main, ["--help"])
    assert shown.exit_code == 0
    words = " ".join(shown.output.split())
    assert all(f"{name} {entry.summary}" in words for name, entry in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_the_summary_begins_the_commands_own_help(name: str) -> None:
    help_text = command(name).help
    assert help_text is not None
    assert " ".join(help_text.split()).startswith(COMMANDS[name].summary)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "version"])
def test_help_says_the_exit_statuses_and_gives_examples(name: str) -> None:
    shown = CliRunner().invoke(main, [name, "--help"])
    assert shown.exit_code == 0
    assert "Exit status: 0 " in shown.output
    assert f"  pellucid {name}" in shown.output


def test_help_imports_neither_the_data_path_nor_the_policy_nor_rich() -> None:
    program = (
        "import sys, json\nfrom pellucid_cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert loaded.isdisjoint({"pellucid_policy", "pellucid_proxy", "rich", "yaml", "msgspec", "uvloop", "asyncio"})


def test_an_unknown_command_is_wrong_usage() -> None:
    shown = CliRunner().invoke(main, ["obey"])
    assert shown.exit_code == 2
    assert "No such command 'obey'" in shown.stderr


def test_completion_offers_commands_and_options() -> None:
    complete = ShellComplete(main, {}, "pellucid", "_PELLUCID_COMPLETE")
    assert {item.value for item in complete.get_completions([], "l")} == {"lab", "lint"}
    assert "--drain" in {item.value for item in complete.get_completions(["run"], "--d")}


@pytest.mark.parametrize("arguments", [["--version"], ["version"]])
def test_version_says_which_form_of_the_engine_runs(arguments: list[str]) -> None:
    from pellucid_proxy import __version__
    from pellucid_proxy.engine import relay

    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 0
    lines = [line.split() for line in shown.output.splitlines()]
    assert ["pellucid", __version__] in lines
    assert ["python", ".".join(map(str, sys.version_info[:3]))] in lines
    assert ["engine", "compiled" if relay.compiled else "uncompiled"] in lines
