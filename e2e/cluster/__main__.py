"""A real Kubernetes on this machine, without Docker: a control plane and workers in namespaces, an internet behind them. Needs root.

python3 -m e2e.cluster up               start it; prints the KUBECONFIG and how to reach it
python3 -m e2e.cluster kubectl get pods -A
python3 -m e2e.cluster in n1 nft list ruleset
python3 -m e2e.cluster on internet python3 -m http.server      in that network namespace: a node, lan or internet
python3 -m e2e.cluster image             make Pellucid's image of this tree, and have it on all nodes
python3 -m e2e.cluster reboot n2
python3 -m e2e.cluster down             nothing of it is left but what was built
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from . import control, machine, product, programs
from .plan import PROXY_MODES, Plan


def main() -> int:
    options = _options()
    where = Plan(options.name, options.folder.absolute(), Path(), options.workers, options.proxy_mode)
    try:
        plan = Plan(where.prefix, where.folder, programs.built(), where.workers, where.proxy_mode)
        match options.command:
            case "up":
                control.up(plan)
            case "down":
                control.down(plan)
            case "status":
                return status(plan)
            case "image":
                print(product.image())
                control.load(plan, [product.made(plan.folder / "images")])
            case "load":
                control.load(plan, [Path(each).absolute() for each in options.rest])
            case "kubectl" | "helm" as program:
                _exec(
                    control.outside(plan, plan.control_plane.name, [str(plan.programs / program), *options.rest]), plan
                )
            case "in":
                _exec(machine.inside(plan, options.rest[0], options.rest[1:]), plan)
            case "on":
                _exec(control.outside(plan, options.rest[0], options.rest[1:]), plan)
            case "reboot" | "start" | "stop" as what:
                for name in options.rest:
                    getattr(machine, what)(plan, next(each for each in plan.nodes if each.name == name))
    except (programs.NotBuilt, machine.NotRunning, RuntimeError, TimeoutError) as err:
        print(f"Error: {err}", file=sys.stderr)
        return 1
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "e2e.cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="pe2e", help="prefix of the network namespaces (default pe2e)")
    parser.add_argument("--folder", type=Path, default=Path("build/e2e"), help="of all files (default build/e2e)")
    parser.add_argument("--workers", type=int, default=2, choices=range(1, 10), metavar="N", help="1 to 9 (default 2)")
    parser.add_argument("--proxy-mode", choices=PROXY_MODES, default="nftables", help="of kube-proxy")
    commands = ("up", "down", "status", "image", "load", "kubectl", "helm", "in", "on", "reboot", "start", "stop")
    parser.add_argument("command", choices=commands)
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    return parser.parse_args()


def status(plan: Plan) -> int:
    """0: all nodes run."""
    missing = 0
    for node in plan.nodes:
        try:
            print(f"{node.name}: runs, process {machine.pid_of(plan, node.name)}")
        except machine.NotRunning as err:
            missing += 1
            print(f"{node.name}: {err}")
    if not missing:
        print(control.kubectl(plan, "get", "nodes", "-o", "wide"))
    return 1 if missing else 0


def _exec(command: list[str], plan: Plan) -> None:
    os.execvpe(command[0], command, control.environment(plan))


if __name__ == "__main__":
    sys.exit(main())
