"""python -m pellucid_proxy.agent --config-fd N; the supervisor starts it."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal

import uvloop

from ..rights.confine import NotConfined, confine
from ..rights.table import AGENT
from ..supervisor import logs
from ..supervisor.messages import AgentConfig
from ..supervisor.options import REFUSED
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
    try:
        confine(AGENT)
    except NotConfined as err:
        logging.getLogger(__name__).error("%s: ending rather than to go on with more rights than an agent has", err)
        return REFUSED
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(config, Node(refuse_unfit)))


if __name__ == "__main__":
    raise SystemExit(main())
