"""kill -9 of supervisor, agent and workers under load: they are back at once, nobody is refused, nothing leaks."""

from __future__ import annotations

import random
import threading
from functools import partial
from pathlib import Path

import pytest

from pellucid_cli.lab.clients import get
from pellucid_cli.lab.instance import Instance
from pellucid_proxy.agent.status import NotRunning, read_status

from ..world import eventually
from .conftest import Figure
from .stage import CountingServer, Load, Stage, kill, policy, process_ids, records, tap

SITE, FORBIDDEN, LATER = "site.example", "forbidden.example", "later.example"
KILLS = 4
PARALLEL = 4
LONGEST_WAIT_S = {"supervisor": 1.0, "agent": 0.5, "worker0": 0.5}
"""With the supervisor all workers start at once, on cores that the load has as well: 0.2 to 0.5 s where nobody else has them."""
RULES = f"""
  - {{name: site, match: {{destinations: [{{domain: {SITE}}}]}}, action: Allow}}
  - {{match: {{}}, action: Block}}
"""


@pytest.mark.parametrize(("victim", "workers"), [("supervisor", 2), ("agent", 2), ("worker0", 2), ("worker0", 1)])
def test_a_crash_refuses_nobody_and_lets_nothing_through(
    tmp_path: Path, figure: Figure, victim: str, workers: int
) -> None:
    """What a killed worker carried is lost and nothing else, and with a supervisor all workers are; an agent's end costs no connection."""
    seed = random.SystemRandom().randrange(10_000)
    chance = random.Random(seed)
    with (
        Stage(tmp_path, pods=("closed",)) as stage,
        CountingServer(stage["web"], 80) as allowed,
        CountingServer(stage["other"], 80) as forbidden,
    ):
        closed, web, other = stage["closed"], stage["web"], stage["other"]
        leaked = tap(other, f"ip saddr {closed.ipv4}"), tap(other, f"ip6 saddr {closed.ipv6}")
        stage.write("policy.yaml", policy(RULES, pod="closed"))
        with (
            stage.run("--workers", str(workers)) as instance,
            Load(closed, web.addresses, 80, SITE, parallel=PARALLEL) as load,
            Load(closed, other.addresses, 80, FORBIDDEN, parallel=1) as knocking,
        ):
            for _ in range(KILLS):
                goal = allowed.accepted + chance.randrange(100, 600)
                assert eventually(partial(_reached, allowed, goal), 20.0), instance.log_end()
                before = process_ids(instance)
                kill(before[victim])
                assert eventually(partial(_back, instance, before, victim)), instance.log_end()
            revision = _revision(instance)
            stage.write(
                "policy.yaml",
                policy(RULES.replace(FORBIDDEN, LATER).replace(SITE, f"{SITE}}}, {{domain: {LATER}"), pod="closed"),
            )
            assert eventually(lambda: _revision(instance) not in ("", revision), 10.0), instance.log_end()
            assert get(closed, web.ipv4, 80, LATER).end == "answered", instance.log_end()
        told = len(records(instance))
        answered, lost = load.ended.pop("ok"), sum(load.ended.values())
        figure(
            f"crashes, {victim} of {workers} worker(s) killed {KILLS} times",
            f"0 refused, {lost} of {answered + lost} lost, slowest answer {load.slowest_s * 1000:.0f} ms, "
            f"{sum(each() for each in leaked)} packets leaked in {sum(knocking.ended.values())} forbidden connections (seed {seed})",
        )
        assert sum(each() for each in leaked) == forbidden.accepted == 0
        assert set(load.ended) <= {"ECONNRESET", "closed"}, "refused, or unanswered"
        assert lost <= (0 if victim == "agent" else PARALLEL * KILLS)
        assert set(knocking.ended) <= {"HTTP/1.1 403 Forbidden", "ECONNRESET", "closed"}
        assert load.slowest_s < LONGEST_WAIT_S[victim]
        assert told > 0


def test_an_agent_that_starts_again_goes_on_with_the_rules_that_are_there(tmp_path: Path) -> None:
    """No rule is loaded anew: counters of the kernel and what connections wait for stay as they are."""
    with Stage(tmp_path, pods=("closed",)) as stage, CountingServer(stage["web"], 80):
        closed, web = stage["closed"], stage["web"]
        stage.write("policy.yaml", policy(RULES, pod="closed"))
        with stage.run() as instance:
            assert get(closed, web.ipv4, 80, SITE).end == "answered"
            rules = stage.node.run(["nft", "-a", "-s", "list", "table", "inet", "pellucid"]).stdout
            revision = _revision(instance)
            before = process_ids(instance)
            kill(before["agent"])
            assert eventually(partial(_back, instance, before, "agent"))
            assert eventually(lambda: _revision(instance) == revision, 10.0), instance.log_end()
            assert stage.node.run(["nft", "-a", "-s", "list", "table", "inet", "pellucid"]).stdout == rules
            assert get(closed, web.ipv4, 80, SITE).end == "answered"
        assert not stage.node.run(["nft", "list", "tables"]).stdout, "its rules are not taken away"


def test_stop_right_after_a_crash_takes_the_rules_away(tmp_path: Path) -> None:
    """The agent that is told to stop is one that does not know the rules yet."""
    with Stage(tmp_path, pods=("closed",)) as stage:
        stage.write("policy.yaml", policy(RULES, pod="closed"))
        with stage.run(drain_s=0.0) as instance:
            ended = threading.Thread(target=kill, args=(process_ids(instance)["agent"],))
            ended.start()
            instance.stop()
            ended.join()
        assert not stage.node.run(["nft", "list", "tables"]).stdout


def _reached(server: CountingServer, goal: int) -> bool:
    return server.accepted >= goal


def _back(instance: Instance, before: dict[str, int], victim: str) -> bool:
    """Whether there is another process in the victim's place, and the others are the same; with a supervisor go its children."""
    now = process_ids(instance)
    new = set(now.values()) - set(before.values())
    if victim == "supervisor":
        return (
            sorted(now) == sorted(before)
            and new == set(now.values()) - {before["guardian"]}
            and _revision(instance) != ""
        )
    return sorted(now) == sorted(before) and len(new) == 1 and (victim != "agent" or now["agent"] in new)


def _revision(instance: Instance) -> str:
    """What is enforced, as the agent says; "" while there is none."""
    try:
        return read_status(str(instance.state)).revision
    except NotRunning:
        return ""
