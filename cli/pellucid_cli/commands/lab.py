"""`pellucid lab`."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..arguments import auto_output_option, wants_json
from ..fault import Fault

if TYPE_CHECKING:
    from pellucid_policy.objects import Objects

    from ..lab.instance import Instance
    from ..lab.scene import Scene

_LOOK_S = 0.1


@click.command(name="lab")
@click.option(
    "--policy",
    type=click.Path(exists=True, file_okay=False, resolve_path=True),
    metavar="DIR",
    help="Run by this folder instead of the lab's own; its Pod objects with addresses in 10.244.1.0/24 or fd00:244:1::/64 are "
    "built. Edit it and watch the verdicts change.",
)
@click.option(
    "--pods", type=click.IntRange(1, 100), default=3, show_default=True, metavar="N", help="At least so many pods."
)
@click.option("--seconds", type=click.FloatRange(0), metavar="N", help="End by itself. [default: at Ctrl-C]")
@click.option(
    "--shell",
    metavar="POD",
    help="Open a shell in this pod; the lab ends with it. Flows then go to $PELLUCID_FLOWS only.",
)
@click.option("--traffic/--no-traffic", default=True, show_default=True, help="Have the pods visit the servers.")
@auto_output_option
@click.pass_context
def command(
    ctx: click.Context,
    policy: str | None,
    pods: int,
    seconds: float | None,
    shell: str | None,
    traffic: bool,
    output: str,
) -> None:
    """See it work: pods, a node and servers in network namespaces, with live flows.

    The proxy runs in the node as `pellucid run` would on yours. Everything lives in namespaces of this process: nothing of
    the machine is touched, nothing stays. No root needed where users may make namespaces.

    \b
    pellucid lab                                 watch verdicts; edit the policy it names, and see
    pellucid lab --shell cart                    be a pod: there is web at 192.0.2.10
    pellucid lab --seconds 5 -o json | jq .verdict

    \b
    Exit status: 0 ended by --seconds, the shell or Ctrl-C, 1 the lab or the proxy could not start, 2 wrong usage
    """
    from ..lab.sandbox import SandboxError, enter

    outside = _user_namespace()
    try:
        enter()
    except SandboxError as err:
        what, _, cure = str(err).partition("; ")
        raise Fault("lab", what.removeprefix("sandbox: "), cure or "run as root") from err
    signal.signal(signal.SIGTERM, _stop)
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pellucid-lab-")))
        manifests = Path(policy) if policy else _own_policy(folder)
        objects = _objects(manifests)
        scene = _scene(objects, pods, stack)
        if shell is not None and shell not in scene.topology.pods:
            raise Fault("--shell", f"there is no pod {shell}", f"take one of {', '.join(scene.topology.pods)}")
        instance = _instance(scene, manifests, folder, stack)
        if traffic:
            from ..lab.visitors import Visitors, names_in

            stack.enter_context(Visitors(scene, names_in(objects)))
        if shell is not None:
            _shell(scene, shell, instance)
        else:
            _introduce(scene, manifests, instance, own_users=_user_namespace() != outside)
            _watch(instance, seconds, wants_json(output))
    ctx.exit(0)


def _stop(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def _own_policy(folder: Path) -> Path:
    """A copy of the lab's policy, to be edited."""
    from ..lab.scene import POLICY

    return Path(shutil.copytree(POLICY, folder / "policy"))


def _objects(manifests: Path) -> Objects:
    """Raises Fault with every problem of the folder."""
    from pellucid_policy.objects import Objects
    from pellucid_policy.parse import parse_files
    from pellucid_proxy.agent.source_files import UnreadableFolder, read_folder

    try:
        found = parse_files({file.path: file.content for file in read_folder(str(manifests))})
    except UnreadableFolder as err:
        raise Fault("--policy", str(err), "give a folder of manifests") from err
    if isinstance(found, Objects):
        return found
    click.echo("\n".join(map(str, found)), err=True)
    raise Fault(
        "--policy", f"{manifests} is no policy", f"mend what is said above; `pellucid lint {manifests}` says it again"
    )


def _scene(objects: Objects, pods: int, stack: contextlib.ExitStack) -> Scene:
    from ..lab.scene import Scene, pods_for

    return stack.enter_context(Scene(pods_for(objects, pods)))


def _instance(scene: Scene, manifests: Path, folder: Path, stack: contextlib.ExitStack) -> Instance:
    from ..lab.instance import Instance, NotReady

    try:
        return stack.enter_context(Instance(scene.topology.node, manifests, folder, scope=scene.scope))
    except NotReady as err:
        raise Fault("lab", str(err), "see the log above") from err


def _introduce(scene: Scene, manifests: Path, instance: Instance, *, own_users: bool) -> None:
    """On standard error, so that a pipe gets flows alone."""
    pods = ", ".join(f"{name} {' '.join(pod.addresses)}" for name, pod in scene.topology.pods.items())
    servers = ", ".join(f"{name} {' '.join(server.addresses)}" for name, server in scene.topology.servers.items())
    own = "--user --preserve-credentials " if own_users else ""
    enter = (
        f"nsenter --target {os.getpid()} {own}--mount nsenter --net=/run/netns/{next(iter(scene.topology.pods))} $SHELL"
    )
    for name, value in (
        ("pods", pods),
        ("servers", servers),
        ("policy", f"{manifests}, edit it and watch"),
        ("enter", f"from another terminal: {enter}"),
        ("state", f"{instance.state}, for `pellucid status --state`"),
        ("end", "Ctrl-C"),
    ):
        click.echo(f"{click.style(f'{name:<9}', bold=True)}{value}", err=True)


def _user_namespace() -> str:
    """Names the user namespace of this process."""
    return os.readlink("/proc/self/ns/user")


def _watch(instance: Instance, seconds: float | None, as_json: bool) -> None:
    """Show flows as they are recorded, until the time is over or the proxy ends."""
    from ..records import Tail, flow_text

    until = float("inf") if seconds is None else time.monotonic() + seconds
    with contextlib.closing(Tail(instance.flows)) as tail:
        while True:
            last = time.monotonic() >= until
            for line in tail.lines():
                click.echo(line.decode() if as_json else flow_text(line))
            if last:
                return
            if not instance.running:
                raise Fault("lab", f"the proxy ended:\n{instance.log_end()}", "see its log above")
            time.sleep(_LOOK_S)


def _shell(scene: Scene, pod: str, instance: Instance) -> None:
    """A shell in the pod, until it is left."""
    click.echo(f"You are pod {pod}; the flows are in $PELLUCID_FLOWS; exit ends the lab.", err=True)
    shell = os.environ.get("SHELL") or "/bin/sh"
    environment = {**os.environ, "PELLUCID_FLOWS": str(instance.flows), "PS1": f"{pod}$ "}
    child = scene.pod(pod).popen([shell], stdin=sys.stdin.fileno(), env=environment)
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the shell's
    try:
        child.wait()
    finally:
        signal.signal(signal.SIGINT, previous)
