"""python -m pellucid_proxy.agent --config-fd N; the supervisor starts it."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal

import uvloop

from ..supervisor import logs
from ..supervisor.messages import AgentConfig
from ..worker_config import die_with_parent, read_config
from .data_path import refuse_unfit
from .main import Node, serve


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="pellucid-agent", description="The agent of pellucid run; the supervisor starts it."
    )
    parser.add_argument("--config-fd", type=int, required=True)
    config = read_config(parser.parse_args().config_fd, AgentConfig)
    die_with_parent(config.parent)
    logs.start("agent", config.options.log_level)
    logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it tells of every change
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # a service manager sends them to all: the supervisor says what to do
        signal.signal(number, signal.SIG_IGN)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(config, Node(refuse_unfit)))


if __name__ == "__main__":
    raise SystemExit(main())
