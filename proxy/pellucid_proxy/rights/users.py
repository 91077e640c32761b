"""Whose the workers are: a user of their own where this machine has one to give."""

from __future__ import annotations

import os
import platform
import pwd
import re
from pathlib import Path

import msgspec

from .confine import SECCOMP, USER, can_filter, capabilities_held
from .syscalls import architecture
from .table import AGENT, SUPERVISOR

NAME = "pellucid-worker"
"""The system user whose the workers are where it exists."""
NUMBER = 61001
"""User and group id where it does not: of 60706-61183, which systemd leaves unused (systemd.io/UIDS-GIDS) and most containers have."""
SAME = "same"


class Unfit(Exception):
    """Workers cannot be confined as they must be here; says why, and the cure. usage: it is the wish that is wrong."""

    def __init__(self, message: str, *, usage: bool = False) -> None:
        super().__init__(message)
        self.usage = usage


class Separation(msgspec.Struct, frozen=True):
    """How far the workers of a run are kept apart. user: uid and gid of their own; None: they stay the user that started the run.

    lacking: what they are not confined by, and why; empty: nothing."""

    user: tuple[int, int] | None = None
    lacking: tuple[str, ...] = ()


def separation(wish: str) -> Separation:
    """What this machine has to give. wish: NAME, UID, UID:GID, same, or "" for the default.

    Where a process has real root's rights it must be so: raises Unfit rather than to return less. Less is for an ordinary user, for a
    user namespace without the user, and for a machine whose system calls are not known.
    """
    lacking = []
    if architecture() is None:
        lacking.append(f"{SECCOMP}: the system calls of {platform.machine()} are not known to this version")
    elif not can_filter():
        raise Unfit(f"{SECCOMP}: this kernel cannot filter system calls; boot one with CONFIG_SECCOMP_FILTER")
    if not AGENT.capabilities <= capabilities_held():
        return Separation()  # it cannot run at all: preflight says so
    user, why = _user(wish)
    if user is None:
        lacking.append(f"{USER}: {why}")
    return Separation(user, tuple(lacking))


def _user(wish: str) -> tuple[tuple[int, int] | None, str]:
    """User and group id, or None and why there are none."""
    if wish == SAME:
        return None, "--worker-user same: workers are of the user that runs pellucid"
    if os.geteuid() != 0:
        return None, f"pellucid runs as user {os.geteuid()} and not as root: its workers are of the same user"
    uid, gid = _ids(wish)
    for kind, number in (("uid", uid), ("gid", gid)):
        if not _mapped(number, Path(f"/proc/self/{kind}_map").read_text()):
            why = f"this user namespace has no {kind} {number}"
            if wish:
                raise Unfit(f"--worker-user {wish}: {why}; name one that it has, or same")
            return None, why
    if Path("/proc/self/setgroups").read_text().strip() == "deny":
        return None, "this user namespace does not let go of groups (setgroups: deny)"
    if missing := sorted(each.name for each in SUPERVISOR.capabilities - capabilities_held()):
        raise Unfit(
            f"worker user {uid}: to give workers a user of their own, root needs {', '.join(missing)}; "
            "add them to the container or unit, or say --worker-user same"
        )
    return (uid, gid), ""


def _ids(wish: str) -> tuple[int, int]:
    if number := re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", wish, re.ASCII):
        uid = int(number[1])
        gid = int(number[2] or uid)
    else:
        try:
            entry = pwd.getpwnam(wish or NAME)
        except KeyError as err:
            if wish:
                raise Unfit(f"--worker-user {wish}: there is no such user; name one, or UID:GID", usage=True) from err
            return NUMBER, NUMBER
        uid, gid = entry.pw_uid, entry.pw_gid
    if uid == 0 or gid == 0:
        raise Unfit(f"--worker-user {wish or NAME}: is root; name another user, or same", usage=True)
    return uid, gid


def _mapped(number: int, id_map: str) -> bool:
    """user_namespaces(7): lines of first id inside, first id outside, count."""
    return any(
        first <= number < first + count for first, _, count in (map(int, line.split()) for line in id_map.splitlines())
    )
