"""Every metric of a node: its kind, labels, meaning and buckets. Workers count by it, the agent serves it, docs/metrics.md prints it.

Labels take values of bounded sets only: never an address, a port, a name that a client sent, or a path.
"""

from __future__ import annotations

from typing import NamedTuple

PREFIX = "pellucid_"

INF = float("inf")
LATENCY_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, INF)
LIFETIME_S = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 300.0, 1800.0, 3600.0, 21600.0, INF)
APPLY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, INF)
LAG_S = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, INF)


class Metric(NamedTuple):
    """kind: counter, gauge or histogram. counted_by: worker, or agent for what workers do not send.

    buckets: upper bounds, inclusive, the last one inf; histograms only.
    """

    kind: str
    labels: tuple[str, ...]
    help: str
    counted_by: str = "worker"
    buckets: tuple[float, ...] = ()


METRICS: dict[str, Metric] = {
    "connections_opened": Metric("counter", (), "TCP connections that a worker accepted."),
    "connections_closed": Metric(
        "counter",
        ("action", "reason"),
        "TCP connections that ended: what was decided of them, and why they ended (session/ending.py).",
    ),
    "decisions_failed": Metric(
        "counter", (), "Connections refused because deciding about them failed; the log tells why."
    ),
    "connections_active": Metric("gauge", (), "TCP connections that workers hold now."),
    "connections_limit": Metric(
        "gauge", (), "How many they can hold: max_connections, or what their limit of open files is enough for."
    ),
    "connections_pending": Metric("gauge", (), "Those of them that have no verdict or no upstream yet."),
    "connections_shed": Metric(
        "counter",
        ("limit",),
        "New connections refused since their pod had too many: connections_per_pod, or pending_per_pod.",
    ),
    "canary_answers": Metric(
        "counter", ("family",), "Connections to the canary's addresses that workers answered: interception works here."
    ),
    "unknown_pods": Metric(
        "counter",
        ("outcome",),
        "TCP connections of addresses without a pod that waited: known (its pod came) or expired (it did not in time).",
    ),
    "held_bytes": Metric(
        "gauge",
        (),
        "Bytes that wait in workers for peers that do not read; a pipe that is lent for them counts as 64 KiB at least.",
    ),
    "accept_pauses": Metric(
        "counter", (), "How often a worker accepted nothing for 100 ms: too many connections, no descriptor, no memory."
    ),
    "denied": Metric(
        "counter",
        ("policy", "rule", "reason"),
        "Connections that a worker refused; policy and rule are empty for the default action.",
    ),
    "audit_would_deny": Metric(
        "counter", ("policy", "rule"), "Connections that a rule in mode Audit would have refused."
    ),
    "bytes": Metric("counter", ("direction",), "Payload bytes relayed; direction is up (client to server) or down."),
    "connection_duration_seconds": Metric(
        "histogram", (), "From accept to the end of both directions.", buckets=LIFETIME_S
    ),
    "first_byte_seconds": Metric("histogram", (), "From accept to the server's first byte.", buckets=LATENCY_S),
    "upstream_connect_seconds": Metric("histogram", (), "From connect to the handshake's end.", buckets=LATENCY_S),
    "first_bytes_protocol": Metric(
        "counter",
        ("protocol",),
        "Connections by what their first bytes were: TLS, HTTP/1, HTTP/2, SSH …, Unknown, ServerFirst, or None.",
    ),
    "events_dropped": Metric(
        "counter",
        ("stage",),
        "Flow records lost; stage is worker (its pipe was full), writer (the file was slow or full) or observer (it was slow).",
    ),
    "worker_loop_lag_seconds": Metric(
        "histogram", (), "How long a worker spent on one batch of events, while others waited.", buckets=LAG_S
    ),
    "worker_up": Metric("gauge", ("worker",), "1 if the worker answered within the time of a scrape.", "agent"),
    "workers_confined": Metric(
        "gauge",
        ("limit",),
        "Workers that are confined by it: capabilities, a user of their own (user), a filter of system calls (seccomp).",
    ),
    "kernel_decided_packets": Metric(
        "counter",
        ("policy", "rule", "action"),
        "Packets that the kernel decided by address alone; of TCP the SYNs. Policy and rule are empty for the default action.",
        "agent",
    ),
    "kernel_events": Metric(
        "counter",
        ("event",),
        "Packets that the kernel treated by no rule of a policy: intercepted, bypassed, refused, held …",
        "agent",
    ),
    "policy_revision_info": Metric("gauge", ("revision",), "1 for the revision that is enforced.", "agent"),
    "policy_problems": Metric(
        "gauge", (), "Problems of the policy folder as it is now; 0: what it holds is enforced.", "agent"
    ),
    "policy_apply_seconds": Metric("histogram", (), "From a file's writing to its enforcement.", "agent", APPLY_S),
    "conntrack_usage_ratio": Metric("gauge", (), "Entries of the connection tracking table over its limit.", "agent"),
    "rules_repairs": Metric(
        "counter",
        ("cause",),
        "Repairs of kernel rules that somebody else changed, by what was changed: table, chain, set, rule, element, counter, "
        "ip_rule, route, link (lo), other, or unseen.",
        "agent",
    ),
    "leaked_packets": Metric(
        "counter",
        (),
        "Packets of pods that got past the policy while somebody else had changed the kernel rules, as connection tracking counted them.",
        "agent",
    ),
    "leaked_connections": Metric(
        "counter",
        ("outcome",),
        "Connections of the same; outcome is ended (of a closed pod: made to end) or left (another, or no TCP).",
        "agent",
    ),
    "kernel_flows_reviewed": Metric(
        "counter",
        ("outcome",),
        "Live flows that the kernel had let pass, when a change concerned them: policy_changed or pod_changed (ended), or kept "
        "(onPolicyChange: Keep).",
        "agent",
    ),
    "process_restarts": Metric(
        "counter",
        ("process",),
        "Processes of this run that ended and were started again: supervisor, agent or worker; the first's begins the others anew.",
        "agent",
    ),
    "observers": Metric("gauge", (), "Who watches flow records now (pellucid observe -f).", "agent"),
    "build_info": Metric("gauge", ("version", "python", "engine"), "1; engine is compiled or uncompiled.", "agent"),
}

LABELS: dict[str, tuple[str, ...]] = {name: metric.labels for name, metric in METRICS.items()}
"""Label names in the order of Series.labels."""


def exposed_name(name: str) -> str:
    """The name as Prometheus sees it: prefixed, counters with _total."""
    return f"{PREFIX}{name}{'_total' if METRICS[name].kind == 'counter' else ''}"


def markdown() -> str:
    """The table of docs/metrics.md."""
    rows = ["| name | kind | labels | counted by | meaning |", "|---|---|---|---|---|"]
    for name, metric in METRICS.items():
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "–"
        rows.append(f"| `{exposed_name(name)}` | {metric.kind} | {labels} | {metric.counted_by} | {metric.help} |")
    return "\n".join(rows) + "\n"
