"""Pods come and go, and change their labels: addresses get the verdicts of who has them now, by set elements alone."""

from __future__ import annotations

import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from pellucid_cli.lab.clients import TlsSession, get
from pellucid_cli.lab.instance import Instance
from pellucid_cli.lab.servers import speak_http, speak_https

from ..world import eventually
from .conftest import Figure
from .stage import Stage, pod_objects, policy, records

SITE = "site.example"
SEED, MOVES, LIMIT_S = 5, 30, 1.0
NAMES = f"destinations: [{{domain: {SITE}}}, {{domain: '*.{SITE}'}}]"
POLICIES = policy(f"  - {{name: welcome, match: {{{NAMES}}}, action: Allow}}", name="open", pod="friend")
POLICIES += policy(f"  - {{name: unwelcome, match: {{{NAMES}}}, action: Block}}", name="shut", pod="stranger")
ALWAYS = {"friend-2": ("10.244.1.201",), "stranger-2": ("10.244.1.202",)}
"""So that no policy is ever without a pod: the rules, which depend on the policies in use, stay as they are."""
EXPECTED = {"friend": ("answered", "welcome"), "stranger": ("reset", "unwelcome")}


def _handle(stage: Stage) -> int:
    """Of a rule in the kernel: another one if rules were loaded anew."""
    said = json.loads(stage.node.run(["nft", "-j", "-a", "list", "chain", "inet", "pellucid", "judge"]).stdout)
    return max(entry["rule"]["handle"] for entry in said["nftables"] if "rule" in entry)


def test_an_address_gets_no_verdict_of_the_pod_that_had_it(tmp_path: Path, figure: Figure) -> None:
    draw = random.Random(SEED)
    with Stage(tmp_path) as stage:
        stage.serve("web", {80: speak_http, 443: speak_https})
        pod, web = stage["a"], stage["web"]
        stage.write("policy.yaml", POLICIES)
        stage.write("pods.yaml", pod_objects({"friend": pod.addresses, "stranger": stage["b"].addresses, **ALWAYS}))
        delays: list[float] = []
        wrong: list[str] = []
        with stage.run("--workers", "1") as instance, TlsSession(pod, web.ipv4, 443, SITE) as live:
            handle, owner = _handle(stage), "friend"
            for move in range(MOVES):
                owner = "stranger" if owner == "friend" else "friend"
                other = {"friend": "stranger", "stranger": "friend"}[owner]
                # The pod that had the addresses has others now, or is gone.
                rest = {other: stage["b"].addresses} if draw.random() < 0.5 else {}
                written = stage.write("pods.yaml", pod_objects({owner: pod.addresses, **rest, **ALWAYS}))
                address = draw.choice(web.addresses)
                end, rule = EXPECTED[owner]
                assert eventually(lambda address=address, end=end: get(pod, address, 80, SITE).end == end)  # type: ignore[misc]
                delays.append(time.monotonic() - written)
                name = f"move{move}.{SITE}"
                ends = [get(pod, each, 80, name).end for each in web.addresses for _ in range(5)]
                if ends != [end] * len(ends):
                    wrong.append(f"move {move} to {owner}: {ends}")
                assert eventually(lambda name=name, ends=ends: len(_named(instance, name)) == len(ends))  # type: ignore[misc]
                wrong += [
                    f"move {move} to {owner}: {each}" for each in _named(instance, name) if _of(each) != (owner, rule)
                ]
            assert _handle(stage) == handle, "rules were loaded anew"
            assert live.request().end != "answered", "a connection goes on for another pod"
            stage.write(
                "policy.yaml", POLICIES.replace("action: Block}", "action: Block}\n  - {match: {}, action: Allow}")
            )
            assert eventually(lambda: _handle(stage) != handle), "the handle tells nothing"
        ranked = sorted(delays)
        figure(
            "pods come and go",
            f"{MOVES} moves, {len(wrong)} verdicts of the old pod afterwards, no rule loaded anew; enforced after "
            f"p50 {statistics.median(ranked) * 1000:.0f} ms, max {ranked[-1] * 1000:.0f} ms (seed {SEED})",
        )
        assert wrong == []
        assert ranked[-1] < LIMIT_S


def _named(instance: Instance, name: str) -> list[dict[str, Any]]:
    return [record for record in records(instance) if record["destination"]["name"] == name]


def _of(record: dict[str, Any]) -> tuple[str, str]:
    return record["source"]["pod"], record["policy"]["rule"]
