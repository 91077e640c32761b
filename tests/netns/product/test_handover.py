"""A new version takes the place of the one that runs, under load: no connection is lost, none is cut, and nothing leaks."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from pellucid_cli.lab.clients import TlsSession, get
from pellucid_cli.lab.instance import Instance, NotReady
from pellucid_cli.lab.servers import speak_https
from pellucid_proxy.agent.status import NotRunning, read_status

from ..world import eventually
from .conftest import Figure
from .stage import CountingServer, Load, Stage, _children, kill, policy, process_ids, records, tap

SITE, FORBIDDEN = "site.example", "forbidden.example"
HAND_OVERS = 8
PATIENCE_S = 30.0
RULES = policy(
    f"""
  - {{name: site, match: {{destinations: [{{domain: {SITE}}}]}}, action: Allow}}
  - {{match: {{}}, action: Block}}
"""
)


def test_hand_overs_under_load_lose_no_connection_and_cut_no_stream(tmp_path: Path, figure: Figure) -> None:
    with (
        Stage(tmp_path) as stage,
        CountingServer(stage["web"], 80) as server,
        CountingServer(stage["other"], 80) as forbidden,
        ExitStack() as streams,
        ExitStack() as runs,
    ):
        a, web, other = stage["a"], stage["web"], stage["other"]
        stage.serve("web", {443: speak_https})
        stage.write("policy.yaml", RULES)
        leaked = tap(other, f"ip saddr {a.ipv4}"), tap(other, f"ip6 saddr {a.ipv6}")
        instances = [runs.enter_context(stage.run("--workers", "2"))]
        rules = _rules(stage)
        opened: list[TlsSession] = []
        with (
            Load(a, web.addresses, 80, SITE, parallel=4) as load,
            Load(a, other.addresses, 80, FORBIDDEN, parallel=1) as knocking,
        ):
            for _ in range(HAND_OVERS):
                opened += [streams.enter_context(TlsSession(a, address, 443, SITE)) for address in web.addresses]
                before = server.accepted
                instances.append(runs.enter_context(instances[-1].successor()))
                assert eventually(lambda before=before: server.accepted > before + 100, PATIENCE_S)  # type: ignore[misc]
                assert {each.request().end for each in opened} == {"answered"}, instances[-1].log_end()
        assert _rules(stage) == rules, "the kernel's rules are the same"
        assert instances[0].running and instances[-1].running, "the first one has streams open"
        streams.close()
        assert [instance.wait(PATIENCE_S) for instance in instances[:-1]] == [0] * HAND_OVERS
        assert eventually(lambda: _records_of_streams(instances[-1]) == len(opened)), _records_of_streams(instances[-1])
        assert instances[-1].stop() == 0
        lost = sum(load.ended.values()) - load.ended.get("ok", 0)
        figure(
            "hand-overs",
            f"{lost} of {sum(load.ended.values())} connections lost in {HAND_OVERS} hand-overs, 0 of {len(opened)} streams cut, "
            f"slowest answer {load.slowest_s * 1000:.0f} ms, {sum(each() for each in leaked)} packets leaked in "
            f"{sum(knocking.ended.values())} forbidden connections",
        )
        assert load.ended == {"ok": server.accepted}
        assert sum(each() for each in leaked) == forbidden.accepted == 0
        assert not stage.node.run(["nft", "list", "tables"]).stdout, "the last one takes the rules away"
        assert sorted(path.name for path in instances[-1].state.iterdir()) == ["last-good.msgpack", "lock"]


def test_pods_of_an_upgrade_have_processes_of_their_own(tmp_path: Path, figure: Figure) -> None:
    """Each instance is process 1 of a namespace of its own, as in Kubernetes: no process id of one means anything to the other."""
    with (
        Stage(tmp_path) as stage,
        CountingServer(stage["web"], 80) as server,
        ExitStack() as runs,
    ):
        a, web = stage["a"], stage["web"]
        stage.write("policy.yaml", RULES)
        instances = [runs.enter_context(stage.run("--workers", "2", "--instance", "pod-0").alone())]
        with Load(a, web.addresses, 80, SITE, parallel=4) as load:
            for number in range(1, 5):
                before = server.accepted
                instances.append(runs.enter_context(instances[-1].successor("--instance", f"pod-{number}").alone()))
                assert eventually(lambda before=before: server.accepted > before + 100, PATIENCE_S)  # type: ignore[misc]
                assert read_status(str(instances[-1].state)).instance == f"pod-{number}"
            kill(_children(instances[-1].inner())[0])  # the next one of the same pod goes on: the lock names its run
            before = server.accepted
            assert eventually(lambda: server.accepted > before + 100, PATIENCE_S)
        assert [instance.wait(PATIENCE_S) for instance in instances[:-1]] == [0] * 4
        assert instances[-1].stop() == 0
    lost = sum(load.ended.values()) - load.ended.get("ok", 0)
    figure(
        "hand-overs between pods",
        f"{lost} of {sum(load.ended.values())} connections lost in 4 hand-overs and a supervisor's death",
    )
    assert set(load.ended) <= {"ok", "ECONNRESET", "closed"}
    assert lost <= 4, "those that were under way in the workers that died with their supervisor"


def test_what_live_sockets_carry_cannot_change_in_a_hand_over(tmp_path: Path) -> None:
    with Stage(tmp_path) as stage:
        stage.write("policy.yaml", RULES)
        with stage.run() as instance:
            rules, run = _rules(stage), process_ids(instance)["guardian"]
            with pytest.raises(NotReady, match="--takeover: ipv6: is True, False is asked for"):
                instance.successor("--scope", stage["a"].ipv4).__enter__()
            assert eventually(lambda: _serves(instance, run), PATIENCE_S), instance.log_end()
            assert _rules(stage) == rules


def test_a_successor_that_enforces_other_settings_changes_the_rules_under_load(tmp_path: Path) -> None:
    with Stage(tmp_path) as stage, CountingServer(stage["web"], 80) as server:
        a, web = stage["a"], stage["web"]
        stage.write("policy.yaml", RULES)
        with stage.run("--workers", "1") as instance, Load(a, web.addresses, 80, SITE, parallel=2) as load:
            assert eventually(lambda: server.accepted > 50, PATIENCE_S)
            with instance.successor("--source-address", "Node", "--workers", "2"):
                assert instance.wait(PATIENCE_S) == 0
                before = server.accepted
                assert eventually(lambda: server.accepted > before + 50, PATIENCE_S)
                assert get(a, web.ipv4, 80, FORBIDDEN).end in ("forbidden", "reset")
        assert load.ended == {"ok": server.accepted}


@pytest.mark.parametrize("point", ["no agent", "agent", "worker0"])
def test_a_successor_killed_on_its_way_costs_nothing(tmp_path: Path, point: str) -> None:
    """point: what is there when it is killed: the predecessor's agent gone, its own agent, its first worker. If it has come to enforce
    nevertheless before it is killed, that is the end of a run, and test_killed.py's subject."""
    with Stage(tmp_path) as stage, CountingServer(stage["web"], 80) as server:
        a, web = stage["a"], stage["web"]
        stage.write("policy.yaml", RULES)
        with stage.run() as instance, Load(a, web.addresses, 80, SITE, parallel=2) as load:
            rules, old = _rules(stage), process_ids(instance)
            heir = instance.successor()
            heir.start()
            if point == "no agent":
                assert eventually(lambda: "agent" not in process_ids(instance), PATIENCE_S)
            else:
                assert eventually(lambda: point in process_ids(heir), PATIENCE_S)
            kill(process_ids(heir)["supervisor"])
            if "handed over" not in instance.log.read_text():
                assert eventually(lambda: _serves(instance, old["guardian"]), PATIENCE_S), instance.log_end()
                assert _rules(stage) == rules
                before = server.accepted
                assert eventually(lambda: server.accepted > before + 50, PATIENCE_S)
                stage.write("policy.yaml", RULES.replace(SITE, f"{SITE}}}, {{domain: another.example"))
                assert eventually(lambda: get(a, web.ipv4, 80, "another.example").end == "answered", PATIENCE_S)
        lost = sum(load.ended.values()) - load.ended["ok"]
        assert set(load.ended) <= {"ok", "ECONNRESET", "closed", "ECONNREFUSED"}
        assert lost <= 4 or "handed over" in instance.log.read_text(), load.ended


def _rules(stage: Stage) -> str:
    return stage.node.run(["nft", "-s", "list", "table", "inet", "pellucid"]).stdout


def _records_of_streams(instance: Instance) -> int:
    return sum(record["destination"]["port"] == 443 for record in records(instance))


def _serves(instance: Instance, run: int) -> bool:
    try:
        told = read_status(str(instance.state))
    except NotRunning:
        return False
    return told.phase == "enforcing" and told.pid == run
