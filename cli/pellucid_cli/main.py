"""The command `pellucid`: a group whose commands are imported only when they are used, so that help and completion answer at once."""

from __future__ import annotations

import importlib
import os
from typing import NamedTuple

import click

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class Entry(NamedTuple):
    """Where a command lives and the line that `pellucid --help` prints for it."""

    module: str
    summary: str


COMMANDS = {
    "run": Entry("run", "Run the proxy on this machine, by the policy files of a folder or as a node of a cluster."),
    "lab": Entry("lab", "See it work: pods, a node and servers in network namespaces, with live flows."),
    "lint": Entry("lint", "Check policy files: everything this node would refuse, with line and cure."),
    "status": Entry("status", "Show in one screen whether this machine enforces its policy."),
    "preflight": Entry(
        "preflight", "Say whether this machine can run the proxy, and if not, why, before anything is changed."
    ),
    "cleanup": Entry("cleanup", "Take away what a run that was killed has left."),
    "observe": Entry(
        "observe",
        "Show the flows of a running node, or of a file of flow records: who, to whom, the verdict and its rule.",
    ),
    "explain": Entry("explain", "Explain what becomes of a flow, by which rule, and why by no rule before."),
    "diff": Entry("diff", "Replay recorded flows against a changed policy, and show the verdicts that change."),
    "operator": Entry("operator", "Run the operator of a cluster: policies into snapshots, DaemonSets, statuses."),
    "uninstall": Entry("uninstall", "Take Pellucid off the nodes of a cluster, before its chart goes."),
    "canary": Entry("canary", "Ask an address that only Pellucid answers: are this pod's connections intercepted?"),
    "version": Entry("version", "Show the versions of Pellucid and Python, and which form of the engine runs."),
}


class LazyGroup(click.Group):
    """A group that knows its commands' names and summaries without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command = importlib.import_module(f".commands.{entry.module}", __package__).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])


def _print_version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from .commands.version import lines

        click.echo("\n".join(lines()))
        ctx.exit()


@click.group(
    cls=LazyGroup,
    context_settings=CONTEXT,
    epilog="Exit status: 0 done or good, 1 not (lint found faults, status is not enforcing, run failed), 2 wrong usage "
    "(status: nothing runs here). Each command's --help says more.",
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Show the versions and exit.",
)
@click.pass_context
def main(ctx: click.Context) -> None:
    """Pellucid: a transparent proxy that takes the traffic of pods through a policy, without the pods knowing.

    \b
    pellucid lint policies/                          check the files
    pellucid run --policy policies/ --scope 10.244.0.0/16
    pellucid status --wait 10                        is it enforced?
    pellucid observe -f --verdict Block              what is refused
    pellucid explain shop/cart 192.0.2.10:443 --sni api.example.com
    pellucid lab                                     nothing to set up, nothing left behind
    """
    if os.environ.get("NO_COLOR"):  # https://no-color.org
        ctx.color = False
