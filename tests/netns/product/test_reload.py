"""A change of the folder under load: nobody notices but those whom it means, and these within a second."""

from __future__ import annotations

import os
import random
import statistics
import time
from pathlib import Path

from pellucid_cli.lab.clients import Answer, get
from pellucid_cli.lab.servers import speak_http
from pellucid_cli.lab.topology import Namespace

from ..world import eventually
from .conftest import Figure
from .stage import INSTALLATION, CountingServer, Load, Stage, pod_objects, policy

SWAPS, CONNECTIONS = 200, 20_000
LIMIT_S = 1.0
SEED = 3
PROBE, SITE = "probe.example", "site.example"


def _revision(number: int, door: str) -> str:
    """The kernel decides at the door: server other refuses or answers; the proxy says the number to who asks for PROBE."""
    return policy(f"""
  - {{name: door, match: {{destinations: [{{cidr: {door}/32}}]}}, action: {"Allow" if number % 2 else "Block"}}}
  - name: probe
    match: {{destinations: [{{domain: {PROBE}}}]}}
    action: Block
    block: {{response: Respond, status: 403, body: "revision {number}"}}
  - {{name: site, match: {{destinations: [{{domain: {SITE}}}]}}, action: Allow}}
  - {{match: {{}}, action: Block}}
""")


class Folder:
    """What `--policy` names: a symbolic link, swapped as a whole as kubelet does, or one file in it, as an editor does."""

    def __init__(self, home: Path, pods: str) -> None:
        self.link = home / "live"
        self._home = home
        self._pods = pods
        self._made = 0

    def swap_whole(self, text: str) -> float:
        """Returns time.monotonic() when it was done."""
        self._made += 1
        folder = self._home / f"v{self._made}"
        folder.mkdir()
        for name, content in (("installation.yaml", INSTALLATION), ("pods.yaml", self._pods), ("policy.yaml", text)):
            (folder / name).write_text(content)
        draft = self._home / "draft"
        draft.symlink_to(folder.name)
        os.replace(draft, self.link)
        return time.monotonic()

    def swap_file(self, text: str) -> float:
        """Returns time.monotonic() when it was done."""
        draft = self._home / "draft.yaml"
        draft.write_text(text)
        os.replace(draft, self.link.resolve() / "policy.yaml")
        return time.monotonic()


def test_two_hundred_swaps_under_load_fail_no_connection_and_are_enforced_in_a_second(
    tmp_path: Path, figure: Figure
) -> None:
    draw = random.Random(SEED)
    with Stage(tmp_path) as stage, CountingServer(stage["web"], 80) as server:
        stage.serve("other", {80: speak_http})
        a, b, web, door = stage["a"], stage["b"], stage["web"], stage["other"].ipv4
        # Pod b asks, pod a works; both are a to the policy.
        pods = pod_objects({"a": (*a.addresses, *b.addresses)})
        folder = Folder(tmp_path, pods)
        folder.swap_whole(_revision(0, door))
        delays: list[float] = []
        stale: list[str] = []
        with stage.run(policy=folder.link) as instance:
            with Load(a, web.addresses, 80, SITE, parallel=4) as load:
                for number in range(1, SWAPS + 1):
                    swap = folder.swap_whole if draw.random() < 0.1 else folder.swap_file
                    written = swap(_revision(number, door))
                    delays.append(_enforced(b, web.ipv4, door, number, written))
                    again = _asked(b, web.ipv4), _at_the_door(b, door)
                    if again != (f"403 revision {number}", _expected_at_the_door(number)):
                        stale.append(f"swap {number}: {again} after it had been enforced")
                assert eventually(lambda: server.accepted >= CONNECTIONS, 90.0), server.accepted
            assert instance.running
    connections = sum(load.ended.values())
    ranked = sorted(delays)
    figure(
        "policy reload",
        f"{SWAPS} swaps during {connections} connections, {connections - load.ended.get('ok', 0)} failed; enforced after "
        f"p50 {statistics.median(ranked) * 1000:.0f} ms, p99 {ranked[int(len(ranked) * 0.99) - 1] * 1000:.0f} ms, "
        f"max {ranked[-1] * 1000:.0f} ms (seed {SEED})",
    )
    assert load.ended == {"ok": connections}
    assert server.accepted == connections >= CONNECTIONS
    assert stale == []
    assert ranked[-1] < LIMIT_S


def _enforced(pod: Namespace, address: str, door: str, number: int, written: float) -> float:
    """Seconds from written until both the proxy and the kernel decide by that revision; infinite if they do not within ten limits."""
    waiting = {
        "proxy": lambda: _asked(pod, address) == f"403 revision {number}",
        "kernel": lambda: _at_the_door(pod, door) == _expected_at_the_door(number),
    }
    while waiting and time.monotonic() - written < 10 * LIMIT_S:
        waiting = {who: holds for who, holds in waiting.items() if not holds()}
    return float("inf") if waiting else time.monotonic() - written


def _asked(pod: Namespace, address: str) -> str:
    return get(pod, address, 80, PROBE).text


def _at_the_door(pod: Namespace, address: str) -> str:
    answer: Answer = get(pod, address, 80, SITE)
    return answer.end


def _expected_at_the_door(number: int) -> str:
    return "answered" if number % 2 else "refused"
