"""`pellucid operator`."""

from __future__ import annotations

import click

from ..arguments import ADDRESS_PORT


@click.command(name="operator")
@click.option(
    "--namespace", envvar="POD_NAMESPACE", show_envvar=True, required=True, metavar="NS", help="Pellucid's own."
)
@click.option(
    "--wanted", type=click.Path(file_okay=False), default="/etc/pellucid", show_default=True, metavar="DIR",
    help="What is to be made, one object a file: DaemonSets, to which TransparentProxy default adds placement, images and settings, "
    "and perhaps that itself.",
)  # fmt: skip
@click.option("--deployment", default="", metavar="NAME", help="The operator's own, which the DaemonSets go with.")
@click.option(
    "--probe",
    type=ADDRESS_PORT,
    default="0.0.0.0:8080",
    show_default=True,
    metavar="ADDR:PORT",
    help="/healthz is served here.",
)
@click.option(
    "--metrics",
    type=ADDRESS_PORT,
    default="0.0.0.0:9465",
    show_default=True,
    metavar="ADDR:PORT",
    help="Prometheus metrics.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False),
    default="info",
    show_default=True,
)
@click.pass_context
def command(
    ctx: click.Context, namespace: str, wanted: str, deployment: str, probe: str, metrics: str, log_level: str
) -> None:
    """Run the operator of a cluster: policies into snapshots, DaemonSets, statuses.

    The chart's Deployment does. Compiles all policies into the snapshot that nodes enforce, keeps the DaemonSets as TransparentProxy
    default wants them, and tells each policy's status. Nodes go on by the last snapshot while it is away.

    \b
    pellucid operator --namespace pellucid-system --wanted ./wanted   # by the kubeconfig, to try it

    \b
    Exit status: 0 stopped on request, 1 the cluster cannot be asked, 2 wrong usage, or nothing to make
    """
    from pellucid_operator.main import Options, run

    ctx.exit(run(Options(namespace, wanted, deployment, probe, metrics, log_level.upper())))
