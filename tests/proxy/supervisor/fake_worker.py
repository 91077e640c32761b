"""A worker that carries nothing: it tells what it was given and lives until SIGTERM, or as FAKE_WORKER says."""

from __future__ import annotations

import argparse
import os
import signal
import socket

import msgspec

from pellucid_proxy.control import MAX_MESSAGE, Drain, ToWorker
from pellucid_proxy.worker_config import WorkerConfig, die_with_parent, read_config


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config-fd", type=int, required=True)
    config = read_config(parser.parse_args().config_fd, WorkerConfig)
    die_with_parent(config.parent)
    listening = [
        socket.socket(fileno=fd).getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) for fd in config.listeners
    ]
    flows = config.flows >= 0 and os.write(config.flows, b"{}\n") == 3
    control = socket.socket(fileno=config.control)
    told = f"worker {config.index} up {os.getpid()} node {config.node} listening {listening} flows {flows}\n"
    os.write(1, told.encode())
    if os.environ.get("FAKE_WORKER") == "dies" and config.index == 1:
        control.setblocking(True)
        os.kill(os.getpid(), signal.SIGSEGV)
    control.setblocking(True)
    while packet := control.recv(MAX_MESSAGE):  # its end: the agent is gone, and a worker goes on without
        message = msgspec.msgpack.decode(packet, type=ToWorker)
        os.write(1, f"worker {config.index} got {message}\n".encode())
        if isinstance(message, Drain):
            return 0
    signal.pause()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
