"""Every kind of destination through the product: behind DNAT, outside, on the same node, the pod itself."""

from __future__ import annotations

import itertools
from pathlib import Path

from pellucid_cli.lab.clients import get
from pellucid_cli.lab.instance import Instance
from pellucid_cli.lab.servers import speak_http
from pellucid_cli.lab.topology import POD_GATEWAYS, SERVER_GATEWAYS

from ..world import _CLUSTER as CLUSTER
from ..world import PORT, SERVICE_PORT
from .conftest import Figure
from .stage import VERSIONS, Stage, address_of, policy, records, wait_for_records

NAME = "any.example"
DESTINATIONS = {  # what: ((IPv4, IPv6), port, who answers)
    "service behind DNAT": (("10.96.0.10", "fd00:96::10"), SERVICE_PORT, "web"),
    "external": (("192.0.2.10", "2001:db8::10"), PORT, "web"),
    "same node": (("10.244.1.11", "fd00:244:1::11"), PORT, "b"),
    "self, by a service": (("10.96.0.11", "fd00:96::11"), SERVICE_PORT, "a"),
    "same node, by a service": (("10.96.0.13", "fd00:96::13"), SERVICE_PORT, "b"),
    "the node, by a service": (("10.96.0.12", "fd00:96::12"), SERVICE_PORT, "node"),
}
ONLY_BY_NAME = f"""
  - {{name: by-name, match: {{destinations: [{{domain: {NAME}}}]}}, action: Allow}}
  - {{match: {{}}, action: Block}}
"""


COLUMNS = tuple(itertools.product(("Pod", "Node"), (0, 1), VERSIONS))
"""Whose address servers see; src_valid_mark and rp_filter; IP version."""


def test_every_kind_of_destination_is_decided_by_the_proxy_and_answered(tmp_path: Path, figure: Figure) -> None:
    """Both pods are under a policy that only a name can satisfy, so the kernel alone can let nothing pass."""
    faults: dict[tuple[str, str, int, int], str] = {}
    with Stage(tmp_path) as stage:
        stage.node.nft(CLUSTER)
        for host in ("web", "b", "a"):
            stage.serve(host, {PORT: speak_http})
        stage.serve("node", {PORT: speak_http}, SERVER_GATEWAYS)
        stage.write("policy.yaml", policy(ONLY_BY_NAME, name="pa") + policy(ONLY_BY_NAME, name="pb", pod="b"))
        for source, columns in itertools.groupby(COLUMNS, key=lambda column: column[0]):
            with stage.run("--source-address", source) as instance:
                for _, strict, version in columns:
                    stage.node.set_sysctls(
                        {f"net.ipv4.conf.all.{key}": str(strict) for key in ("rp_filter", "src_valid_mark")}
                    )
                    for what in DESTINATIONS:
                        faults[what, source, strict, version] = _fault(stage, instance, what, source, version)
    good = sum(not fault for fault in faults.values())
    figure(
        "destinations",
        f"{good} of {len(faults)} answered, decided by the proxy, right source address at the server\n{_table(faults)}",
    )
    assert len(faults) == len(DESTINATIONS) * len(COLUMNS)
    assert {case: fault for case, fault in faults.items() if fault} == {}


def _fault(stage: Stage, instance: Instance, what: str, source: str, version: int) -> str:
    """What was wrong with a connection from pod a to that destination; "" if nothing."""
    addresses, port, who = DESTINATIONS[what]
    address, pod = addresses[version == 6], address_of(stage["a"], version)
    before, seen = len(records(instance)), len(stage.journal)
    answer = get(stage["a"], address, port, NAME)
    stage.journal.wait_ended(5.0, seen, 1)
    arrivals = [(arrival.server, arrival.source) for arrival in stage.journal.arrivals(seen)]
    spoofed = source == "Pod" and who != "a"  # a pod drops packets that bear its own address
    right = (pod,) if spoofed else (*SERVER_GATEWAYS, *POD_GATEWAYS)
    faults = [] if answer.end == "answered" else [f"client: {answer}"]
    if arrivals not in [[(who, each)] for each in right]:
        faults.append(f"servers: {arrivals}")
    told = [
        (
            each["verdict"],
            each["policy"]["rule"],
            each["source"]["address"],
            each["destination"]["address"],
            each["destination"]["port"],
        )
        for each in wait_for_records(instance, before + 1)[before:]
    ]
    if told != [("Allow", "by-name", pod, address, port)]:
        faults.append(f"records: {told}")
    return "; ".join(faults)


def _table(faults: dict[tuple[str, str, int, int], str]) -> str:
    head = " " * 26 + "  ".join(f"{source:4} {strict} v{version}" for source, strict, version in COLUMNS)
    cells = {case: f"{'NO' if fault else 'ok':9}" for case, fault in faults.items()}
    return "\n".join(
        [head, *(f"  {what:24}" + "  ".join(cells[what, *column] for column in COLUMNS) for what in DESTINATIONS)]
    )
