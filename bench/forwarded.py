"""What a connection costs the machine that the proxy never sees: no rule at all, then what a TPROXY set-up adds, step by step. Needs root.

  python -m bench.forwarded -r 3          microseconds of all CPUs for a short connection, client and server included, and the rate

Every step adds to the one before it; the last one is Pellucid itself, with a policy whose addresses decide."""

from __future__ import annotations

import argparse
import statistics
import subprocess

from bench import contenders, lab
from bench.contenders import BENCH, PELLUCID
from bench.run import lock, prepare
from bench.scenarios import SCENARIOS
from bench.session import Session

CONNECTIONS = SCENARIOS["conn64"]
STEPS = (
    ("one ip rule", "ip rule add pref 101 fwmark 0x1000/0x1040 lookup 15001", ""),
    (
        "four, as Pellucid has",
        (
            f"ip rule add pref 101 to {lab.POD_CIDR} fwmark 0x40/0x1040 lookup 15001 && ip rule add pref 102 nop && "
            f"ip rule add pref 100 iif lo from {lab.POD_CIDR} goto 102"
        ),
        "",
    ),
    ("a NAT hook", "nft -f -", "table ip nat_hook { chain post { type nat hook postrouting priority srcnat; } ; }"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        "bench.forwarded", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-r", dest="repetitions", type=int, default=3, metavar="N", help="default 3")
    repetitions = parser.parse_args().repetitions
    holder = lock()
    subprocess.run([BENCH / "setup.sh"], check=True)
    lab.enter_sandbox()
    prepare()
    costs: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {}

    def measure(session: Session, what: str) -> None:
        result = session.measure(CONNECTIONS)
        costs.setdefault(what, []).append(result["machine_cpu_per_unit"] * 1000)  # seconds a thousand
        rates.setdefault(what, []).append(result["rate"])

    table = contenders.table(PELLUCID)
    for _ in range(repetitions):
        with Session(table["direct"], 1) as session:
            session.wait_until_ready()
            session.warm_up()
            measure(session, "no rule")
            for what, command, text in STEPS:
                lab.run(f"ip netns exec {lab.NODE} sh -c '{command}'", stdin=text)
                measure(session, what)
        with Session(table["pellucid-addresses"], 1) as session:
            session.wait_until_ready()
            session.warm_up()
            measure(session, "Pellucid")
    holder.close()
    print(f"{'':24}{'us a connection':>16}{'connections/s':>16}   medians of {repetitions}")
    for what, found in costs.items():
        print(f"{what:24}{statistics.median(found):>16.1f}{statistics.median(rates[what]):>16,.0f}")


if __name__ == "__main__":
    main()
