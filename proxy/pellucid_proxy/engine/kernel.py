"""The system calls of the engine for uncompiled runs: the names, arguments and results of kernel.pxd, through ctypes.

For reading, tests, coverage and the debugger. A call costs about a microsecond more than in the compiled engine."""

from __future__ import annotations

import ctypes
import os
import struct
import time
from collections.abc import MutableSequence
from ctypes import byref, c_char, c_int, c_uint16, c_uint32, sizeof
from dataclasses import dataclass
from errno import EAGAIN, EINPROGRESS, EINTR, EINVAL
from fcntl import fcntl
from select import EPOLLERR, EPOLLET, EPOLLEXCLUSIVE, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP
from socket import (
    AF_INET,
    AF_INET6,
    IPPROTO_IPV6,
    IPPROTO_TCP,
    MSG_MORE,
    MSG_NOSIGNAL,
    SHUT_WR,
    SO_LINGER,
    SO_MARK,
    SOCK_CLOEXEC,
    SOCK_NONBLOCK,
    SOCK_STREAM,
    SOL_IP,
    SOL_SOCKET,
    TCP_NODELAY,
    TCP_QUICKACK,
)

__all__ = [
    "EAGAIN",
    "EINTR",
    "EPOLLERR",
    "EPOLLET",
    "EPOLLEXCLUSIVE",
    "EPOLLHUP",
    "EPOLLIN",
    "EPOLLOUT",
    "EPOLLPRI",
    "EPOLLRDHUP",
    "MSG_MORE",
]

IP_TRANSPARENT, IPV6_TRANSPARENT, IP_BIND_ADDRESS_NO_PORT, F_SETPIPE_SZ = 19, 75, 24, 1031  # not all in Python 3.11
EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD = 1, 2, 3
EVENTS = 512
libc = ctypes.CDLL(None, use_errno=True)
libc.splice.argtypes = (c_int, ctypes.c_void_p, c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)
libc.setsockopt.argtypes = (c_int, c_int, c_int, ctypes.c_void_p, c_uint32)
for _name in ("recv", "send", "splice"):
    getattr(libc, _name).restype = ctypes.c_ssize_t


class address(ctypes.Structure):  # noqa: N801 - the name of the C type
    """sockaddr_in6, or the sockaddr_in at its start."""

    _fields_ = (("family", c_uint16), ("port_be", c_uint16), ("rest", c_char * 24))

    def __copy__(self) -> address:
        return address.from_buffer_copy(self)


@dataclass(slots=True)
class Event:
    events: int
    data: Data


@dataclass(slots=True)
class Data:
    fd: int


@dataclass(slots=True)
class accepted:  # noqa: N801
    fd: int
    source: address


@dataclass(slots=True)
class pipe_ends:  # noqa: N801
    source: int
    sink: int


event_list = list


def result(value: int) -> int:
    return -ctypes.get_errno() if value < 0 else value


def option(fd: int, level: int, name: int, value: int) -> int:
    return result(libc.setsockopt(fd, level, name, byref(c_int(value)), 4))


def clock_ns() -> int:
    return time.monotonic_ns()


def check_signals() -> int:
    return 0


class _EpollEvent(ctypes.Structure):
    """struct epoll_event, which is packed on x86-64 and nowhere else."""

    _pack_ = 1 if os.uname().machine == "x86_64" else 0
    _fields_ = (("events", c_uint32), ("fd", c_int), ("_rest_of_data", c_int))


_found = (_EpollEvent * EVENTS)()


def wait(epoll: int, events: MutableSequence[Event], timeout_ms: int, alone: bool) -> int:  # noqa: ARG001
    count = result(libc.epoll_wait(epoll, _found, EVENTS, timeout_ms))
    events[:] = [Event(event.events, Data(event.fd)) for event in _found[: max(count, 0)]]
    return count


def _control(epoll: int, operation: int, fd: int, events: int) -> int:
    return result(libc.epoll_ctl(epoll, operation, fd, byref(_EpollEvent(events, fd))))


def watch(epoll: int, fd: int, events: int) -> int:
    return _control(epoll, EPOLL_CTL_ADD, fd, events)


def rewatch(epoll: int, fd: int, events: int) -> int:
    return _control(epoll, EPOLL_CTL_MOD, fd, events)


def unwatch(epoll: int, fd: int) -> int:
    return _control(epoll, EPOLL_CTL_DEL, fd, 0)


def accept(listener: int) -> accepted:
    source, size = address(), c_uint32(sizeof(address))
    fd = result(libc.accept4(listener, byref(source), byref(size), SOCK_NONBLOCK | SOCK_CLOEXEC))
    return accepted(fd, source)


def local_name(fd: int) -> address:
    local, size = address(), c_uint32(sizeof(address))
    libc.getsockname(fd, byref(local), byref(size))
    return local


def packed(which: address) -> bytes:
    raw = bytes(which)
    return raw[4:8] if which.family == AF_INET else raw[8:24]


def port(which: address) -> int:
    return int(struct.unpack_from("!H", bytes(which), 2)[0])


def made(ip: bytes, number: int) -> address:
    head = struct.pack("=H", AF_INET if len(ip) == 4 else AF_INET6) + struct.pack("!H", number)
    return address.from_buffer_copy((head + (ip if len(ip) == 4 else bytes(4) + ip)).ljust(28, b"\0"))


def _length(which: address) -> int:
    return 16 if which.family == AF_INET else 28


def dial(source: address, spoof: bool, destination: address, mark: int, client_first: bool) -> int:
    fd = result(libc.socket(destination.family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0))
    if fd < 0:
        return fd
    error = option(fd, SOL_SOCKET, SO_MARK, mark) if mark else 0
    if not error and spoof:
        error = _bind(fd, source) if source.family == destination.family else -EINVAL
    if client_first:
        option(fd, IPPROTO_TCP, TCP_QUICKACK, 0)
    error = error or result(libc.connect(fd, byref(destination), _length(destination)))
    if error in (0, -EINPROGRESS):
        return fd
    os.close(fd)
    return error


def _bind(fd: int, source: address) -> int:
    unported = address.from_buffer_copy(source)
    unported.port_be = 0
    level, name = (SOL_IP, IP_TRANSPARENT) if source.family == AF_INET else (IPPROTO_IPV6, IPV6_TRANSPARENT)
    error = option(fd, level, name, 1)
    option(fd, SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    return error or result(libc.bind(fd, byref(unported), _length(unported)))


def _pointer(buffer: bytearray) -> object:
    return (c_char * len(buffer)).from_buffer(buffer)


def recv(fd: int, buffer: bytearray, size: int) -> int:
    return result(libc.recv(fd, _pointer(buffer), ctypes.c_size_t(size), 0))


def send(fd: int, buffer: bytearray, count: int, flags: int) -> int:
    return result(libc.send(fd, _pointer(buffer), ctypes.c_size_t(count), flags | MSG_NOSIGNAL))


def send_rest(fd: int, data: bytes, at: int, flags: int) -> int:
    return result(libc.send(fd, data[at:], ctypes.c_size_t(len(data) - at), flags | MSG_NOSIGNAL))


def taken(buffer: bytearray, start: int, stop: int) -> bytes:
    return bytes(buffer[start:stop])


def splice(source: int, sink: int, count: int) -> int:
    return result(libc.splice(source, None, sink, None, count, os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK))


def pipe(size: int) -> pipe_ends:
    try:
        source, sink = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return pipe_ends(-1, -1)
    try:
        if size:
            fcntl(source, F_SETPIPE_SZ, size)
    except OSError:
        pass  # over the user's share of pipe pages: the small pipe works too
    return pipe_ends(source, sink)


def no_delay(fd: int) -> int:
    return option(fd, IPPROTO_TCP, TCP_NODELAY, 1)


def end_stream(fd: int) -> int:
    return result(libc.shutdown(fd, SHUT_WR))


def close(fd: int) -> int:
    return result(libc.close(fd))


def reset_on_close(fd: int) -> int:
    return result(libc.setsockopt(fd, SOL_SOCKET, SO_LINGER, byref((c_int * 2)(1, 0)), 8))
