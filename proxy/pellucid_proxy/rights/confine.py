"""This process gives up the rights that its kind does not need, for good."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Iterable

from .program import INSTRUCTION_BYTES, KILL_PROCESS, assemble
from .syscalls import architecture, worker_calls
from .table import Capability, Rights

# linux/prctl.h
_PR_SET_DUMPABLE, _PR_SET_KEEPCAPS, _PR_CAPBSET_READ, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 4, 8, 23, 24, 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 2, 4
_CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h
# linux/seccomp.h
_SECCOMP_SET_MODE_FILTER, _SECCOMP_GET_ACTION_AVAIL, _SECCOMP_FILTER_FLAG_SPEC_ALLOW = 1, 2, 1 << 2

CAPABILITIES, USER, SECCOMP = "capabilities", "user", "seccomp"
"""What a process can be confined by."""

_libc = ctypes.CDLL(None, use_errno=True)


class NotConfined(Exception):
    """The kernel did not take a right away that this process must not keep: it must not go on."""


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def confine(rights: Rights, user: tuple[int, int] | None = None) -> tuple[str, ...]:
    """This process keeps rights and no more, for good; returns what it is confined by: CAPABILITIES, USER, SECCOMP.

    user: uid and gid to become, where rights has a user of its own. Rights that it does not have it does not get. To be called while
    there is one thread. The parent-death signal is lost where the user changes. Raises NotConfined, and then the process must end.
    """
    if len(os.listdir("/proc/self/task")) != 1:
        raise NotConfined("rights belong to a thread, and this process has several")
    keeps = rights.capabilities & capabilities_held()
    _prctl("PR_SET_NO_NEW_PRIVS", _PR_SET_NO_NEW_PRIVS, 1)
    if Capability.SETPCAP in capabilities_held():  # else nothing that is started can have them either: no_new_privs
        _drop_bounding(keeps)
    confined = [CAPABILITIES]
    if rights.own_user and user is not None:
        _become(*user)
        confined.append(USER)
    _keep(keeps, hand_on=rights.executes and os.geteuid() != 0)
    if rights.filtered:
        _prctl("PR_SET_DUMPABLE", _PR_SET_DUMPABLE, 0)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    return tuple(confined)


def filter_calls() -> tuple[str, ...]:
    """From now on this process calls what a worker calls and no more (syscalls.py); returns SECCOMP, or nothing on a machine whose system
    calls are not known. To be called last: it could do nothing of what comes before. Raises NotConfined."""
    machine = architecture()
    if machine is None:
        return ()
    code = assemble(worker_calls(os.getpid()), machine)
    program = _Program(len(code) // INSTRUCTION_BYTES, code)
    # SPEC_ALLOW: before Linux 5.16 a filter made the CPU slower for the whole process, against code of strangers in it. A worker runs none.
    flags = _SECCOMP_FILTER_FLAG_SPEC_ALLOW
    if _libc.syscall(machine.numbers["seccomp"], _SECCOMP_SET_MODE_FILTER, flags, ctypes.byref(program)):
        raise NotConfined(f"seccomp: {os.strerror(ctypes.get_errno())}")
    return (SECCOMP,)


def can_filter() -> bool:
    """Whether the kernel would take such a filter. False on a machine whose system calls are not known, too."""
    machine = architecture()
    action = ctypes.c_uint32(KILL_PROCESS)
    return (
        machine is not None
        and _libc.syscall(machine.numbers["seccomp"], _SECCOMP_GET_ACTION_AVAIL, 0, ctypes.byref(action)) == 0
    )


def capabilities_held() -> frozenset[int]:
    """The permitted capabilities of this thread."""
    sets = _get()
    return frozenset(bit for bit in range(64) if sets[bit // 32].permitted >> bit % 32 & 1)


def _become(uid: int, gid: int) -> None:
    _prctl("PR_SET_KEEPCAPS", _PR_SET_KEEPCAPS, 1)
    try:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    except OSError as err:
        raise NotConfined(f"user {uid}, group {gid}: {err.strerror}") from err
    _prctl("PR_SET_KEEPCAPS", _PR_SET_KEEPCAPS, 0)
    if os.getresuid() != (uid, uid, uid) or os.getresgid() != (gid, gid, gid) or os.getgroups():
        raise NotConfined(f"user {uid}, group {gid}: the kernel says {os.getresuid()}, {os.getresgid()}")


def _drop_bounding(keeps: Iterable[int]) -> None:
    """Before the other sets: it takes SETPCAP."""
    capability = 0
    while (held := _libc.prctl(_PR_CAPBSET_READ, capability, 0, 0, 0)) >= 0:  # EINVAL behind the last one
        if held and capability not in keeps:
            _prctl("PR_CAPBSET_DROP", _PR_CAPBSET_DROP, capability)
        capability += 1


def _keep(keeps: Iterable[int], hand_on: bool) -> None:
    """hand_on: programs that this process starts have them too. Of root they have anyway, within the bounding set."""
    sets = (_Sets * 2)()
    for capability in keeps:
        word, bit = sets[capability // 32], 1 << capability % 32
        word.effective |= bit
        word.permitted |= bit
        word.inheritable |= bit if hand_on else 0
    _prctl("PR_CAP_AMBIENT_CLEAR_ALL", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    if _libc.capset(ctypes.byref(_Header(_CAPABILITY_VERSION_3, 0)), sets):
        raise NotConfined(f"capset: {os.strerror(ctypes.get_errno())}")
    if hand_on:
        for capability in keeps:
            _prctl("PR_CAP_AMBIENT_RAISE", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability)
    if any(bytes(had) != bytes(wanted) for had, wanted in zip(_get(), sets, strict=True)):
        raise NotConfined("capset: the kernel kept others")


def _get() -> ctypes.Array[_Sets]:
    sets = (_Sets * 2)()
    if _libc.capget(ctypes.byref(_Header(_CAPABILITY_VERSION_3, 0)), sets):
        raise NotConfined(f"capget: {os.strerror(ctypes.get_errno())}")
    return sets


def _prctl(name: str, option: int, *arguments: int) -> None:
    filled = [ctypes.c_ulong(each) for each in (*arguments, 0, 0, 0, 0)[:4]]
    if _libc.prctl(option, *filled) < 0:
        raise NotConfined(f"{name}: {os.strerror(ctypes.get_errno())}")
