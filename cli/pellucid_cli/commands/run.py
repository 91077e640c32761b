"""`pellucid run`."""

from __future__ import annotations

import os

import click

from ..arguments import ADDRESS_PORT, NETWORK, state_option


@click.command(name="run")
@click.option(
    "--policy",
    type=click.Path(file_okay=False),
    default="",
    metavar="DIR",
    help="Folder of YAML files: policies, and Pod and Namespace objects. Watched; a change is taken as a whole or refused "
    "as a whole, and the last good policy then stays in force.",
)
@click.option(
    "--cluster",
    is_flag=True,
    help="Instead of a folder, follow the API server of the cluster whose node this is, as a pod with a service account: what the "
    "operator compiled, and the node's own pods. Needs --node.",
)
@click.option(
    "--scope",
    type=NETWORK,
    multiple=True,
    metavar="CIDR",
    help="Addresses that are pods; several times for several. [default: podCIDRs of the folder's TransparentProxy object; "
    "one of the two must say]",
)
@state_option
@click.option(
    "--metrics", type=ADDRESS_PORT, metavar="ADDR:PORT", help="Serve Prometheus metrics and health here. [default: no]"
)
@click.option(
    "--flows",
    type=click.Path(dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="Append one JSON line a flow; - is standard output. SIGHUP reopens it. [default: no]",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 1024),
    metavar="N",
    help="Processes that carry connections. [default: what TransparentProxy says, or else one a core]",
)
@click.option(
    "--node",
    default="",
    metavar="NAME",
    help="This node's name, as pods and records name it. [default: the host's name]",
)
@click.option(
    "--instance",
    default="",
    envvar="PELLUCID_INSTANCE",
    show_envvar=True,
    metavar="NAME",
    help="What this run is called among those that take each other's place. [default: its process id]",
)
@click.option(
    "--source-address",
    type=click.Choice(["Pod", "Node"]),
    help="Whose address servers see. [default: what TransparentProxy says, or else Pod]",
)
@click.option(
    "--drain",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long live connections may go on after the first SIGTERM or Ctrl-C. A second one ends at once.",
)
@click.option(
    "--takeover",
    is_flag=True,
    help="Take the place of the instance that runs with the same --state, if one does: it hands over its sockets, and its live "
    "connections go on in its processes until they end. If this one does not come to enforce, the other goes on.",
)
@click.option(
    "--handover-drain",
    type=click.FloatRange(0),
    default=86400.0,
    show_default=True,
    metavar="SECONDS",
    help="How long live connections may go on after another instance has taken this one's place.",
)
@click.option(
    "--allow-dial",
    type=NETWORK,
    multiple=True,
    metavar="CIDR",
    help="Take this off the list of what is never dialled for a pod (cloud metadata, loopback, the node's own addresses).",
)
@click.option(
    "--worker-user",
    default="",
    metavar="USER",
    help="Whose workers are when root runs this: a name, UID or UID:GID; `same`: root's. [default: pellucid-worker where that "
    "user exists, else 61001]",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False),
    default="info",
    show_default=True,
    help="What standard error shows, one line an event.",
)
@click.pass_context
def command(
    ctx: click.Context,
    policy: str,
    cluster: bool,
    scope: tuple[str, ...],
    state: str,
    metrics: str | None,
    flows: str | None,
    workers: int | None,
    node: str,
    instance: str,
    source_address: str | None,
    drain: float,
    takeover: bool,
    handover_drain: float,
    allow_dial: tuple[str, ...],
    worker_user: str,
    log_level: str,
) -> None:
    """Run the proxy on this machine, by the policy files of a folder or as a node of a cluster.

    Takes the TCP connections that come from --scope, decides each by the policy, and relays, routes or refuses it. Needs
    the rights to change nftables and routes (root, or CAP_NET_ADMIN and CAP_NET_RAW). Kernel rules appear only when the
    policy is good and the workers are ready; they go again when this ends in order. If it is killed instead they stay: pods
    of policies with failureMode Closed are then refused, all others pass.

    \b
    pellucid run --policy examples/quickstart --scope 10.244.0.0/16
    pellucid run --policy /etc/pellucid --metrics 127.0.0.1:9090 --flows /var/log/pellucid/flows.json
    pellucid run --takeover --policy /etc/pellucid …   # a new version, without a lost connection
    pellucid run --takeover --cluster --node "$NODE_NAME" --state /var/lib/pellucid

    \b
    Exit status: 0 stopped on request
                 1 failed: another instance, a port taken, a process of it died
                 2 wrong usage, or the policy was bad at the start
                 3 this machine cannot: no rights, an old kernel or nft, a mark or table taken
    """
    from pellucid_proxy.supervisor import RunOptions, run
    from pellucid_proxy.supervisor.options import LAST_GOOD

    if bool(policy) == cluster:
        raise click.UsageError("Where does the policy come from? Give --policy DIR or --cluster, and not both.", ctx)
    if cluster and not node:
        raise click.UsageError("--cluster needs --node: the name of the Node object of this machine.", ctx)
    if policy and not os.path.isdir(policy) and not os.path.exists(os.path.join(state, LAST_GOOD)):
        raise click.BadParameter(f"Directory '{policy}' does not exist.", ctx, param_hint="'--policy'")
    options = RunOptions(
        policy=policy,
        cluster=cluster,
        scope=scope,
        state=state,
        metrics=metrics,
        flows=flows,
        drain_s=drain,
        node=node,
        instance=instance,
        workers=workers,
        source_address=source_address,
        allow_dial=allow_dial,
        takeover=takeover,
        handover_drain_s=handover_drain,
        worker_user=worker_user,
        log_level=log_level.upper(),
    )
    ctx.exit(run(options))
