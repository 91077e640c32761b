"""A pod that has all the connections it may have: its next ones are refused, its old ones and other pods' go on."""

from __future__ import annotations

import socket
from pathlib import Path

from pellucid_cli.lab.clients import get
from pellucid_cli.lab.servers import speak_http
from pellucid_cli.lab.topology import Namespace
from tests.netns.world import eventually

from .conftest import Figure
from .stage import INSTALLATION, Stage, policy, wait_for_records

LIMIT, TOO_MANY = 20, 10
NAME = "site.example"
RULES = policy(f"  - {{name: site, match: {{destinations: [{{domain: {NAME}}}]}}, action: Allow}}", pod="a") + policy(
    f"  - {{name: site, match: {{destinations: [{{domain: {NAME}}}]}}, action: Allow}}", name="q", pod="b"
)
REQUEST = f"GET / HTTP/1.1\r\nHost: {NAME}\r\n\r\n".encode()


def _answered(connection: socket.socket) -> bool:
    """Whether one more request on it gets an answer; False: it is reset or ended."""
    try:
        connection.sendall(REQUEST)
        return connection.recv(4096).startswith(b"HTTP/1.1 200")
    except ConnectionError:
        return False


def _open(pod: Namespace, address: str) -> socket.socket:
    connection = pod.connect(address, 80)
    connection.settimeout(20)
    return connection


def _admitted(pod: Namespace, address: str) -> bool:
    """Whether a new connection gets an answer. A reset may be there before connect() returns."""
    try:
        with _open(pod, address) as connection:
            return _answered(connection)
    except ConnectionResetError:
        return False


def test_past_its_limit_a_pod_gets_no_new_connection_and_keeps_the_old(tmp_path: Path, figure: Figure) -> None:
    with Stage(tmp_path) as stage:
        stage.serve("web", {80: speak_http})
        stage.write("policy.yaml", RULES)
        stage.write(
            "installation.yaml", INSTALLATION.replace("spec: {", f"spec: {{limits: {{connectionsPerPod: {LIMIT}}}, ")
        )
        a, b, web = stage["a"], stage["b"], stage["web"]
        with stage.run("--workers", "1") as instance:
            # Silent ones of both families; only their own requests tell which were admitted
            opened = [_open(a, web.addresses[n % 2]) for n in range(LIMIT)]
            admitted = [_answered(each) for each in opened].count(True)
            refused = [_admitted(a, web.addresses[n % 2]) for n in range(TOO_MANY)].count(False)
            arrived = len(stage.journal.arrivals())
            others = sum(get(b, web.addresses[n % 2], 80, NAME).end == "answered" for n in range(5))
            alive = [_answered(each) for each in opened].count(True)
            told = [each for each in wait_for_records(instance, TOO_MANY) if each["reason"] == "LimitReached"]
            opened.pop().close()
            again = eventually(lambda: get(a, web.ipv4, 80, NAME).end == "answered", 10)
            for each in opened:
                each.close()
    figure(
        "limit of a pod",
        f"{admitted} of {LIMIT} admitted, {refused} of {TOO_MANY} more reset, {alive} of {LIMIT} old ones go on, "
        f"{others} of 5 of another pod answered, {len(told)} recorded as LimitReached",
    )
    assert (admitted, refused, alive, others, len(told)) == (LIMIT, TOO_MANY, LIMIT, 5, TOO_MANY)
    assert arrived <= LIMIT
    assert {each["source"]["pod"] for each in told} == {"a"}
    assert again
