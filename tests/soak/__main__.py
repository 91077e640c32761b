"""Connections by the million, while pods and policies come and go; then nothing may be left of them. Needs root or a user namespace.

make soak                                   1,000,000 connections; exit status 1 if a bound is broken
make soak ARGS='--connections 100000'       fewer"""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
import time
from pathlib import Path

from pellucid_cli.lab import sandbox

from .run import Outcome, Plan, Soak


def _table(outcome: Outcome) -> str:
    width = max(len(bound.what) for bound in outcome.bounds)
    lines = [f"{'  ' if bound.holds else '! '}{bound.what:{width}}  {bound.found}" for bound in outcome.bounds]
    rate = outcome.connections / outcome.seconds if outcome.seconds else 0
    lines.append(
        f"{len(outcome.broken)} of {len(outcome.bounds)} bounds broken, {outcome.connections:,} connections in {outcome.seconds:.0f} s "
        f"({rate:,.0f} a second), {outcome.rounds} rounds of changes"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        "tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--connections", type=int, default=1_000_000, metavar="N")
    parser.add_argument(
        "--seed", type=int, default=None, metavar="N", help="of all random choices (default: another each time)"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N")
    options = parser.parse_args()
    seed = secrets.randbits(32) if options.seed is None else options.seed
    plan = Plan(options.connections, seed, options.workers)
    said_at = 0.0

    def say(line: str) -> None:
        nonlocal said_at
        if time.monotonic() - said_at > 1 or line.startswith("warm"):
            said_at = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    print(f"seed {seed}", file=sys.stderr, flush=True)
    sandbox.enter()
    with tempfile.TemporaryDirectory(prefix="pellucid-soak-") as folder, Soak(Path(folder), plan, say) as soak:
        outcome = soak.run()
    print(_table(outcome))
    raise SystemExit(bool(outcome.broken))


if __name__ == "__main__":
    main()
