"""`pellucid observe`."""

from __future__ import annotations

import datetime as dt
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..arguments import NETWORK, state_option
from ..flow_filter import VERDICTS, FlowFilter, port_range, since

if TYPE_CHECKING:
    from ..flow_source import Line

SHOWN, FAILED, NOBODY_TO_ASK = 0, 1, 2
DEFAULT_LAST = 20

T = TypeVar("T")


@click.command(name="observe")
@click.option("-f", "--follow", is_flag=True, help="Go on with the flows that end from now on, until Ctrl-C.")
@click.option(
    "--last",
    type=click.IntRange(0),
    metavar="N",
    help="Begin with the last N flows that the filters want. [default: 20; with -f or --since: 0, all]",
)
@click.option(
    "--since",
    "since_",
    metavar="WHEN",
    help="Only flows that ended since then: 90s, 5m, 2h ago, or 2026-11-27T10:00:00Z.",
)
@click.option(
    "--verdict",
    type=click.Choice(VERDICTS, case_sensitive=False),
    multiple=True,
    help="Only these; None: ended before it was decided.",
)
@click.option("--pod", multiple=True, metavar="[NS/]NAME", help="Only flows of this pod.")
@click.option("-n", "--namespace", multiple=True, metavar="NS", help="Only flows of pods of this namespace.")
@click.option("--policy", multiple=True, metavar="[NS/]NAME", help="Only flows that this policy decided.")
@click.option("--rule", multiple=True, metavar="NAME", help="Only flows that a rule of this name decided.")
@click.option(
    "--name",
    multiple=True,
    metavar="DOMAIN",
    help="Only flows that ask for this name; *.example.com for those under it.",
)
@click.option("--to", type=NETWORK, multiple=True, metavar="CIDR", help="Only flows to these addresses.")
@click.option("--port", multiple=True, metavar="N[-M]", help="Only flows to these ports.")
@click.option(
    "--file", metavar="FILE", help="Read this file of flow records instead of asking a node; - is standard input."
)
@click.option(
    "-o",
    "--output",
    type=click.Choice(["auto", "table", "wide", "json"]),
    default="auto",
    show_default=True,
    help="auto: table for people on a terminal, JSON in a pipe. wide: more columns.",
)
@state_option
@click.pass_context
def command(
    ctx: click.Context,
    follow: bool,
    last: int | None,
    since_: str | None,
    verdict: tuple[str, ...],
    pod: tuple[str, ...],
    namespace: tuple[str, ...],
    policy: tuple[str, ...],
    rule: tuple[str, ...],
    name: tuple[str, ...],
    to: tuple[str, ...],
    port: tuple[str, ...],
    file: str | None,
    output: str,
    state: str,
) -> None:
    """Show the flows of a running node, or of a file of flow records: who, to whom, the verdict and its rule.

    A flow is shown when it has ended. What the kernel decides by addresses alone is counted, not recorded
    (pellucid_kernel_decided_packets_total; `pellucid explain` names the counter). A filter that is given several times wants
    any of its values; different filters must all hold.

    Without `run --flows FILE` a node makes records only while somebody observes, and keeps the last ones until it ends. An
    observer that reads too slowly loses records, and is told how many; traffic never waits.

    \b
    pellucid observe -f --verdict Block
    pellucid observe --pod shop/cart --since 5m -o wide
    pellucid observe --file flows.jsonl --name '*.example.com' -o json | jq .destination

    \b
    Exit status: 0 done, or ended by Ctrl-C, 1 failed: the agent refused, or a file cannot be read
                 2 nothing runs with this state folder, the agent ended, or wrong usage
    """
    from pellucid_proxy.agent.status import NotRunning

    wanted = FlowFilter(
        verdicts=frozenset(verdict), pods=frozenset(pod), namespaces=frozenset(namespace), policies=frozenset(policy),
        rules=frozenset(rule), names=tuple(_checked("--name", _pattern, name)), networks=_networks(to),
        ports=tuple(_checked("--port", port_range, port)),
        since=next(iter(_checked("--since", lambda text: since(text, dt.datetime.now(dt.UTC)), (since_,) if since_ else ())), None),
    )  # fmt: skip
    if last is None and since_ is None:
        last = 0 if follow else DEFAULT_LAST
    shown = _Shown(wanted, last, printer(output))
    try:
        shown.all_of(_lines(file, state, history=last != 0, follow=follow))
    except KeyboardInterrupt:
        shown.finish()
    except BrokenPipeError:  # head, or a pager that was left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except NotRunning as err:
        shown.finish()
        click.echo(f"Error: {err}. Cure: {err.cure}.", err=True)
        ctx.exit(NOBODY_TO_ASK)
    ctx.exit(SHOWN)


def _lines(file: str | None, state: str, *, history: bool, follow: bool) -> Iterator[Line]:
    from ..flow_source import from_file, from_node

    if file is not None:
        return from_file(file, follow=follow)
    return from_node(
        state, history=history, follow=follow, said=lambda recorded, path: _say(recorded, path, follow), lost=_lost
    )


def _say(recorded: bool, path: str | None, follow: bool) -> None:
    """What the reader should know of what is not shown."""
    if not recorded:
        more = (
            "records begin now"
            if follow
            else "records are made only while somebody observes (-f), and these are what is left of that"
        )
        click.echo(f"The node runs without --flows: {more}.", err=True)
    elif path not in (None, "-") and not follow:
        click.echo(f"These are the last ones; all are in {path} (--file).", err=True)


def _lost(count: int) -> None:
    click.secho(f"{count} flow{'s' * (count != 1)} not shown: this observer reads too slowly", fg="yellow", err=True)


class _Shown:
    """Prints what is wanted: of the past the last ones, then everything."""

    def __init__(self, wanted: FlowFilter, last: int | None, show: Callable[[bytes, Any], str]) -> None:
        self._wanted = wanted
        self._show = show
        self._waiting: deque[str] | None = None if last is None else deque(maxlen=last)
        self._bad = 0

    def all_of(self, lines: Iterator[Line]) -> None:
        for kind, text in lines:
            if kind == "live":
                self._print_waiting()
            else:
                self._take(text)
        self.finish()

    def finish(self) -> None:
        """Prints what still waits, and how much was no record."""
        self._print_waiting()
        if self._bad:
            click.echo(f"{self._bad} line{'s' * (self._bad != 1)} that are no flow records left out", err=True)
            self._bad = 0

    def _take(self, text: bytes) -> None:
        try:
            flow = json.loads(text)
            shown = self._show(text, flow) if self._wanted.wants(flow) else None
        except (ValueError, KeyError, TypeError):
            self._bad += 1
            return
        if shown is None:
            return
        if self._waiting is None:
            click.echo(shown)
        else:
            self._waiting.append(shown)

    def _print_waiting(self) -> None:
        waiting, self._waiting = self._waiting or (), None
        for text in waiting:
            click.echo(text)


def printer(output: str) -> Callable[[bytes, Any], str]:
    """What turns a record, as its line and as JSON's value, into what is shown. output: as of the option."""
    from ..records import flow_text, wide_text

    if output == "auto":
        output = "table" if sys.stdout.isatty() else "json"
    if output == "json":
        return lambda text, _flow: text.decode()
    return (lambda text, _flow: wide_text(text)) if output == "wide" else (lambda text, _flow: flow_text(text))


def _pattern(text: str) -> tuple[str, bool]:
    from pellucid_policy.domains import pattern

    try:
        return pattern(text)
    except ValueError as err:
        raise ValueError(f"{text} {err}") from err


def _checked(option: str, read: Callable[[str], T], texts: tuple[str, ...]) -> list[T]:
    """Raises click.BadParameter."""
    try:
        return [read(text) for text in texts]
    except ValueError as err:
        raise click.BadParameter(str(err), param_hint=option) from err


def _networks(texts: tuple[str, ...]) -> tuple[Any, ...]:
    import ipaddress

    return tuple(map(ipaddress.ip_network, texts))
