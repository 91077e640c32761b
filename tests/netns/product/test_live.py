"""Live connections and a policy that changes: each is decided again; who is still allowed notices nothing, who is not ends soon."""

from __future__ import annotations

import os
import random
import socket
import statistics
import threading
import time
from pathlib import Path

from pellucid_cli.lab.clients import get
from pellucid_cli.lab.servers import Arrival, speak_http
from pellucid_cli.lab.topology import Namespace

from ..world import eventually
from .conftest import Figure
from .stage import CountingServer, Load, Stage, pod_objects, policy, wait_for_records

EDIT_S = float(os.environ.get("PELLUCID_EDIT_SECONDS", "8"))
"""How long edits go on, a thousand a minute."""
EDITS_A_MINUTE = 1000
LIMIT_S = 1.0
PATIENCE_S = 30.0
SEED = 17
PROBE, SITE = "probe.example", "site.example"
VICTIMS_A_SECOND = 2


def speak_patiently(client: socket.socket, arrival: Arrival) -> None:
    """HTTP, however long the client is silent."""
    client.settimeout(None)
    speak_http(client, arrival)


class Live:
    """One HTTP connection that stays open. ended_at: time.monotonic() of its end, 0: it lives. Close it by the `with`."""

    def __init__(self, pod: Namespace, address: str, name: str, port: int = 8080) -> None:
        self.name = name
        self.ended_at = 0.0
        self.answers = 0
        self.reset = False
        self._socket = pod.connect(address, port, timeout_s=PATIENCE_S)

    def ask(self) -> bool:
        """Whether a request is answered."""
        try:
            self._socket.sendall(f"GET / HTTP/1.1\r\nHost: {self.name}\r\n\r\n".encode())
            if self._socket.recv(65536).startswith(b"HTTP/1.1 200"):
                self.answers += 1
                return True
        except OSError:
            pass
        return False

    def wait(self) -> None:
        """Returns when it has ended, without having sent a byte."""
        try:
            self._socket.settimeout(None)
            self._socket.recv(65536)
        except OSError:
            self.reset = True
        self.ended_at = time.monotonic()

    def close(self) -> None:
        self._socket.close()


def _text(number: int, shut: int) -> str:
    """Edit number: victims below shut are blocked. The proxy says the number to who asks for PROBE."""
    blocked = ", ".join(f"{{domain: v{each}.example}}" for each in range(shut))
    return policy(
        f"""
  - name: probe
    match: {{destinations: [{{domain: {PROBE}}}]}}
    action: Block
    block: {{response: Respond, status: 403, body: "{number}"}}
"""
        + (f"  - {{name: shut, match: {{destinations: [{blocked}]}}, action: Block}}\n" if blocked else "")
        + f"""  - {{name: site, match: {{destinations: [{{domain: {SITE}}}, {{domain: "*.example"}}]}}, action: Allow}}
  - {{match: {{}}, action: Block}}
"""
    )


class Seen:
    """Which edit is in force, asked again and again by a thread of its own. delays: by edit, from written to seen."""

    def __init__(self, pod: Namespace, address: str) -> None:
        self.written: list[float] = []
        self.delays: list[float] = []
        self._pod, self._address = pod, address
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            said = get(self._pod, self._address, 80, PROBE).text
            now = time.monotonic()
            number = int(said.partition(" ")[2] or -1)
            while len(self.delays) <= number < len(self.written):
                self.delays.append(now - self.written[len(self.delays)])

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def test_a_thousand_edits_a_minute_reset_nobody_who_is_allowed(tmp_path: Path, figure: Figure) -> None:
    edits, interval = int(EDIT_S * EDITS_A_MINUTE / 60), 60 / EDITS_A_MINUTE
    victims = int(EDIT_S * VICTIMS_A_SECOND)
    with Stage(tmp_path) as stage, CountingServer(stage["web"], 80) as server:
        stage.serve("other", {8080: speak_patiently})
        a, b, web, other = stage["a"], stage["b"], stage["web"], stage["other"]
        stage.write("pods.yaml", pod_objects({"a": (*a.addresses, *b.addresses)}))
        stage.write("policy.yaml", _text(0, 0))
        with stage.run("--workers", "1") as instance:
            shut = [Live(b, other.addresses[at % 2], f"v{at}.example") for at in range(victims)]
            stay = [Live(b, other.addresses[at % 2], f"s{at}.example") for at in range(20)]
            assert all(each.ask() for each in (*shut, *stay))
            waiting = [threading.Thread(target=each.wait, daemon=True) for each in shut]
            for thread in waiting:
                thread.start()
            seen = Seen(b, web.ipv4)
            blocked_at: list[float] = []
            with Load(a, web.addresses, 80, SITE, parallel=2) as load:
                begun = time.monotonic()
                for number in range(edits):
                    count = (number + 1) * victims // edits
                    written = stage.write("policy.yaml", _text(number, count))
                    seen.written.append(written)
                    blocked_at += [written] * (count - len(blocked_at))
                    assert stay[number % len(stay)].ask(), "a live connection that is allowed was cut"
                    pause = begun + (number + 1) * interval - time.monotonic()
                    if pause > 0:  # the rate is what is tested
                        time.sleep(pause)
                took = time.monotonic() - begun
                assert eventually(lambda: len(seen.delays) == edits, PATIENCE_S), (len(seen.delays), edits)
            seen.stop()
            for thread in waiting:
                thread.join(PATIENCE_S)
            assert all(each.ended_at for each in shut), "a live connection that is denied goes on"
            assert all(each.ask() for each in stay)
            ends = [each.ended_at - at for each, at in zip(shut, blocked_at, strict=True)]
            ended = [each for each in wait_for_records(instance, 0) if each["ended"]["why"] == "PolicyChanged"]
            assert eventually(
                lambda: sum(r["ended"]["why"] == "PolicyChanged" for r in wait_for_records(instance, 0)) == victims
            ), len(ended)
            for each in (*shut, *stay):
                each.close()
    connections = sum(load.ended.values())
    figure(
        "a thousand edits a minute",
        f"{edits} edits in {took:.0f} s during {connections} connections; {connections - load.ended.get('ok', 0)} of them and 0 of "
        f"{len(stay)} live ones that are allowed were reset; enforced after p50 {statistics.median(seen.delays) * 1000:.0f} ms, "
        f"p99 {_percentile(seen.delays, 0.99) * 1000:.0f} ms; {victims} of {victims} live ones that are denied ended, after p50 "
        f"{statistics.median(ends) * 1000:.0f} ms, max {max(ends) * 1000:.0f} ms",
    )
    assert load.ended == {"ok": connections}
    assert server.accepted == connections
    assert _percentile(seen.delays, 0.99) < LIMIT_S
    assert _percentile(ends, 0.99) < LIMIT_S


def test_live_connections_end_with_their_pod_when_its_address_is_another_pods_at_once(
    tmp_path: Path, figure: Figure
) -> None:
    draw = random.Random(SEED)
    moves, each_time = 10, 4
    with Stage(tmp_path) as stage:
        stage.serve("other", {8080: speak_patiently})
        pod, other = stage["a"], stage["other"]
        names = "  - {match: {destinations: [{domain: '*.example'}]}, action: Allow}\n"
        stage.write("policy.yaml", policy(names, name="one", pod="one") + policy(names, name="two", pod="two"))
        always = {"one-2": ("10.244.1.201",), "two-2": ("10.244.1.202",)}
        stage.write("pods.yaml", pod_objects({"one": pod.addresses, **always}))
        ends: list[float] = []
        wrong: list[str] = []
        with stage.run("--workers", "1") as instance:
            for move in range(moves):
                old, new = ("one", "two") if move % 2 == 0 else ("two", "one")
                live = [Live(pod, draw.choice(other.addresses), f"m{move}.example") for _ in range(each_time)]
                assert all(each.ask() for each in live)
                waiting = [threading.Thread(target=each.wait, daemon=True) for each in live]
                for thread in waiting:
                    thread.start()
                written = stage.write("pods.yaml", pod_objects({new: pod.addresses, **always}))
                for thread in waiting:
                    thread.join(PATIENCE_S)
                ends += [each.ended_at - written for each in live if each.ended_at]
                wrong += [f"move {move}: a connection of {old} goes on" for each in live if not each.ended_at]
                found = [
                    r
                    for r in wait_for_records(instance, (move + 1) * each_time)
                    if r["destination"]["name"] == f"m{move}.example"
                ]
                wrong += [
                    f"move {move}: {r}" for r in found if (r["ended"]["why"], r["source"]["pod"]) != ("PodChanged", old)
                ]
                for each in live:
                    each.close()
    figure(
        "an address is used again at once",
        f"{len(ends)} of {moves * each_time} live connections of the pod before ended, after p50 "
        f"{statistics.median(ends) * 1000:.0f} ms, max {max(ends) * 1000:.0f} ms; {len(wrong)} went on or got another pod's verdict",
    )
    assert wrong == []
    assert _percentile(ends, 0.99) < LIMIT_S
