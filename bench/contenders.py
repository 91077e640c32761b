"""The contenders. To add one, add a line to TABLE."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from bench import lab

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
WORK = ROOT / ".bench"  # what setup.sh makes: venv, drivers
CONF = BENCH / "conf"
FLOWS = WORK / "flows.jsonl"  # on the disk, as it would be
METRICS = "127.0.0.1:9464"
PYTHON = f"{WORK}/venv/bin/python"


def _project_python() -> str:
    own = ROOT / ".venv/bin/python"
    return str(own) if own.exists() else "python3"


PELLUCID = (
    f"PYTHONPATH={ROOT}/build/compiled/current exec {_project_python()} -m pellucid_cli run --policy $BENCH_POLICY "
    f"--scope {lab.POD_CIDR} --workers $BENCH_WORKERS --state $BENCH_STATE --flows $BENCH_FLOWS --metrics $BENCH_METRICS"
)
ENVOY = next(
    (str(path) for path in WORK.glob("venv/lib/python*/site-packages/envoy/**/envoy") if path.is_file()), "envoy"
)
MITMDUMP = (
    f"{PYTHON} {CONF}/mitmdump_launch.py -q --mode transparent --listen-host 0.0.0.0 --listen-port {lab.LISTEN_PORT} "
    f"--set confdir={lab.RUN}/mitm --ignore-hosts '.*'"
)


@dataclass(frozen=True)
class Contender:
    """A way for the pod's connections to reach the server."""

    name: str
    command: str | None  # shell, in the node's namespace; None: no proxy at all
    peer: bool = False  # counts for "best peer"
    policy: str | None = None  # of Pellucid, a key of policies.PELLUCID; it installs its own rules
    scenarios: tuple[str, ...] | None = None  # the only ones it runs, in place of all but the addresses' and the rules'
    rules: str = (
        lab.TRACK
    )  # that the lab gives to nft on the node, besides those by which peers get the pod's connections

    @property
    def diverts(self) -> bool:
        """The lab hands it the pod's connections; Pellucid takes them itself."""
        return self.command is not None and self.policy is None


def table(pellucid: str) -> dict[str, Contender]:
    """All contenders by name, Pellucid's run by that shell command."""
    tracked = (
        Contender("direct", None, scenarios=DIRECT),
        Contender("haproxy", f"BENCH_SPLICE=auto exec haproxy -db -f {CONF}/haproxy.cfg", peer=True),
        Contender("haproxy-force", f"BENCH_SPLICE=force exec haproxy -db -f {CONF}/haproxy.cfg", peer=True),
        Contender("nginx", f"exec python3 {CONF}/nginx_launch.py {CONF}/nginx.conf", peer=True),
        Contender(
            "envoy",
            f"exec {ENVOY} -c {lab.RUN}/envoy.yaml --concurrency $BENCH_WORKERS -l off --disable-hot-restart",
            peer=True,
        ),
        Contender("squid", f"exec sh {CONF}/squid_launch.sh {CONF}/squid.conf", peer=True),
        Contender("mitmproxy", f"exec {MITMDUMP}", peer=True),
        Contender("pellucid", pellucid, policy="names"),
        Contender("pellucid-addresses", pellucid, policy="addresses", scenarios=ADDRESSES),
        Contender("pellucid-10", pellucid, policy="rules-10", scenarios=RULES),
        Contender("pellucid-10000", pellucid, policy="rules-10000", scenarios=RULES),
    )
    bare = (
        replace(contender, name=f"{contender.name}-bare", peer=False, scenarios=BARE, rules="")
        for contender in tracked
        if contender.name in BARE_TOO
    )
    return {contender.name: contender for contender in (*tracked, *bare)}


ADDRESSES = ("conn64", "rr1p", "down1", "down16", "up1", "up16")
RULES = ("conn64",)
BARE = ("conn64", "rr1p")  # where tracking shows most
BARE_TOO = ("direct", "haproxy", "haproxy-force", "nginx", "pellucid")
DIRECT = (*ADDRESSES, "verify")


def environment(contender: Contender, workers: int) -> dict[str, str]:
    """What a contender's command is told, besides the environment of the run."""
    told = {
        "BENCH_WORKERS": str(workers),
        "BENCH_POLICY": f"{lab.RUN}/pellucid-{contender.policy}",
        "BENCH_STATE": f"{lab.RUN}/state",
        "BENCH_FLOWS": str(FLOWS),
        "BENCH_METRICS": METRICS,
        "BENCH_POD_CIDR": lab.POD_CIDR,
        "BENCH_LISTEN_PORT": str(lab.LISTEN_PORT),
        "BENCH_NAMES": f"{lab.RUN}/names",
    }
    return dict(os.environ) | told
