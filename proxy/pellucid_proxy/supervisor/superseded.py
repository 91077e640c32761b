"""Which instances have handed over to another one: whoever starts them again shall not have them take its place in turn.

In a container that is started again when it ends – a pod whose successor runs already, until it is deleted – the old version would take
over from the new one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import time

from .options import RunOptions

log = logging.getLogger(__name__)

NAME = "superseded.json"
MOST = 32
LOOK_S = 0.5


def supersede(options: RunOptions) -> None:
    """This instance has handed over. Nothing where it has no name of its own."""
    if not options.instance:
        return
    path = os.path.join(options.state, NAME)
    names = [*(name for name in _names(options.state) if name != options.instance), options.instance][-MOST:]
    try:
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            json.dump(names, file)
        os.replace(f"{path}.new", path)
    except OSError as err:
        log.warning("--state: %s cannot be written: %s", path, err.strerror)


def wait_while_superseded(options: RunOptions) -> None:
    """Returns when this instance may run: it never handed over, or nobody runs any more to whom it did."""
    if not options.instance or options.instance not in _names(options.state):
        return
    told = False
    while _held(options.state):
        if not told:
            log.info("instance %s has handed over to one that runs: waiting, for its end or for mine", options.instance)
            told = True
        time.sleep(LOOK_S)


def _names(state: str) -> list[str]:
    with contextlib.suppress(OSError, ValueError):
        with open(os.path.join(state, NAME), encoding="utf-8") as file:
            found = json.load(file)
        if isinstance(found, list):
            return [each for each in found if isinstance(each, str)]
    return []


def _held(state: str) -> bool:
    """Whether an instance has the state folder's lock."""
    try:
        fd = os.open(os.path.join(state, "lock"), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
