"""The worker's filter, run by a reference for every number and for arguments around those that are allowed."""

from __future__ import annotations

import errno
import itertools
import re
import struct
from pathlib import Path

import pytest

from pellucid_proxy.rights.program import ALLOW, ERRNO, KILL_PROCESS, Argument, Calls, assemble
from pellucid_proxy.rights.syscalls import ARCHITECTURES, OPTIONS, worker_calls

from .bpf import run

PID = 4711
REFUSED, UNKNOWN = ERRNO | errno.EPERM, ERRNO | errno.ENOSYS
AF_INET, AF_INET6, AF_UNIX, AF_NETLINK, AF_PACKET = 2, 10, 1, 16, 17  # linux/socket.h
STREAM, DGRAM, RAW, NONBLOCK, CLOEXEC = 1, 2, 3, 0o4000, 0o2000000
MPTCP = 262
KERNEL_PXD = Path(__file__).parents[3] / "proxy/pellucid_proxy/engine/kernel.pxd"
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}
CALLED = {"recv": "recvfrom", "send": "sendto"}  # by libc


def answer(machine: str, name: str, *arguments: int) -> int:
    architecture = ARCHITECTURES[machine]
    return run(assemble(worker_calls(PID), architecture), architecture.numbers[name], architecture.audit, arguments)


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_every_number_is_answered_as_the_table_says(machine: str) -> None:
    architecture = ARCHITECTURES[machine]
    calls = worker_calls(PID)
    program = assemble(calls, architecture)
    by_number = {number: name for name, number in architecture.numbers.items()}
    assert len(by_number) == len(architecture.numbers)
    for number in (*range(600), 1 << 30, (1 << 30) + 59, (1 << 32) - 1):  # x32's numbers begin at 1 << 30
        name = by_number.get(number)
        if name in calls.allowed:
            expected = ALLOW
        elif name in calls.deadly:
            expected = KILL_PROCESS
        else:
            expected = UNKNOWN if number > architecture.newest else REFUSED
        if name not in calls.by_argument:
            assert run(program, number, architecture.audit) == expected, (number, name)


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_another_architectures_table_kills(machine: str) -> None:
    program = assemble(worker_calls(PID), ARCHITECTURES[machine])
    for audit in (0x40000003, 0xC000003E, 0xC00000B7, 0x40000028, 0):  # i386, x86-64, aarch64, arm
        if audit != ARCHITECTURES[machine].audit:
            assert {run(program, number, audit) for number in range(500)} == {KILL_PROCESS}


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_only_streams_of_the_internet_are_opened(machine: str) -> None:
    for family, kind, flags, protocol in itertools.product(
        (0, AF_UNIX, AF_INET, AF_INET6, AF_NETLINK, AF_PACKET, 38, 44),  # AF_ALG, AF_XDP
        (0, STREAM, DGRAM, RAW, 5, 10),  # SOCK_SEQPACKET, SOCK_PACKET
        (0, NONBLOCK, CLOEXEC, NONBLOCK | CLOEXEC),
        (0, 6, 17, 255, MPTCP),
    ):
        expected = ALLOW if family in (AF_INET, AF_INET6) and kind == STREAM and protocol in (0, 6) else REFUSED
        assert answer(machine, "socket", family, kind | flags, protocol) == expected


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_only_what_the_engine_sets_is_set(machine: str) -> None:
    for level, option in itertools.product((0, 1, 6, 41, 255, 263), range(130)):
        expected = ALLOW if (level, option) in OPTIONS else REFUSED
        assert answer(machine, "setsockopt", 9, level, option) == expected
    for command in range(1100):
        expected = ALLOW if command in (1031, 1033) else REFUSED  # F_SETPIPE_SZ, F_ADD_SEALS
        assert answer(machine, "fcntl", 9, command) == expected


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_no_memory_becomes_code_and_nobody_else_gets_a_signal(machine: str) -> None:
    for call, protection in itertools.product(("mmap", "mprotect"), range(16)):
        assert answer(machine, call, 0, 4096, protection) == (REFUSED if protection & 4 else ALLOW)  # PROT_EXEC
    assert [answer(machine, "tgkill", pid, PID, 6) for pid in (PID, PID + 1, 1, 0, -1)] == [ALLOW, *[REFUSED] * 4]


def test_the_high_half_of_an_argument_changes_nothing() -> None:
    """The kernel takes an int of these registers."""
    assert answer("x86_64", "socket", AF_INET | 1 << 40, STREAM | 1 << 33, 0) == ALLOW
    assert answer("x86_64", "socket", AF_PACKET | 1 << 40, RAW, 0) == REFUSED


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_calls_that_depend_on_nothing_are_allowed_before_an_argument_is_read(machine: str) -> None:
    """The kernel then remembers them and runs no program for them (kernel/seccomp.c: seccomp_is_const_allow)."""
    program = assemble(worker_calls(PID), ARCHITECTURES[machine])
    loads = [operand for operation, _, _, operand in struct.iter_unpack("=HBBI", program) if operation == 0x20]
    assert loads[:2] == [4, 0], "architecture, number"
    assert all(operand >= 16 for operand in loads[2:])


@pytest.mark.parametrize("machine", [name for name, header in HEADERS.items() if header.exists()])
def test_the_numbers_are_those_of_the_kernels_headers(machine: str) -> None:
    text = HEADERS[machine].read_text()
    known = {
        name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)$", text, re.MULTILINE)
    }
    ours = ARCHITECTURES[machine].numbers
    assert ours == {name: known[name] for name in ours}
    calls = worker_calls(PID)
    lacking = {*calls.allowed, *calls.by_argument, *calls.deadly} - set(ours)
    assert not lacking & set(known), "calls of the table without their number"


def test_the_engine_calls_nothing_that_its_filter_refuses() -> None:
    text = KERNEL_PXD.read_text()
    functions = {CALLED.get(name, name) for name in re.findall(r' c_\w+ "(\w+)"\(', text)}
    calls = worker_calls(PID)
    assert len(functions) > 15
    assert functions <= {*calls.allowed, *calls.by_argument}
    levels = {"SOL_SOCKET": 1, "SOL_IP": 0, "SOL_IPV6": 41, "SOL_TCP": 6}
    names = {
        "SO_MARK": 36,
        "SO_LINGER": 13,
        "IP_TRANSPARENT": 19,
        "IPV6_TRANSPARENT": 75,
        "IP_BIND_ADDRESS_NO_PORT": 24,
    }
    names |= {"TCP_NODELAY": 1, "TCP_QUICKACK": 12}
    used = re.findall(r"(?:option|c_setsockopt)\(fd, (SOL_\w+), (\w+),", text)
    assert len(used) > 5
    assert {(levels[level], names[name]) for level, name in used} == set(OPTIONS)


def test_what_does_not_fit_is_refused() -> None:
    x86 = ARCHITECTURES["x86_64"]
    with pytest.raises(ValueError, match="instruction"):
        assemble(Calls((), {"socket": [[Argument(0, value)] for value in range(200)]}, ()), x86)
    with pytest.raises(ValueError, match="instruction"):
        assemble(Calls(("read",) * 3000, {}, ()), x86)
