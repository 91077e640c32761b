"""How the processes of a node speak to people: one line an event, on standard error."""

from __future__ import annotations

import logging
import sys


def start(process: str, level: str) -> None:
    """Log lines of level and above go to standard error as `TIME LEVEL process: text`. Raises ValueError for an unknown level."""
    handler = logging.StreamHandler(sys.stderr)
    line = logging.Formatter(f"%(asctime)s.%(msecs)03d %(levelname)s {process}: %(message)s", "%Y-%m-%dT%H:%M:%S")
    handler.setFormatter(line)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
