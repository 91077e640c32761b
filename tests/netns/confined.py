"""Attempts of a process that gave up its rights as a worker does, each in a process of its own.

python -m tests.netns.confined: prints, as JSON, how each ended: worked, the name of an error, or of the signal that killed it.
"""

from __future__ import annotations

import array
import ctypes
import errno
import functools
import gc
import json
import logging
import mmap
import os
import signal
import socket
import sys
import time
from collections.abc import Callable

from pellucid_proxy.engine import relay
from pellucid_proxy.rights.confine import confine, filter_calls
from pellucid_proxy.rights.syscalls import architecture
from pellucid_proxy.rights.table import WORKER
from pellucid_proxy.rights.users import separation
from pellucid_proxy.worker import _load_what_comes_late
from pellucid_proxy.worker_config import sealed_memfd

LOG = logging.getLogger(__name__)
libc = ctypes.CDLL(None, use_errno=True)
PARENT = os.getpid()
MARK = 0x1040


@functools.cache
def listener(family: int) -> socket.socket:
    """Opened before the first attempt, as all that a worker inherits."""
    address = "::1" if family == socket.AF_INET6 else "127.0.0.1"
    return socket.create_server((address, 0), family=socket.AddressFamily(family))


@functools.cache
def channel() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


NUMBERS = {"keyctl": 250, "kill": 62, "tkill": 200, "pidfd_open": 434} if os.uname().machine == "x86_64" else {}
NUMBERS |= {"kill": 129, "tkill": 130, "pidfd_open": 434} if not NUMBERS else {}


def call(name: str, *arguments: object) -> Callable[[], None]:
    """A system call by its number, past whatever libc thinks of it."""
    known = architecture()
    number = (known.numbers if known else {}).get(name, NUMBERS.get(name, -1))
    filled = [ctypes.c_long(each) if isinstance(each, int) else each for each in (*arguments, 0, 0, 0, 0, 0, 0)[:6]]

    def attempt() -> None:
        assert number >= 0
        if libc.syscall(ctypes.c_long(number), *filled) < 0:
            raise OSError(ctypes.get_errno(), name)

    return attempt


def option(level: int, name: int, value: bytes | int) -> Callable[[], None]:
    return lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM).setsockopt(level, name, value)


def opens(family: int, kind: int, protocol: int = 0) -> Callable[[], None]:
    return lambda: socket.socket(family, kind, protocol).close()


def map_code() -> None:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)


def start_thread() -> None:
    import _thread

    try:
        _thread.start_new_thread(time.sleep, (1,))
    except RuntimeError as err:
        raise PermissionError(errno.EPERM, "no thread") from err


MUST_FAIL: dict[str, Callable[[], object]] = {
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "execveat": call("execveat", -1, b"/bin/true"),
    "fork": os.fork,
    "thread": start_thread,
    "ptrace": call("ptrace", 16, PARENT),  # PTRACE_ATTACH
    "read another's memory": call("process_vm_readv", PARENT),
    "take another's descriptor": call("pidfd_getfd", 0, 0),
    "mount": call("mount", b"none", b"/", b"tmpfs"),
    "umount": call("umount2", b"/run"),
    "new mount interface": call("fsopen", b"tmpfs"),
    "chroot": call("chroot", b"/"),
    "unshare": call("unshare", 0x10000000),  # CLONE_NEWUSER
    "setns": call("setns", 0, 0),
    "bpf": call("bpf", 0),
    "io_uring": call("io_uring_setup", 8),
    "userfaultfd": call("userfaultfd", 1),
    "perf": call("perf_event_open", 0),
    "keys": call("keyctl", 0),
    "module": call("init_module", 0),
    "another filter": call("seccomp", 1, 0, 0),
    "raw socket": opens(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP),
    "raw socket of IPv6": opens(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6),
    "packet socket": opens(socket.AF_PACKET, socket.SOCK_RAW, 0x0300),
    "datagram socket": opens(socket.AF_INET, socket.SOCK_DGRAM),
    "ping socket": opens(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP),
    "netlink socket": opens(socket.AF_NETLINK, socket.SOCK_RAW),
    "unix socket": opens(socket.AF_UNIX, socket.SOCK_STREAM),
    "multipath TCP": opens(socket.AF_INET, socket.SOCK_STREAM, 262),
    "kernel crypto": opens(38, 5),  # AF_ALG
    "socket filter": option(socket.SOL_SOCKET, 26, b"\0" * 16),  # SO_ATTACH_FILTER
    "bind to device": option(socket.SOL_SOCKET, 25, b"lo"),  # SO_BINDTODEVICE
    "kernel TLS": option(socket.IPPROTO_TCP, 31, b"tls"),  # TCP_ULP
    "read a file": lambda: os.open("/proc/version", os.O_RDONLY),
    "write a file": lambda: os.open("/run/confined", os.O_WRONLY | os.O_CREAT),
    "list a folder": lambda: os.listdir("/"),
    "stat": lambda: os.stat("/"),
    "unlink": lambda: os.unlink("/run/confined"),
    "import": lambda: __import__("colorsys"),
    "another's memory file": lambda: os.open(f"/proc/{PARENT}/mem", os.O_RDWR),
    "kill": call("kill", PARENT, 0),
    "kill a thread": call("tkill", PARENT, 0),
    "kill by thread group": call("tgkill", PARENT, PARENT, 0),
    "pidfd": call("pidfd_open", PARENT),
    "become root": lambda: os.setresuid(0, 0, 0),
    "become dumpable": lambda: raise_unless(libc.prctl(4, 1, 0, 0, 0) == 0),
    "code in memory": map_code,
    "ioctl": lambda: __import__("fcntl").ioctl(0, 0x8912, b"\0" * 16),  # SIOCGIFCONF
    "listen": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM).listen(),
}


def raise_unless(good: bool) -> None:
    if not good:
        raise OSError(ctypes.get_errno(), "refused")


def dial(family: int, source: str) -> Callable[[], None]:
    """As the engine does it: marked, from an address that is not this machine's, and the other side sees it."""

    def attempt() -> None:
        dialling = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        dialling.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
        ipv6 = family == socket.AF_INET6
        dialling.setsockopt(socket.IPPROTO_IPV6 if ipv6 else socket.SOL_IP, 75 if ipv6 else 19, 1)
        dialling.setsockopt(socket.SOL_IP, 24, 1)
        dialling.bind((source, 0))
        try:
            dialling.connect(listener(family).getsockname())
        except BlockingIOError:
            pass
        assert dialling.getsockname()[0] == source

    return attempt


def relay_bytes() -> None:
    here, there = channel()
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    __import__("fcntl").fcntl(writer, 1031, 65536)
    os.write(writer, b"bytes")
    assert os.splice(reader, here.fileno(), 5, flags=os.SPLICE_F_NONBLOCK) == 5
    assert there.recv(16) == b"bytes"


def answer_the_agent() -> None:
    here, there = channel()
    fd = sealed_memfd("stats", bytes(1 << 20))
    here.sendmsg([b"stats"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
    os.close(fd)
    assert there.recv(16) == b"stats"


def log_an_exception() -> None:
    try:
        raise ValueError("odd")
    except ValueError:
        LOG.exception("as a worker would")
        LOG.warning(time.strftime("%Y-%m-%dT%H:%M:%S%z"))


def serve_a_connection() -> None:
    client = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    client.connect(listener(socket.AF_INET).getsockname())
    fd = libc.accept4(listener(socket.AF_INET).fileno(), None, None, socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    raise_unless(fd >= 0)
    os.close(fd)


MUST_WORK: dict[str, Callable[[], object]] = {
    "dial as a pod, IPv4": dial(socket.AF_INET, "198.51.100.7"),
    "dial as a pod, IPv6": dial(socket.AF_INET6, "2001:db8::7"),
    "accept": serve_a_connection,
    "splice": relay_bytes,
    "answer the agent": answer_the_agent,
    "log an exception": log_an_exception,
    "memory": lambda: (bytearray(64 << 20), gc.collect()),
    "clock": lambda: (time.time(), time.monotonic(), time.localtime()),
    "a decision's imports": lambda: ("ä".encode("utf-8", "replace"), b"x".decode("ascii"), b"x".decode("latin-1")),
    "abort": os.abort,
}


def ended(attempt: Callable[[], object], user: tuple[int, int] | None) -> str:
    """How attempt ends in a worker's process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            _load_what_comes_late()
            confine(WORKER, user)
            filter_calls()
            attempt()
            os.write(writer, b"worked")
        except OSError as err:
            os.write(writer, errno.errorcode.get(err.errno or 0, "?").encode())
        except BaseException as err:  # noqa: BLE001
            os.write(writer, f"{type(err).__name__}: {err}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as told:
        said = told.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return signal.Signals(-status).name if status < 0 else said


def main() -> None:
    assert relay.steps  # the engine is loaded, as in a worker
    channel(), listener(socket.AF_INET), listener(socket.AF_INET6)
    user = separation("").user
    outcomes = {name: ended(attempt, user) for name, attempt in (MUST_FAIL | MUST_WORK).items()}
    sys.stdout.write(json.dumps(outcomes))


if __name__ == "__main__":
    main()
