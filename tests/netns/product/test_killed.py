"""kill -9 of the product's processes under load: never a silent way past the policy."""

from __future__ import annotations

from pathlib import Path

import pytest

from pellucid_cli.lab.clients import get

from ..world import eventually
from .conftest import Figure
from .stage import TABLE, VERSIONS, CountingServer, Load, Stage, address_of, gone, kill, policy, process_ids, tap

SITE, FORBIDDEN = "site.example", "forbidden.example"
AFTER = 300
"""Connections that are tried after everything is dead."""

RULES = f"""
  - {{name: site, match: {{destinations: [{{domain: {SITE}}}]}}, action: Allow}}
  - {{match: {{}}, action: Block}}
"""
POLICIES = policy(RULES, name="closed", pod="closed") + policy(RULES, name="open", pod="open", spec="failureMode: Open")


@pytest.mark.parametrize("first", ["all", "guardian"])
def test_no_packet_of_a_closed_pod_passes_and_open_pods_are_counted(tmp_path: Path, figure: Figure, first: str) -> None:
    """first: who is killed; who is left then must not open the way while it ends. All others alone are started again:
    test_crashes.py."""
    with (
        Stage(tmp_path, pods=("closed", "open")) as stage,
        CountingServer(stage["web"], 80) as allowed,
        CountingServer(stage["other"], 80) as forbidden,
    ):
        closed, opened, web = stage["closed"], stage["open"], stage["web"]
        packets = tap(web, f"ip saddr {closed.ipv4}"), tap(web, f"ip6 saddr {closed.ipv6}")
        stage.write("policy.yaml", POLICIES)
        instance = stage.run("--workers", "2").__enter__()
        pids = process_ids(instance)
        assert sorted(pids) == ["agent", "guardian", "supervisor", "worker0", "worker1"]
        with (
            Load(closed, web.addresses, 80, SITE, parallel=4) as load,
            Load(closed, stage["other"].addresses, 80, FORBIDDEN) as knocking,
        ):
            assert eventually(lambda: allowed.accepted >= 200)
            kill(*pids.values()) if first == "all" else kill(pids[first])
            assert eventually(lambda: all(map(gone, pids.values())), 20.0), "it does not end"
            # What was under way ends with the processes' sockets: packets of the kernel's, then silence.
            assert _quiet(packets)
            before, accepted = sum(each() for each in packets), allowed.accepted
            refused = stage.counter("refused")
            assert eventually(lambda: stage.counter("refused") >= refused + AFTER)
            leaked = sum(each() for each in packets) - before
            tried = stage.counter("refused") - refused
        bypassed, direct = stage.counter("bypassed"), allowed.accepted
        ends = [get(opened, address_of(web, version), 80, FORBIDDEN).end for version in VERSIONS for _ in range(10)]
        counted = stage.counter("bypassed") - bypassed
        figure(
            f"closed mode, {first} killed",
            f"{leaked} packets at the peer in {tried} connections of the closed pod; 0 expected. "
            f"Open pod: {ends.count('answered')} of {len(ends)} pass, {counted} counted",
        )
        assert leaked == 0
        assert allowed.accepted - direct == len(ends) and accepted == direct
        assert forbidden.accepted == 0, "blocked connections reached the server"
        assert set(knocking.ended) <= {"ECONNRESET", "ECONNREFUSED", "closed"}  # the last: who holds it is killed
        assert set(load.ended) <= {"ok", "ECONNRESET", "ECONNREFUSED", "closed"}
        assert ends == ["answered"] * len(ends)
        assert counted == len(ends)
        assert TABLE.split()[1] in stage.node.run(["nft", "list", "tables"]).stdout
        instance.stop()
        with stage.run() as again:
            assert get(closed, web.ipv4, 80, SITE).end == "answered", again.log_end()
        assert "pellucid" not in stage.node.run(["nft", "list", "tables"]).stdout


def _quiet(packets: tuple, looks: int = 20) -> bool:  # type: ignore[type-arg]
    """Whether the counters come to stand still, for that many looks in a row."""
    last, same = -1, 0

    def still() -> bool:
        nonlocal last, same
        now = sum(each() for each in packets)
        last, same = now, same + 1 if now == last else 0
        return same >= looks

    return eventually(still, 10.0)
