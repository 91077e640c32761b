"""`pellucid cleanup`."""

from __future__ import annotations

import click

from ..arguments import auto_output_option, state_option, wants_json

CLEAN, FAILED = 0, 1


@click.command(name="cleanup")
@state_option
@auto_output_option
@click.pass_context
def command(ctx: click.Context, state: str, output: str) -> None:
    """Take away what a run that was killed has left.

    That is nft table, ip rules and routes, sysctls of connection tracking, and the socket of its state folder. Pods with
    failureMode Closed are refused until then, and pass afterwards; live connections are left alone, and the last good
    policy stays. Refuses while an instance runs, with this state folder or another.

    \b
    pellucid cleanup

    \b
    Exit status: 0 nothing is left
                 1 an instance runs, or the kernel refused
                 2 wrong usage
    """
    import msgspec

    from pellucid_proxy.agent.cleanup import cleanup
    from pellucid_proxy.kernel.apply import KernelError
    from pellucid_proxy.supervisor.options import Refusal

    try:
        removed = cleanup(state)
    except (Refusal, KernelError) as err:
        if wants_json(output):
            click.echo(msgspec.json.format(msgspec.json.encode({"error": str(err)})).decode())
        else:
            click.echo(f"Error: {err}", err=True)
        ctx.exit(FAILED)
    if wants_json(output):
        click.echo(msgspec.json.format(msgspec.json.encode({"removed": removed})).decode())
    elif removed:
        click.echo("\n".join(f"removed {each}" for each in removed))
    else:
        click.echo("nothing was left")
    ctx.exit(CLEAN)
