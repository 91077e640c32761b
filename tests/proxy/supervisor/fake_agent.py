"""An agent that enforces nothing and tells, a line an event, what the supervisor says. FAKE_AGENT chooses how it behaves."""

from __future__ import annotations

import argparse
import os
import signal
import socket

import msgspec

from pellucid_proxy.settings import NodeSettings
from pellucid_proxy.supervisor.messages import (
    MAX_PACKET,
    AgentConfig,
    Configured,
    Ready,
    ReopenFlows,
    Stop,
    ToAgent,
    WorkerStarted,
)
from pellucid_proxy.worker_config import die_with_parent, read_config

WORKERS = 2


def tell(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config-fd", type=int, required=True)
    config = read_config(parser.parse_args().config_fd, AgentConfig)
    die_with_parent(config.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    behaviour = os.environ.get("FAKE_AGENT", "")
    tell(f"agent up {os.getpid()} group {os.getpgid(0) == os.getpid()}")
    if behaviour.startswith("exit "):
        return int(behaviour.removeprefix("exit "))
    channel = socket.socket(fileno=config.channel)
    channel.setblocking(True)
    settings = NodeSettings(scope=("192.0.2.0/24",), workers=WORKERS)
    channel.send(msgspec.msgpack.encode(Configured(settings, "node-1", (b"\x7f\0\0\1",))))
    started = 0
    while True:
        packet, descriptors, _, _ = socket.recv_fds(channel, MAX_PACKET, 4)
        if not packet:
            return 9
        message = msgspec.msgpack.decode(packet, type=ToAgent)
        tell(f"agent got {message} and {len(descriptors)} descriptors")
        if isinstance(message, WorkerStarted):
            started += 1
            if started == WORKERS and behaviour != "unready":
                channel.send(msgspec.msgpack.encode(Ready("rev-1")))
        elif isinstance(message, ReopenFlows) and behaviour == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        elif isinstance(message, Stop) and behaviour != "hangs" and (message.drain_s == 0 or message.keep_rules):
            return 0


if __name__ == "__main__":
    raise SystemExit(main())
