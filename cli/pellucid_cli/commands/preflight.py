"""`pellucid preflight`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..arguments import NETWORK, auto_output_option, state_option, wants_json

if TYPE_CHECKING:
    from pellucid_proxy.kernel.preflight import Finding
    from pellucid_proxy.settings import NodeSettings

FIT, TAKEN, WRONG, UNFIT = 0, 1, 2, 3


@click.command(name="preflight")
@click.option(
    "--policy",
    type=click.Path(exists=True, file_okay=False),
    metavar="DIR",
    help="The folder that `pellucid run` would get: its TransparentProxy object may say scope and marks.",
)
@click.option(
    "--scope",
    type=NETWORK,
    multiple=True,
    metavar="CIDR",
    help="Addresses that are pods, as for `run`. [default: those of the running instance]",
)
@state_option
@auto_output_option
@click.pass_context
def command(ctx: click.Context, policy: str | None, scope: tuple[str, ...], state: str, output: str) -> None:
    """Say whether this machine can run the proxy, and if not, why, before anything is changed.

    Looks at rights, kernel, nft, marks, ip rules, routes, tables, the port, sysctls, bridges and other transparent
    proxies. It needs the rights that `pellucid run` needs, and changes nothing.

    \b
    pellucid preflight --scope 10.244.0.0/16
    pellucid preflight --policy /etc/pellucid -o json | jq '.findings[].what'

    \b
    Exit status: 0 it can; warnings and notes may be there
                 1 it could, but somebody else has what is needed now: another instance, the port
                 2 wrong usage, or the policy folder is bad
                 3 it cannot: no rights, an old kernel or nft, a mark or table taken
    """
    from pellucid_proxy.kernel.preflight import Severity, preflight
    from pellucid_proxy.supervisor.options import Refusal

    try:
        settings = _settings(policy, scope, state)
    except Refusal as refusal:
        click.echo(f"Error: {refusal}", err=True)
        ctx.exit(WRONG)
    findings = preflight(settings)
    errors = [finding for finding in findings if finding.severity is Severity.ERROR]
    if wants_json(output):
        click.echo(_json(settings, findings, fit=not errors))
    else:
        _print(settings, findings, fit=not errors)
    ctx.exit(FIT if not errors else TAKEN if all(finding.taken for finding in errors) else UNFIT)


def _settings(policy: str | None, scope: tuple[str, ...], state: str) -> NodeSettings:
    """What `pellucid run` would run with. Raises Refusal."""
    from pellucid_proxy.agent.node_settings import Wishes, node_settings
    from pellucid_proxy.agent.policy import BadPolicy, accept_folder
    from pellucid_proxy.supervisor.options import Refusal, RunOptions

    wishes = Wishes()
    if policy is not None:
        try:
            wishes = accept_folder(policy).wishes
        except BadPolicy as bad:
            raise Refusal("\n".join(bad.problems)) from bad
    if policy is None and not scope:
        scope = _scope_of_running(state)
    return node_settings(RunOptions(policy=policy or "", scope=scope), wishes)


def _scope_of_running(state: str) -> tuple[str, ...]:
    """Of the instance that runs with that state folder; nothing if none does."""
    from pellucid_proxy.agent.status import NotRunning, read_status

    try:
        return read_status(state).scope
    except NotRunning:
        return ()


def _json(settings: NodeSettings, findings: list[Finding], *, fit: bool) -> str:
    import msgspec

    answer = {
        "fit": fit,
        "scope": settings.scope,
        "table": settings.table,
        "findings": [{"severity": f.severity.value, "what": f.what, "cure": f.cure} for f in findings],
    }
    return msgspec.json.format(msgspec.json.encode(answer)).decode()


def _print(settings: NodeSettings, findings: list[Finding], *, fit: bool) -> None:
    colours = {"error": "red", "warning": "yellow", "note": "cyan"}
    for finding in findings:
        severity = finding.severity.value
        click.echo(f"{click.style(f'{severity:<8}', fg=colours[severity])} {finding.what}")
        if finding.cure:
            click.echo(f"{'':<8} Cure: {finding.cure}.")
    said = "This machine can run the proxy" if fit else "This machine cannot run the proxy"
    click.echo(click.style(f"{said}, for {', '.join(settings.scope)}", fg="green" if fit else "red", bold=True))
