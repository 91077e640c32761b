"""`pellucid run`: from the command line to RunOptions, and back to an exit status."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import pellucid_proxy.supervisor as supervisor
from pellucid_cli.main import main
from pellucid_proxy.supervisor import RunOptions


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RunOptions]:
    """What run() was called with; it answers 3."""
    calls: list[RunOptions] = []

    def run(options: RunOptions) -> int:
        calls.append(options)
        return 3

    monkeypatch.setattr(supervisor, "run", run)
    return calls


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["run", *arguments])


def test_every_option_reaches_the_supervisor_and_its_status_is_the_commands(
    asked: list[RunOptions], tmp_path: Path
) -> None:
    line = f"--policy {tmp_path} --scope 10.244.0.0/16 --scope fd00::/64 --state /s --metrics [::1]:9090 --flows - --workers 2"
    shown = run(
        *line.split(),
        *[
            "--node",
            "n1",
            "--source-address",
            "Node",
            "--drain",
            "1.5",
            "--allow-dial",
            "127.0.0.0/8",
            "--log-level",
            "WARNING",
        ],
    )
    assert shown.exit_code == 3
    assert asked == [
        RunOptions(
            policy=str(tmp_path),
            scope=("10.244.0.0/16", "fd00::/64"),
            allow_dial=("127.0.0.0/8",),
            state="/s",
            metrics="[::1]:9090",
            flows="-",
            drain_s=1.5,
            node="n1",
            workers=2,
            source_address="Node",
            log_level="WARNING",
        )
    ]


def test_what_is_not_said_is_left_to_the_folder(asked: list[RunOptions], tmp_path: Path) -> None:
    run("--policy", str(tmp_path))
    (options,) = asked
    assert (options.scope, options.workers, options.source_address) == ((), None, None)
    assert (options.metrics, options.flows) == (None, None)


@pytest.mark.parametrize(
    ("user", "runtime", "state"),
    [
        (0, None, "/run/pellucid"),
        (1000, "/run/user/1000", "/run/user/1000/pellucid"),
        (1000, None, "/tmp/user-1000/pellucid"),
    ],
)
def test_state_lies_where_the_user_may_write(
    asked: list[RunOptions], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, user: int, runtime: str | None, state: str
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: user)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    if runtime is not None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
    run("--policy", str(tmp_path))
    assert asked[0].state == state


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Give --policy DIR or --cluster, and not both"),
        (["--policy", ".", "--cluster"], "Give --policy DIR or --cluster, and not both"),
        (["--cluster"], "--cluster needs --node: the name of the Node object"),
        (["--policy", "/no/such"], "'/no/such' does not exist"),
        (["--policy", ".", "--scope", "10.244.0.1/16"], "did you mean 10.244.0.0/16?"),
        (["--policy", ".", "--scope", "pods"], "pods is not a network"),
        (["--policy", ".", "--allow-dial", "x"], "x is not a network"),
        (["--policy", ".", "--metrics", "9090"], "9090: it has no port. Cure: write it as 127.0.0.1:9090"),
        (["--policy", ".", "--metrics", "::1:9090"], "an IPv6 address stands in brackets"),
        (["--policy", ".", "--metrics", "127.0.0.1:70000"], "70000 is not a port (0-65535)"),
        (["--policy", ".", "--workers", "0"], "0 is not in the range"),
        (["--policy", ".", "--drain", "-1"], "-1.0 is not in the range"),
        (["--policy", ".", "--source-address", "pod"], "'pod' is not one of"),
    ],
)
def test_wrong_usage_is_told_with_its_cure_before_anything_starts(
    asked: list[RunOptions], arguments: list[str], said: str
) -> None:
    shown = run(*arguments)
    assert shown.exit_code == 2
    assert said in " ".join(shown.stderr.split())
    assert asked == []
