"""`pellucid uninstall`."""

from __future__ import annotations

import click


@click.command(name="uninstall")
@click.option(
    "--namespace", envvar="POD_NAMESPACE", show_envvar=True, required=True, metavar="NS", help="Pellucid's own."
)
@click.option("--deployment", default="pellucid-operator", show_default=True, metavar="NAME", help="The operator's.")
@click.option(
    "--timeout", type=click.FloatRange(1), default=120.0, show_default=True, metavar="SECONDS", help="For the nodes."
)
@click.pass_context
def command(ctx: click.Context, namespace: str, deployment: str, timeout: float) -> None:
    """Take Pellucid off the nodes of a cluster, before its chart goes.

    The chart's hook does. Stops the operator, deletes the DaemonSets, and waits until each node has taken its rules away; policies and
    their kinds stay.

    \b
    pellucid uninstall --namespace pellucid-system     # by hand: helm uninstall --no-hooks did not

    \b
    Exit status: 0 nothing of it is on any node, 1 something is left, and is named, or the cluster cannot be asked
    """
    import logging

    from pellucid_operator.cluster import Cluster, Refused
    from pellucid_operator.uninstall import uninstall

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        ctx.exit(uninstall(Cluster(), namespace, deployment, timeout))
    except Refused as err:
        click.echo(f"Error: {err}", err=True)
        ctx.exit(1)
