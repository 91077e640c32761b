"""A pod may connect before anybody knows that it is there; and canaries of every kind of pod."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pellucid_cli.lab.clients import Answer, get
from pellucid_cli.lab.instance import Instance
from pellucid_cli.lab.servers import speak_http
from pellucid_proxy.agent import last_good
from pellucid_proxy.settings import NodeSettings

from ..world import eventually
from .conftest import Figure
from .stage import INSTALLATION, VERSIONS, Stage, address_of, metric, pod_objects, policy, records, wait_for_records

METRICS = "127.0.0.1:9464"
GOOD, BAD = "good.example", "bad.example"
RULES = policy(f"""
  - {{name: good, match: {{destinations: [{{domain: {GOOD}}}]}}, action: Allow}}
  - {{name: rest, match: {{}}, action: Block}}
""")
HOLD_S = 2.0


def installation(then: str) -> str:
    return INSTALLATION.replace("spec: {", f"spec: {{unknownPods: {{hold: 2s, then: {then}}}, ")


class Asking:
    """Connections that are under way: pod a asks the server for names over both families."""

    def __init__(self, stage: Stage, name: str) -> None:
        self._threads = ThreadPoolExecutor(2)
        self._began = time.monotonic()
        self._asked = [self._threads.submit(self._ask, stage, version, name) for version in VERSIONS]

    def _ask(self, stage: Stage, version: int, name: str) -> tuple[Answer, float]:
        answer = get(stage["a"], address_of(stage["web"], version), 80, name)
        return answer, time.monotonic()

    def answered(self) -> list[tuple[str, float]]:
        """How each ended, and how many seconds after it began."""
        found = [each.result(30) for each in self._asked]
        self._threads.shutdown()
        return [(answer.end, at - self._began) for answer, at in found]


def test_a_pod_that_connects_before_it_is_known_waits_and_is_then_held_to_its_policy(
    tmp_path: Path, figure: Figure
) -> None:
    with Stage(tmp_path) as stage:
        stage.serve("web", {80: speak_http})
        stage.write("installation.yaml", installation("Allow"))
        stage.write("policy.yaml", RULES)
        pods = {name: pod.addresses for name, pod in stage.topology.pods.items()}
        delays: list[float] = []
        with stage.run("--workers", "1", "--metrics", METRICS) as instance:
            for name, end in ((BAD, "reset"), (GOOD, "answered")):
                stage.write("pods.yaml", pod_objects({"b": pods["b"]}))
                assert eventually(lambda: "a" not in _known(instance), 10)
                before = len(stage.journal)
                asking = Asking(stage, name)
                assert eventually(lambda: metric(stage, "connections_pending") >= 2, 10)
                assert len(stage.journal) == before, "nothing reached the server before the pod was known"
                written = stage.write("pods.yaml", pod_objects(pods))
                ends = asking.answered()
                delays.append(max(at for _, at in ends) + asking._began - written)
                assert [each for each, _ in ends] == [end] * 2
                assert eventually(lambda: "a" in _known(instance), 10)
                assert len(stage.journal) - before == (2 if end == "answered" else 0)
            assert eventually(lambda: _waited(stage) == {"known": 4, "expired": 0})
            told = [each for each in wait_for_records(instance, 4) if each["source"]["pod"] == "a"]
            assert {each["verdict"] for each in told} == {"Allow", "Block"}, "decided as the pod's, and recorded so"
    figure(
        "pods that connect before they are known",
        f"4 of 4 held, 0 of 2 forbidden ones reached the server, decided {max(delays) * 1000:.0f} ms after the object was written at most",
    )
    assert max(delays) < 1.0


@pytest.mark.parametrize("then", ["Allow", "Block"])
def test_who_stays_unknown_is_held_for_two_seconds(tmp_path: Path, then: str) -> None:
    with Stage(tmp_path) as stage:
        stage.serve("web", {80: speak_http})
        stage.write("installation.yaml", installation(then))
        stage.write("policy.yaml", RULES)
        stage.write("pods.yaml", pod_objects({"b": stage["b"].addresses}))
        with stage.run("--workers", "1", "--metrics", METRICS):
            ends = Asking(stage, BAD).answered()
            assert [end for end, _ in ends] == ["answered" if then == "Allow" else "reset"] * 2
            assert all(HOLD_S <= seconds < HOLD_S + 1 for _, seconds in ends)
            assert len(stage.journal) == (2 if then == "Allow" else 0)
            assert eventually(lambda: _waited(stage) == {"known": 0, "expired": 2})


def test_a_canary_of_any_pod_is_answered_by_a_worker(tmp_path: Path, figure: Figure) -> None:
    """Of one that no policy selects, one that may do nothing, and one that nobody knows; while the run is there, and never else."""
    answered = 0
    canaries = NodeSettings(scope=()).canary
    with Stage(tmp_path, pods=("a", "b", "stranger")) as stage:
        stage.write("policy.yaml", policy("  - {match: {}, action: Block}", spec="failureMode: Closed"))
        stage.write("pods.yaml", pod_objects({name: stage[name].addresses for name in ("a", "b")}))
        with stage.run("--workers", "1", "--metrics", METRICS, "--node", "node-7") as instance:
            for name in ("a", "b", "stranger"):
                for address in canaries:
                    answer = get(stage[name], address, 80, "canary")
                    answered += answer.end == "answered" and answer.text.split()[-1] == "node-7"
            counted = sum(metric(stage, f'canary_answers_total{{family="{family}"}}') for family in ("IPv4", "IPv6"))
            assert records(instance) == []
        assert get(stage["b"], canaries[0], 80, "canary").end != "answered"
    figure("canaries", f"{answered} of 6 answered by a worker, {counted:.0f} counted")
    assert (answered, counted) == (6, 6)


def _waited(stage: Stage) -> dict[str, float]:
    return {each: metric(stage, f'unknown_pods_total{{outcome="{each}"}}') for each in ("known", "expired")}


def _known(instance: Instance) -> list[str]:
    """The pods of what is enforced."""
    return [pod.name for pod in last_good.load(str(instance.state)).policy.pods]
