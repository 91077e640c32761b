"""What holds for every test: the form under test is said and checked, and a test that did not run fails the run."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Generator

import pytest

_not_run = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_not_run] = []
    if importlib.util.find_spec("pellucid_proxy") is None:
        raise pytest.UsageError(
            "nothing to test: PYTHONPATH=policy:proxy:operator:cli has the sources, build/compiled/current the compiled form"
        )
    wanted = os.environ.get("PELLUCID_FORM", form())
    if form() != wanted:
        raise pytest.UsageError(f"PELLUCID_FORM={wanted}, but PYTHONPATH leads to the {form()} engine")


def pytest_report_header() -> str:
    return f"form: {form()}"


def form() -> str:
    """Which form of the engine these tests import."""
    relay = importlib.util.find_spec("pellucid_proxy.engine.relay")
    return "compiled" if relay and relay.origin and relay.origin.endswith(".so") else "uncompiled"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped:  # an expected failure counts as skipped, too
        item.config.stash[_not_run].append(report.nodeid)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped:
        collector.config.stash[_not_run].append(report.nodeid)
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if session.config.stash[_not_run] and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    not_run = config.stash[_not_run]
    if not_run:
        terminalreporter.section("a test that does not run is a failure", red=True)
        terminalreporter.write_line("\n".join(not_run))
