"""The command `kubectl-pellucid`, which kubectl runs as `kubectl pellucid`."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import click

from ..arguments import auto_output_option, wants_json
from ..commands.lint import command as lint
from ..commands.version import command as version
from ..main import CONTEXT
from ..paper import Paper
from .cluster import Cluster, NotThere
from .status import NODE_HEADER, POLICY_HEADER, Told, told

GOOD, NOT_GOOD, NO_CLUSTER = 0, 1, 2
ASK_AGAIN_S = 0.5
PASSED_ON = {"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []}


@click.group(
    context_settings=CONTEXT, epilog="Each command's --help says more; `pellucid --help` has what works on one machine."
)
@click.option("--context", metavar="NAME", help="Of the kubeconfig.")
@click.option("--kubeconfig", type=click.Path(exists=True, dir_okay=False), metavar="FILE", help="Another kubeconfig.")
@click.option("--as", "as_", metavar="USER", help="Ask as another user.")
@click.option(
    "--pellucid-namespace", "namespace", default="pellucid-system", show_default=True, metavar="NS",
    envvar="PELLUCID_NAMESPACE", show_envvar=True, help="Where Pellucid is installed.",
)  # fmt: skip
@click.pass_context
def main(ctx: click.Context, context: str | None, kubeconfig: str | None, as_: str | None, namespace: str) -> None:
    """Pellucid in a cluster: what is enforced, what becomes of a flow and why, flows as they end.

    \b
    kubectl pellucid status --wait 60
    kubectl pellucid explain shop/cart 192.0.2.10:443 --sni api.example.com
    kubectl pellucid observe -f --verdict Block
    kubectl pellucid preflight
    kubectl pellucid lint policies/
    """
    if os.environ.get("NO_COLOR"):  # https://no-color.org
        ctx.color = False
    given = (("--context", context), ("--kubeconfig", kubeconfig), ("--as", as_))
    ctx.obj = Cluster(tuple(f"{name}={value}" for name, value in given if value), namespace)


@main.command()
@click.option(
    "--wait",
    type=click.FloatRange(0),
    default=0.0,
    metavar="SECONDS",
    help="Ask again, for so long, until all is well.",
)
@auto_output_option
@click.pass_context
def status(ctx: click.Context, wait: float, output: str) -> None:
    """Show whether every node enforces every policy, and if not, why.

    \b
    Exit status: 0 it does
                 1 not: a node or a policy is not as it should be; each is named with the reason
                 2 the cluster cannot be asked, or Pellucid is not installed
    """
    deadline = time.monotonic() + wait
    while True:
        found = _asked(ctx.obj)
        left = deadline - time.monotonic()
        if found.good or left <= 0:
            break
        time.sleep(min(ASK_AGAIN_S, left))
    if wants_json(output):
        click.echo(json.dumps({
            "enforced": found.good, "why": found.why,
            "nodes": [dict(zip(NODE_HEADER, row, strict=True)) for row in found.nodes],
            "policies": [dict(zip(POLICY_HEADER, row, strict=True)) for row in found.policies],
        }, indent=2))  # fmt: skip
    else:
        _print(found)
    ctx.exit(GOOD if found.good else NOT_GOOD)


def _asked(cluster: Cluster) -> Told:
    snapshots = cluster.objects("transparentsnapshots.pellucid.dev", "--field-selector=metadata.name=current")
    offered = snapshots[0]["spec"]["index"]["revision"] if snapshots else ""
    policies = cluster.objects("transparentpolicies.pellucid.dev", "-A") + cluster.objects(
        "clustertransparentpolicies.pellucid.dev"
    )
    return told(cluster.node_pods(), cluster.objects("transparentnodes.pellucid.dev"), policies, offered)


def _print(found: Told) -> None:
    paper = Paper()
    paper.table(NODE_HEADER, found.nodes)
    if found.policies:
        paper.line("")
        paper.table(POLICY_HEADER, found.policies)
    paper.line("")
    for line in found.why:
        paper.bad(line)
    if found.good:
        paper.good(f"{len(found.policies)} policies are enforced on {len(found.nodes)} nodes")


@main.command(context_settings=PASSED_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def explain(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """Explain what becomes of a flow of a pod: as `pellucid explain`, answered by the node that the pod runs on."""
    cluster: Cluster = ctx.obj
    if not arguments or "--help" in arguments or "-h" in arguments:
        ctx.exit(_own("explain", "--help"))
    pods = cluster.node_pods()
    namespace, slash, name = arguments[0].partition("/")
    if not slash:
        raise click.UsageError("The first argument is the pod, as NAMESPACE/NAME.", ctx)
    pod = cluster.objects("pod", "-n", namespace, name)[0]
    node = pod["spec"].get("nodeName", "")
    if node not in pods:
        raise NotThere(
            f"no pod of Pellucid runs on node {node or 'none yet'}, where {namespace}/{name} runs. Cure: `kubectl pellucid status`."
        )
    colour = ["--output", "text"] if sys.stdout.isatty() and not {"-o", "--output"} & set(arguments) else []
    stdin = "-" in arguments
    os.execvp(*_as_program(cluster.inside(pods[node], ["pellucid", "explain", *arguments, *colour], stdin=stdin)))


@main.command(context_settings=PASSED_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def observe(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """Show flows of all nodes as they end: as `pellucid observe`, with its filters and forms."""
    from ..commands.observe import printer

    if "--help" in arguments or "-h" in arguments:
        ctx.exit(_own("observe", "--help"))
    cluster: Cluster = ctx.obj
    output, passed = _output_of(arguments)
    asked = [
        subprocess.Popen(cluster.inside(pod, ["pellucid", "observe", *passed, "-o", "json"]), stdout=subprocess.PIPE)
        for pod in cluster.node_pods().values()
    ]
    show = printer(output)
    try:
        for line in _merged(asked):
            click.echo(show(line, json.loads(line)))
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:  # head, or a pager that was left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        for each in asked:
            each.terminate()
    ctx.exit(max((each.wait() for each in asked if each.poll() not in (None, -15)), default=0))


def _output_of(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The form that is asked for, and the other arguments."""
    passed = list(arguments)
    for at, each in enumerate(passed):
        if each in ("-o", "--output") and at + 1 < len(passed):
            output = passed[at + 1]
            del passed[at : at + 2]
            return output, passed
        if each.startswith(("--output=", "-o=")):
            del passed[at]
            return each.partition("=")[2], passed
    return "auto", passed


def _merged(asked: Sequence[subprocess.Popen[bytes]]) -> Iterator[bytes]:
    """The lines of all processes as they come, until all have ended."""
    lines: queue.Queue[bytes | None] = queue.Queue(maxsize=10_000)

    def read(process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line.rstrip(b"\n"))
        lines.put(None)

    for each in asked:
        threading.Thread(target=read, args=(each,), daemon=True).start()
    running = len(asked)
    while running:
        line = lines.get()
        if line is None:
            running -= 1
        else:
            yield line


@main.command()
@auto_output_option
@click.pass_context
def preflight(ctx: click.Context, output: str) -> None:
    """Ask every node that has a pod of Pellucid what could hinder the proxy there: as `pellucid preflight`.

    That port, table and state folder are in use is no fault here: it is by the pod that is asked.

    \b
    Exit status: 0 nothing does
                 3 a node cannot carry it: no rights, an old kernel or nft, a mark or table taken
    """
    from ..commands.preflight import FIT, TAKEN

    cluster: Cluster = ctx.obj
    worst, said = GOOD, {}
    for node, pod in sorted(cluster.node_pods().items()):
        command = ["pellucid", "preflight", "-o", "json" if wants_json(output) else "text"]
        done = subprocess.run(cluster.inside(pod, command), capture_output=True, text=True, check=False)
        worst = max(worst, done.returncode if done.returncode not in (FIT, TAKEN) else GOOD)
        said[node] = _json_of(done.stdout) if wants_json(output) else done.stdout + done.stderr
    if wants_json(output):
        click.echo(json.dumps(said, indent=2))
    else:
        for node, text in said.items():
            Paper().heading(node)
            click.echo(text.rstrip())
    ctx.exit(worst)


def _json_of(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _own(command: str, *arguments: str) -> int:
    """The command of the same name for one machine."""
    return subprocess.run([sys.executable, "-m", "pellucid_cli", command, *arguments], check=False).returncode


def _as_program(command: list[str]) -> tuple[str, list[str]]:
    return command[0], command


main.add_command(lint)
main.add_command(version)
