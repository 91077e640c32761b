"""Hand-overs at full load: another instance takes over, again and again, while connections come as fast as they go. Needs root.

  make bench-handover                     8 hand-overs in 40 s; exit status 1 if a connection was lost or a stream cut

Losses are what clients and streams saw, by the C drivers of the bench: a connection that was refused, reset, cut short or not answered
in time; a stream (one byte there and back, without a pause) that failed."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time

from bench import contenders, lab
from bench.contenders import BENCH, PELLUCID
from bench.run import lock, prepare
from bench.scenarios import SERVERS
from bench.session import LOG, Result, Session
from pellucid_proxy.agent.status import NodeStatus, NotRunning, read_status

STREAMS = 4
PATIENCE_S = 30.0


def status() -> NodeStatus | None:
    """What the instance that enforces says of itself."""
    try:
        told = read_status(str(lab.RUN / "state"))
    except NotRunning:
        return None
    return told if told.phase == "enforcing" else None


def take_over(session: Session) -> float:
    """Start an instance that takes over; returns after how many seconds it enforced."""
    before, begun = status(), time.monotonic()
    with LOG.open("a") as log:
        session.spawn(
            lab.NODE, f"{PELLUCID} --takeover", session.proxy, env=session.environment, stdout=log, stderr=log
        )
    while time.monotonic() < begun + PATIENCE_S:
        now = status()
        if now is not None and before is not None and now.pid != before.pid:
            return time.monotonic() - begun
        time.sleep(0.02)
    raise SystemExit(f"bench: the new instance does not enforce:\n{session.log()[-2000:]}")


def measure(session: Session, hand_overs: int, seconds: float) -> Result:
    """One run: the connections' driver, the streams' drivers, and a hand-over every so often."""
    load = session.drive_later(f"loadgen conn -c 64 -d {seconds} {SERVERS}")
    streams = []
    delays = []
    for number in range(hand_overs):
        if number < STREAMS:
            streams.append(session.drive_later(f"loadgen rr -s 1 -d {seconds}"))
        time.sleep(seconds / hand_overs / 2)
        delays.append(take_over(session))
    connections = finish(load)
    told = [finish(each) for each in streams]
    return {
        "hand_overs": hand_overs,
        "connections": connections["done"] + connections["err"] + connections["stuck"],
        "per_second": round(connections["rate"]),
        "lost": connections["err"] + connections["stuck"],
        "slowest_ms": round(connections["max_us"] / 1000, 1),
        "streams": len(told),
        "streams_cut": sum(each["err"] for each in told),
        "round_trips": sum(each["done"] for each in told),
        "enforced_after_s": [round(each, 2) for each in delays],
    }


def finish(process: subprocess.Popen[str]) -> Result:
    output, _ = process.communicate(timeout=120)
    return dict(json.loads(output))


def main() -> None:
    parser = argparse.ArgumentParser(
        "bench.handover", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hand-overs", type=int, default=8, metavar="N")
    parser.add_argument("--seconds", type=float, default=40, metavar="S", help="of load (default 40)")
    parser.add_argument("--workers", type=int, default=1, metavar="N")
    options = parser.parse_args()
    holder = lock()
    subprocess.run([BENCH / "setup.sh"], check=True)
    lab.enter_sandbox()
    prepare()
    with Session(contenders.table(PELLUCID)["pellucid"], options.workers) as session:
        session.wait_until_ready()
        session.warm_up()
        result = measure(session, options.hand_overs, options.seconds)
    holder.close()
    print(json.dumps(result))
    print(
        f"{shlex.join(sys.argv)}: {result['lost']} of {result['connections']:,} connections lost at {result['per_second']:,} a second "
        f"in {result['hand_overs']} hand-overs, {result['streams_cut']} of {result['streams']} streams cut, "
        f"slowest answer {result['slowest_ms']:g} ms"
    )
    raise SystemExit(bool(result["lost"] or result["streams_cut"]))


if __name__ == "__main__":
    main()
