"""What a run knows of the kernel, kept in the state folder for whoever comes after it: the next agent, or `pellucid cleanup`."""

from __future__ import annotations

import contextlib
import os

import msgspec

NAME = "kernel.json"


class Trace(msgspec.Struct, frozen=True):
    """generation: of nftables, when all of our table was last known to be as it should; None: not known.

    sysctls: values before this run changed them."""

    generation: int | None = None
    sysctls: dict[str, str] = {}


def read(state: str) -> Trace:
    """What the last run left in folder state; nothing where it cannot be read: it is a hint, and believed only where the kernel agrees."""
    try:
        with open(os.path.join(state, NAME), "rb") as file:
            return msgspec.json.decode(file.read(1 << 16), type=Trace)
    except (OSError, msgspec.MsgspecError):
        return Trace()


def write(state: str, trace: Trace) -> None:
    """Replaces it. Raises OSError."""
    path = os.path.join(state, NAME)
    with open(f"{path}.new", "wb") as file:
        file.write(msgspec.json.encode(trace))
    os.replace(f"{path}.new", path)


def remove(state: str) -> None:
    """There is none."""
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(state, NAME))
