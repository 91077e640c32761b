"""Run the fuzz targets and print executions, crashes and seconds. Exit status 1 if anything crashed.

Where atheris is (`make fuzz` sees to it) it makes the inputs, guided by coverage, and what it found goes on from run to run in
build/fuzz/found; otherwise fuzz.mutate makes them. An input that breaks a target is kept under build/fuzz/broken: move it into
fuzz/corpora/TARGET when it is mended.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import random
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
BROKEN = HERE.parent / "build" / "fuzz" / "broken"
FOUND = BROKEN.parent / "found"
TARGETS = sorted(folder.name for folder in (HERE / "corpora").iterdir() if folder.is_dir())
MAX_POOL = 2000


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fuzz.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=["all", *TARGETS], default="all")
    parser.add_argument(
        "--executions", type=positive, default=20000, metavar="N", help="of each target (default 20000)"
    )
    parser.add_argument(
        "--seed", type=int, default=1, metavar="S", help="the same seed gives the same inputs (default 1)"
    )
    parser.add_argument("--engine", choices=["auto", "atheris", "own"], default="auto", help="who makes the inputs")
    options = parser.parse_args(arguments)
    engine = options.engine
    if engine == "auto":
        engine = "atheris" if importlib.util.find_spec("atheris") else "own"
    run = with_atheris if engine == "atheris" else with_mutations
    crashes = 0
    print(
        f"{'target':<18}{'executions':>12}{'crashes':>9}{'seconds':>9}  {form()} form, inputs by {engine}", flush=True
    )
    for target in TARGETS if options.target == "all" else [options.target]:
        started = time.monotonic()
        executed, broken = run(target, options.executions, options.seed)
        crashes += broken
        print(f"{target:<18}{executed:>12}{broken:>9}{time.monotonic() - started:>9.1f}", flush=True)
    return 1 if crashes else 0


def form() -> str:
    """Which form of the parsers is run."""
    from pellucid_proxy.sniff import tls_hello

    return "uncompiled" if tls_hello.__file__.endswith(".py") else "compiled"


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return number


def seeds(target: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((HERE / "corpora" / target).iterdir())]


def with_mutations(target: str, executions: int, seed: int) -> tuple[int, int]:
    """Run every seed as it is, then mutations. An input that leads somewhere new joins the pool."""
    from fuzz.mutate import mutated
    from fuzz.targets import TARGETS as RUNS

    run = RUNS[target]
    choose = random.Random(seed)
    pool = seeds(target)
    waiting = pool[::-1]
    seen: set[str] = set()
    crashes: set[str] = set()
    for _ in range(executions):
        data = waiting.pop() if waiting else mutated(pool, choose)
        where = attempt(run, data)
        if where is None:
            crashes.add(keep(target, data))
        elif where not in seen:
            seen.add(where)
            if len(pool) < MAX_POOL:
                pool.append(data)
    return executions, len(crashes)


def attempt(run: Callable[[bytes], str], data: bytes) -> str | None:
    """Where the input led; None if it broke the target, which is printed."""
    try:
        return run(data)
    except Exception:  # noqa: BLE001 - whatever it is, it is what we look for
        traceback.print_exc()
        return None


def keep(target: str, data: bytes) -> str:
    BROKEN.mkdir(parents=True, exist_ok=True)
    path = BROKEN / f"{target}-{hashlib.sha256(data).hexdigest()[:16]}"
    path.write_bytes(data)
    print(f"{target} broke on {path}", file=sys.stderr)
    return path.name


def with_atheris(target: str, executions: int, seed: int) -> tuple[int, int]:
    """In a process of its own, for libFuzzer ends it."""
    found = FOUND / target
    for folder in (BROKEN, found):
        folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "fuzz.under_atheris", target, f"-runs={executions}", f"-seed={seed or 1}", "-max_len=20000",
        f"-artifact_prefix={BROKEN}/{target}-", str(found), str(HERE / "corpora" / target),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    executed = re.findall(r"#(\d+)\tDONE", done.stderr) or re.findall(r"^#(\d+)", done.stderr, re.MULTILINE) or ["0"]
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
    return int(executed[-1]), int(done.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
