"""Listening sockets, opened in a sandbox of their own: transparent sockets need rights that tests may not have outside."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

CASES = {
    "options": """
        for listener in open_listeners(settings):
            family = listener.family == socket.AF_INET6
            level, option = (socket.IPPROTO_IPV6, 75) if family else (socket.IPPROTO_IP, 19)
            print(listener.getsockname()[:2], "transparent", listener.getsockopt(level, option),
                  "nodelay", listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY),
                  "reuseport", listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT), "blocking", listener.getblocking())
    """,
    "nodelay is inherited": """
        listener = open_listeners(settings)[0]
        client = socket.create_connection(listener.getsockname())
        print(listener.accept()[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
    """,
    "taken": """
        held = socket.create_server(("::1", 15001), family=socket.AF_INET6)
        try:
            open_listeners(settings)
        except Refusal as refusal:
            print(refusal.status, refusal)
        socket.create_server(("127.0.0.1", 15001))  # the first one was closed
    """,
    "no rights": """
        import ctypes
        ctypes.CDLL(None).unshare(0x10000000)  # a user namespace without id maps: no capability over this network namespace
        try:
            open_listeners(settings)
        except Refusal as refusal:
            print(refusal.status, refusal)
    """,
}

HEAD = """
from pellucid_cli.lab import sandbox
sandbox.enter()
import socket
from pellucid_proxy.settings import NodeSettings
from pellucid_proxy.supervisor.listeners import open_listeners
from pellucid_proxy.supervisor.options import Refusal
settings = NodeSettings(scope=("10.0.0.0/8", "fd00::/8"))
"""


def in_sandbox(case: str) -> str:
    body = "\n".join(line[8:] for line in CASES[case].splitlines())
    done = subprocess.run(
        [sys.executable, "-c", HEAD + body],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_listeners_are_transparent_and_on_loopback_only() -> None:
    assert in_sandbox("options").splitlines() == [
        "('127.0.0.1', 15001) transparent 1 nodelay 1 reuseport 0 blocking False",
        "('::1', 15001) transparent 1 nodelay 1 reuseport 0 blocking False",
    ]


def test_accepted_sockets_inherit_nodelay() -> None:
    assert in_sandbox("nodelay is inherited") == "1"


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (
            "taken",
            "1 listener [::1]:15001: the port is taken, perhaps by another pellucid; `ss -ltnp` names the process to stop",
        ),
        (
            "no rights",
            "3 listener 127.0.0.1:15001: no right to open a transparent socket; run as root, or with NET_ADMIN and NET_RAW",
        ),
    ],
)
def test_a_refusal_says_the_cure(case: str, said: str) -> None:
    assert in_sandbox(case) == said


def test_ipv6_transparent_is_what_the_kernel_calls_it() -> None:
    assert not hasattr(socket, "IPV6_TRANSPARENT"), "the socket module knows it now: use its name"
