"""A table of system calls as a seccomp program: classic BPF that the kernel runs at each call. Pure.

Source: seccomp(2), linux/seccomp.h, linux/filter.h. The kernel remembers by architecture and number which calls are allowed whatever
their arguments (Linux 5.11 and later, kernel/seccomp.c: seccomp_cache_prepare) and does not run the program for them; before that
the order of the table counts.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

KILL_PROCESS, ERRNO, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000  # linux/seccomp.h: SECCOMP_RET_*
MAX_INSTRUCTIONS = 4096  # linux/filter.h: BPF_MAXINSNS
INSTRUCTION_BYTES = 8

_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = (
    0x20,
    0x54,
    0x15,
    0x35,
    0x06,
)  # BPF_LD|W|ABS, ALU|AND|K, JMP|JEQ|K, JMP|JGE|K, RET|K
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_WHOLE = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Architecture:
    """audit: AUDIT_ARCH_* of linux/audit.h, which tells apart the tables of one machine. Little-endian, 64 bits. newest: the highest number
    that is known; what is beyond is answered as an older kernel would."""

    audit: int
    numbers: Mapping[str, int]
    newest: int


@dataclass(frozen=True, slots=True)
class Argument:
    """argument[index] & mask == value, in the low 32 bits: the kernel takes no more of the arguments that are asked about."""

    index: int
    value: int
    mask: int = _WHOLE


Alternatives = Sequence[Sequence[Argument]]
"""Allowed if all of one alternative hold."""


@dataclass(frozen=True, slots=True)
class Calls:
    """What a process may call. allowed: the most frequent first. by_argument: allowed for these arguments, else EPERM.
    deadly: never called but by an intruder: the process is killed. All else is EPERM. A name that an architecture lacks is left out."""

    allowed: Sequence[str]
    by_argument: Mapping[str, Alternatives]
    deadly: Sequence[str]


def assemble(calls: Calls, architecture: Architecture) -> bytes:
    """The program, an array of struct sock_filter. A call by another architecture's table kills. Raises ValueError if it is too long."""
    numbers = architecture.numbers
    code = [
        _do(_LOAD, _ARCHITECTURE),
        _do(_EQUAL, architecture.audit, 1, 0),
        _do(_RETURN, KILL_PROCESS),
        _do(_LOAD, _NUMBER),
    ]
    for name in calls.allowed:
        if name in numbers:
            code += _if_number(numbers[name], [_do(_RETURN, ALLOW)])
    for name, alternatives in calls.by_argument.items():
        if name in numbers:
            code += _if_number(numbers[name], [*_one_of(alternatives), _do(_RETURN, ERRNO | errno.EPERM)])
    for name in calls.deadly:
        if name in numbers:
            code += _if_number(numbers[name], [_do(_RETURN, KILL_PROCESS)])
    code += [_do(_AT_LEAST, architecture.newest + 1, 0, 1), _do(_RETURN, ERRNO | errno.ENOSYS)]
    code.append(_do(_RETURN, ERRNO | errno.EPERM))
    if len(code) > MAX_INSTRUCTIONS:
        raise ValueError(f"{len(code)} instructions, {MAX_INSTRUCTIONS} are allowed")
    return b"".join(code)


def _if_number(number: int, body: list[bytes]) -> list[bytes]:
    return [_do(_EQUAL, number, 0, len(body)), *body]


def _one_of(alternatives: Alternatives) -> list[bytes]:
    """Allows if one holds, else falls through."""
    return [instruction for alternative in alternatives for instruction in _all_of(alternative)]


def _all_of(arguments: Sequence[Argument]) -> list[bytes]:
    """Allows if all hold, else falls through. Made from its end, which is where the jumps lead."""
    code = [_do(_RETURN, ALLOW)]
    for argument in reversed(arguments):
        load = [_do(_LOAD, _ARGUMENTS + 8 * argument.index)]
        masked = [] if argument.mask == _WHOLE else [_do(_AND, argument.mask)]
        code = [*load, *masked, _do(_EQUAL, argument.value, 0, len(code)), *code]
    return code


def _do(operation: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """struct sock_filter. Raises ValueError for a jump that is too far."""
    try:
        return struct.pack("=HBBI", operation, if_true, if_false, operand)
    except struct.error as err:
        raise ValueError(f"no instruction: {err}") from err
