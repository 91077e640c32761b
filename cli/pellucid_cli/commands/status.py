"""`pellucid status`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from ..arguments import output_option, state_option

if TYPE_CHECKING:
    from pellucid_proxy.agent.status import NodeStatus

ENFORCING, NOT_ENFORCING, NO_INSTANCE = 0, 1, 2
_ASK_AGAIN_S = 0.1


@click.command(name="status")
@state_option
@output_option
@click.option(
    "--wait",
    type=click.FloatRange(0),
    default=0.0,
    metavar="SECONDS",
    help="Ask again, for so long, until it enforces what the folder holds.",
)
@click.option(
    "--ready", is_flag=True, help="Print nothing; is it enforcing, whatever became of the last change? For probes."
)
@click.option(
    "--instance",
    metavar="NAME",
    envvar="PELLUCID_INSTANCE",
    show_envvar=True,
    help="With --ready: and is it this one (`run --instance`), not one before or after it?",
)
@click.pass_context
def command(ctx: click.Context, state: str, output: str, wait: float, ready: bool, instance: str | None) -> None:
    """Show in one screen whether this machine enforces its policy.

    Enforcing means: kernel rules and every worker have the policy that lies in the folder. A node whose folder was made
    bad goes on with the last good policy; that is shown, and counts as not enforcing.

    \b
    pellucid status
    pellucid status --wait 10 -o json | jq .revision
    pellucid status --ready --instance "$POD_NAME"

    \b
    Exit status: 0 enforcing
                 1 not: starting, stopping, a worker is away, or the folder is refused
                 2 nothing runs with this state folder (or wrong usage)
    """
    found, why = _ask(state, wait)
    if ready and found is not None:
        own = instance is None or found.instance == instance
        if not own:
            click.echo(f"instance {found.instance} runs here, not {instance}", err=True)
        ctx.exit(ENFORCING if own and found.phase == "enforcing" else NOT_ENFORCING)
    if found is None:
        if output == "json":
            click.echo(_json({"error": why}))
        else:
            click.echo(f"Error: {why}. Cure: start `pellucid run`, or name its folder with --state.", err=True)
        ctx.exit(NO_INSTANCE)
    click.echo(_json(found) if output == "json" else _screen(found))
    ctx.exit(ENFORCING if _enforces(found) else NOT_ENFORCING)


def _ask(state: str, wait_s: float) -> tuple[NodeStatus | None, str]:
    """The node's status, the last one within wait_s unless it enforces before; or None and why."""
    from pellucid_proxy.agent.status import NotRunning, read_status

    deadline = time.monotonic() + wait_s
    while True:
        found, why = None, ""
        try:
            found = read_status(state)
        except NotRunning as err:
            why = str(err)
        left = deadline - time.monotonic()
        if left <= 0 or (found is not None and _enforces(found)):
            return found, why
        time.sleep(min(_ASK_AGAIN_S, left))


def _enforces(status: NodeStatus) -> bool:
    whole = all(worker.alive and worker.revision == status.revision for worker in status.workers)
    return status.phase == "enforcing" and not status.problems and not status.rules and whole


def _json(answer: object) -> str:
    import msgspec

    return msgspec.json.format(msgspec.json.encode(answer)).decode()


def _screen(status: NodeStatus) -> str:
    lines = [_first_line(status), ""]
    lines += [f"{name:<12}{value}" for name, value in _facts(status)]
    if status.policies:
        lines += ["", f"policies    {len(status.policies)}", *(f"  {each}" for each in status.policies)]
    if status.problems:
        lines += [
            "",
            click.style(f"problems    {len(status.problems)}", fg="red"),
            *(f"  {each}" for each in status.problems),
        ]
    if status.rules:
        lines += ["", click.style("kernel rules", fg="red"), *(f"  {each}" for each in status.rules)]
    if status.strains:
        lines += ["", click.style("limits", fg="yellow"), *(f"  {each}" for each in status.strains)]
    return "\n".join(lines)


def _first_line(status: NodeStatus) -> str:
    if _enforces(status):
        return click.style(f"Enforcing {status.folder}", fg="green", bold=True)
    if status.phase != "enforcing":
        said = f"Not enforcing: {status.phase}"
    elif status.problems:
        said = f"Enforcing the last good policy: what {status.folder} holds is refused"
    elif status.rules:
        said = "Enforcing, but somebody else changes the kernel rules again and again"
    else:
        said = "Enforcing, but not every worker has this policy"
    return click.style(said, fg="red", bold=True)


def _facts(status: NodeStatus) -> list[tuple[str, str]]:
    applied = (
        "" if status.last_apply_s is None else f", enforced {status.last_apply_s * 1000:.0f} ms after it was written"
    )
    workers = ", ".join(
        f"{worker.index}: " + (f"{worker.connections} connections" if worker.alive else "away")
        for worker in status.workers
    )
    dropped = f", {status.flows_dropped} dropped" if status.flows_dropped else ""
    return [
        ("node", f"{status.node}, process {status.pid}, up {_duration(status.uptime_s)}"),
        ("version", f"{status.version}, engine {status.engine_form}"),
        ("revision", f"{status.revision or 'none'} from {status.source}{applied}"),
        ("scope", ", ".join(status.scope)),
        ("pods", f"{status.pods} known, {status.groups} group{'s' * (status.groups != 1)} with policies"),
        ("connections", str(status.connections)),
        ("workers", workers or "none"),
        ("rights", _rights(status)),
        ("listen", ", ".join(status.listen)),
        ("metrics", status.metrics or "off"),
        ("flows", f"{status.flows}{dropped}" if status.flows else "off"),
    ]


def _rights(status: NodeStatus) -> str:
    """How the workers are confined; what is missing stands out."""
    user = f"user {status.worker_user[0]}, " if status.worker_user else ""
    if not status.unconfined:
        return f"workers: {user}NET_RAW alone, seccomp"
    return click.style(f"workers: {user}NET_RAW alone; without {'; without '.join(status.unconfined)}", fg="yellow")


def _duration(seconds: float) -> str:
    whole = int(seconds)
    for size, unit, lower, lower_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // lower} {lower_unit}"
    return f"{whole} s"
