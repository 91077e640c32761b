"""Run contenders through scenarios, write one JSON line a measurement, and print the tables of bench.report. Needs root.

  python -m bench.run --list
  python -m bench.run -c direct,haproxy-force,pellucid -s conn64,down16 -r 3 -o results.jsonl

Within a repetition the contenders run in random order, each with fresh namespaces and fresh processes."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from bench import contenders, lab, policies, report
from bench.contenders import BENCH, CONF, ENVOY, PELLUCID, PYTHON, ROOT, WORK, Contender
from bench.results import load
from bench.scenarios import SCENARIOS
from bench.session import NotReadyError, Result, Session

QUIET_AGAIN_S = 1.5
Emit = Callable[[Result], None]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "bench.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-c", dest="contenders", metavar="NAMES", default="all", help="with commas between, or all (the default)"
    )
    parser.add_argument(
        "-s", dest="scenarios", metavar="NAMES", default="all", help="with commas between, or all (the default)"
    )
    parser.add_argument("-r", dest="repetitions", type=int, default=3, metavar="N", help="default 3; publish 8 or more")
    parser.add_argument("-o", dest="output", metavar="FILE", type=Path, help="append the lines to this file")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="of every contender that can have more than one (default 1)"
    )
    parser.add_argument(
        "--max-foreign", type=float, default=0.15, metavar="CPUS", help="others used more: noisy, measured again (0.15)"
    )
    parser.add_argument("--retries", type=int, default=2, metavar="N", help="of a noisy measurement (default 2)")
    parser.add_argument(
        "--pellucid",
        metavar="COMMAND",
        default=PELLUCID,
        help="shell command of Pellucid; README.md says what it is told",
    )
    parser.add_argument("--list", action="store_true", help="print contenders and scenarios")
    return parser.parse_args()


def chosen(text: str, known: dict[str, object]) -> list[str]:
    """The names in text, in the order of the table."""
    names = list(known) if text == "all" else text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"bench: unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return [name for name in known if name in names]


def print_list(table: dict[str, Contender]) -> None:
    print("contenders:", *table)
    print("scenarios:")
    for scenario in SCENARIOS.values():
        print(f"  {scenario.name:8} {scenario.title}")


def lock() -> IO[str]:
    """Hold the machine against other runs of this tree, for as long as the returned file is open."""
    WORK.mkdir(exist_ok=True)
    holder = (WORK / "lock").open("w")
    try:
        fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise SystemExit("bench: another run is under way") from None
    return holder


def prepare() -> None:
    """In the sandbox: policies and configurations of all contenders lie in lab.RUN."""
    policies.write_all(lab.RUN)
    shutil.copy(CONF / "hosts", lab.RUN)
    envoy = (CONF / "envoy.yaml").read_text().replace("@BLOCKED@", policies.envoy_server_names())
    (lab.RUN / "envoy.yaml").write_text(envoy)


def _version(command: str) -> str:
    """The version in a command's output, or its first line if it says none."""
    result = subprocess.run(
        command, check=False, shell=True, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode or not result.stdout.strip():
        return "unknown"
    found = re.search(r"\d+\.\d+(\.\d+)?[-+.\w]*", result.stdout)
    return found.group() if found else result.stdout.strip().splitlines()[0]


def _output(command: str) -> str:
    result = subprocess.run(command, check=False, shell=True, cwd=ROOT, capture_output=True, text=True)
    return " ".join(result.stdout.split()) if result.returncode == 0 else "unknown"


def machine(options: argparse.Namespace) -> Result:
    """What the figures belong to."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "unknown",
    )
    own = PELLUCID.split(" run ")[0].replace("exec ", "")
    return {
        "machine": {
            "kernel": platform.release(),
            "cpu": model,
            "cpus": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
        },
        "congestion_control": lab.CONGESTION_CONTROL,
        "workers": options.workers,
        "commit": _output("git describe --always --dirty"),
        "versions": {
            "haproxy": _version("haproxy -v"),
            "nginx": _version("nginx -v"),
            "envoy": _version(f"{ENVOY} --version | grep -o [0-9.]*/Clean"),
            "squid": _version("squid -v"),
            "mitmproxy": _version(f"{PYTHON} -m pip show mitmproxy | grep ^Version"),
            "pellucid": _output(f"{own} --version") if options.pellucid == PELLUCID else options.pellucid,
        },
    }


def progress(result: Result) -> str:
    """A line for whoever watches the run."""
    if "machine" in result:
        return f"commit {result['commit']}, {result['congestion_control']}, {result['workers']} worker(s)"
    where = f"{result['repetition'] + 1:3} {result['contender']:18}"
    if "error" in result:
        return f"{where} {result['error']} {result.get('log', '')}"
    figure = SCENARIOS[result["scenario"]].figures[0]
    value = result.get(figure.key, result.get("failed", "no figure"))
    return f"{where} {result['scenario']:7} {value} {figure.heading}" + (
        f" (noisy: {result['foreign']} CPUs)" if result["noisy"] else ""
    )


def run_contender(
    contender: Contender, names: list[str], repetition: int, options: argparse.Namespace, emit: Emit
) -> None:
    """All scenarios of one contender in namespaces of their own; a noisy measurement is repeated, each try is emitted."""
    with Session(contender, options.workers) as session:
        try:
            session.wait_until_ready()
        except NotReadyError as error:
            emit(
                {
                    "contender": contender.name,
                    "repetition": repetition,
                    "error": f"not ready: {error}",
                    "log": session.log()[-800:],
                }
            )
            return
        session.warm_up()
        for name in names:
            for attempt in range(options.retries + 1):
                result = session.measure(SCENARIOS[name])
                noisy = result["foreign"] > options.max_foreign
                emit(result | {"repetition": repetition, "try": attempt, "noisy": noisy})
                if not noisy:
                    break
                time.sleep(QUIET_AGAIN_S)


def run_all(table: dict[str, Contender], options: argparse.Namespace, emit: Emit) -> None:
    names = chosen(options.contenders, dict(table))
    wanted = chosen(options.scenarios, dict(SCENARIOS))
    for repetition in range(options.repetitions):
        random.Random(repetition).shuffle(names)
        for name in names:
            contender = table[name]
            applicable = [
                scenario for scenario in wanted if contender.scenarios is None or scenario in contender.scenarios
            ]
            if not applicable:
                continue
            try:
                run_contender(contender, applicable, repetition, options, emit)
            except Exception as error:  # noqa: BLE001  one contender's failure must not lose the others' results
                emit({"contender": name, "repetition": repetition, "error": repr(error)})


def main() -> None:
    options = arguments()
    table = contenders.table(options.pellucid)
    if options.list:
        print_list(table)
        return
    holder = lock()
    subprocess.run([BENCH / "setup.sh"], check=True)
    run_id = time.strftime("%Y-%m-%dT%H:%M:%S")
    path: Path = (options.output or WORK / f"results-{run_id}.jsonl").absolute()
    with path.open("a") as output:

        def emit(result: Result) -> None:
            print(json.dumps({"run": run_id} | result), file=output, flush=True)
            print(progress(result), flush=True)

        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        emit(machine(options))
        lab.enter_sandbox()
        prepare()
        run_all(table, options, emit)
    holder.close()
    print(f"\n{report.document(load([path]))}\n\nresults: {path}")


if __name__ == "__main__":
    main()
