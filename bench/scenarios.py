"""The scenarios: a driver's command each, what counts as work, which figures its table shows, and what Pellucid has to reach."""

from __future__ import annotations

from dataclasses import dataclass

from bench import lab

SERVERS = " ".join(f"-a {address}" for address in lab.SERVER_ADDRESSES)


@dataclass(frozen=True)
class Figure:
    """A figure of a result. `required`: what Pellucid has to reach, as a ratio to the best peer or (absolute) in the figure's own unit."""

    key: str
    heading: str
    higher_is_better: bool = True
    required: float | None = None
    absolute: bool = False


@dataclass(frozen=True)
class Scenario:
    name: str
    title: str
    command: str  # in the pod's namespace
    figures: tuple[Figure, ...]  # the first one ranks the contenders
    work: str  # key of the result that counts units of work, for CPU per unit
    unit: float
    unit_name: str
    pinned: bool = False  # everything on one CPU: no wake-up of an idle CPU in the figures
    timeout_s: float = 75

    @property
    def holds(self) -> bool:
        """The driver waits with everything open while the caller measures."""
        return self.work == "open"


LATENCY = Figure("p50_us", "p50 µs", higher_is_better=False), Figure("p99_us", "p99 µs", higher_is_better=False)
PINNED_LATENCY = tuple(Figure(figure.key, figure.heading, higher_is_better=False, required=1.0) for figure in LATENCY)


def _bulk(name: str, title: str, command: str) -> Scenario:
    return Scenario(name, title, command, (Figure("gbps", "Gbit/s", required=0.95),), "bytes", 1e9, "GB")


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            "verify",
            "1,000 streams of 5 MB with random half-closes and resets: the same bytes and ends as without a proxy",
            f"loadgen verify -c 32 -n 1000 -s 5000000 {SERVERS}",
            (
                Figure("ok", "right of 1,000", required=1000, absolute=True),
                Figure("wrong_ends", "wrong end", higher_is_better=False),
                Figure("wrong_bytes", "wrong bytes", higher_is_better=False),
                Figure("stuck", "stuck", higher_is_better=False),
            ),
            "bytes",
            1e9,
            "GB",
            timeout_s=240,
        ),
        Scenario(
            "conn64",
            "new connections, 64 at once, names looked up among 1,001",
            f"loadgen conn -c 64 -d 3 {SERVERS}",
            (Figure("rate", "connections/s", required=1.0), *LATENCY),
            "done",
            1000,
            "1,000 connections",
        ),
        Scenario(
            "rr1p",
            "latency of one byte there and back, everything on one CPU",
            "loadgen rr -s 1 -d 2",
            (*PINNED_LATENCY, Figure("rate", "round trips/s")),
            "done",
            1000,
            "1,000 round trips",
            pinned=True,
        ),
        _bulk("down1", "bulk towards the pod, 1 stream", "loadgen down -c 1 -d 3"),
        _bulk("down16", "bulk towards the pod, 16 streams", f"loadgen down -c 16 -d 3 {SERVERS}"),
        _bulk("up1", "bulk towards the server, 1 stream", "loadgen up -c 1 -d 3"),
        _bulk("up16", "bulk towards the server, 16 streams", f"loadgen up -c 16 -d 3 {SERVERS}"),
        Scenario(
            "idle",
            "memory of 5,000 idle connections, all processes of the proxy together",
            f"loadgen idle -n 5000 {SERVERS}",
            (
                Figure("pss_kib", "KiB a connection", higher_is_better=False, required=0.7, absolute=True),
                Figure("base_mib", "MiB before", higher_is_better=False),
                Figure("open", "open"),
            ),
            "open",
            1,
            "connection",
        ),
    )
}

# Ratios within Pellucid, and to no proxy at all: (scenario, contender, measured against, required).
COMPARISONS = (
    *((name, "pellucid-addresses", "direct", 0.98) for name in ("conn64", "down1", "down16", "up1", "up16")),
    ("conn64", "pellucid-10000", "pellucid-10", 0.95),
    *(("conn64", "pellucid-bare", peer, 1.0) for peer in ("haproxy-bare", "haproxy-force-bare", "nginx-bare")),
)
