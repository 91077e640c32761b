"""What a worker may call once it has started, and the numbers of these calls. Pure."""

from __future__ import annotations

import mmap
import platform
import sys
from socket import (
    AF_INET,
    AF_INET6,
    IPPROTO_IP,
    IPPROTO_IPV6,
    IPPROTO_TCP,
    SO_LINGER,
    SO_MARK,
    SOCK_CLOEXEC,
    SOCK_NONBLOCK,
    SOCK_STREAM,
    SOL_SOCKET,
    TCP_NODELAY,
    TCP_QUICKACK,
)

from .program import Architecture, Argument, Calls

_IP_TRANSPARENT, _IPV6_TRANSPARENT, _IP_BIND_ADDRESS_NO_PORT = (
    19,
    75,
    24,
)  # linux/in.h, linux/in6.h; not all in Python 3.11
_F_SETPIPE_SZ, _F_ADD_SEALS = 1031, 1033  # linux/fcntl.h
_WITHOUT_FLAGS = 0xFFFFFFFF & ~(SOCK_NONBLOCK | SOCK_CLOEXEC)

OPTIONS = (
    (SOL_SOCKET, SO_MARK),
    (IPPROTO_TCP, TCP_QUICKACK),
    (IPPROTO_IP, _IP_TRANSPARENT),
    (IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT),
    (IPPROTO_TCP, TCP_NODELAY),
    (SOL_SOCKET, SO_LINGER),
    (IPPROTO_IPV6, _IPV6_TRANSPARENT),
)
"""What the engine sets on a socket. Others are a way to code in the kernel that a worker never needs: socket filters, kernel TLS …"""

_NO_EXECUTION = ((Argument(2, 0, mmap.PROT_EXEC),),)


def worker_calls(pid: int) -> Calls:
    """For the worker with this process id. It opens no file, starts no thread or process, and signals nobody but itself."""
    stream = [
        (Argument(0, family), Argument(1, SOCK_STREAM, _WITHOUT_FLAGS), Argument(2, protocol))
        for family in (AF_INET, AF_INET6)
        for protocol in (0, IPPROTO_TCP)
    ]
    return Calls(
        allowed=_ALLOWED,
        by_argument={
            "setsockopt": [(Argument(1, level), Argument(2, option)) for level, option in OPTIONS],
            "socket": stream,  # neither raw nor packet nor netlink sockets
            "fcntl": [(Argument(1, _F_SETPIPE_SZ),), (Argument(1, _F_ADD_SEALS),)],
            "mmap": _NO_EXECUTION,
            "mprotect": _NO_EXECUTION,
            "tgkill": [(Argument(0, pid),)],  # abort()
        },
        deadly=_DEADLY,
    )


_ALLOWED = (
    *("recvfrom", "sendto", "epoll_wait", "epoll_pwait", "splice", "read", "write", "close", "accept4", "epoll_ctl"),
    *("getsockname", "bind", "connect", "shutdown", "pipe2", "clock_gettime", "futex"),
    *("recvmsg", "sendmsg", "memfd_create", "lseek", "pread64", "writev"),
    *("munmap", "mremap", "brk", "madvise"),
    *("rt_sigreturn", "rt_sigaction", "rt_sigprocmask", "sigaltstack", "restart_syscall"),
    *("gettimeofday", "time", "getpid", "gettid", "exit", "exit_group"),
)
"""No `ioctl`, `prctl`, `clone`, `openat`: nothing that runs after the start needs any form of them."""

_DEADLY = (
    *("execve", "execveat", "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd"),
    *("mount", "umount2", "pivot_root", "chroot", "setns", "unshare"),
    *("move_mount", "open_tree", "fsopen", "fsconfig", "fsmount", "fspick", "mount_setattr"),
    *("bpf", "io_uring_setup", "io_uring_enter", "io_uring_register", "userfaultfd", "perf_event_open"),
    *("init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot"),
    *("keyctl", "add_key", "request_key", "open_by_handle_at"),
)

ARCHITECTURES: dict[str, Architecture] = {
    "x86_64": Architecture(
        0xC000003E,
        {
            "recvfrom": 45, "sendto": 44, "epoll_wait": 232, "epoll_pwait": 281, "splice": 275, "read": 0, "write": 1, "close": 3,
            "accept4": 288, "epoll_ctl": 233, "getsockname": 51, "setsockopt": 54, "socket": 41, "bind": 49, "connect": 42,
            "shutdown": 48, "pipe2": 293, "fcntl": 72, "clock_gettime": 228, "futex": 202, "recvmsg": 47, "sendmsg": 46,
            "memfd_create": 319, "lseek": 8, "pread64": 17, "writev": 20, "mmap": 9, "munmap": 11, "mremap": 25, "mprotect": 10,
            "brk": 12, "madvise": 28, "rt_sigreturn": 15, "rt_sigaction": 13, "rt_sigprocmask": 14, "sigaltstack": 131,
            "restart_syscall": 219, "gettimeofday": 96, "time": 201, "getpid": 39, "gettid": 186, "tgkill": 234, "exit": 60,
            "exit_group": 231, "execve": 59, "execveat": 322, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311,
            "pidfd_getfd": 438, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "setns": 308, "unshare": 272,
            "move_mount": 429, "open_tree": 428, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442,
            "bpf": 321, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "userfaultfd": 323,
            "perf_event_open": 298, "init_module": 175, "finit_module": 313, "delete_module": 176, "kexec_load": 246,
            "kexec_file_load": 320, "reboot": 169, "keyctl": 250, "add_key": 248, "request_key": 249, "open_by_handle_at": 304,
            "seccomp": 317,
        },
        newest=450,
    ),
    "aarch64": Architecture(
        0xC00000B7,
        {
            "recvfrom": 207, "sendto": 206, "epoll_pwait": 22, "splice": 76, "read": 63, "write": 64, "close": 57, "accept4": 242,
            "epoll_ctl": 21, "getsockname": 204, "setsockopt": 208, "socket": 198, "bind": 200, "connect": 203, "shutdown": 210,
            "pipe2": 59, "fcntl": 25, "clock_gettime": 113, "futex": 98, "recvmsg": 212, "sendmsg": 211, "memfd_create": 279,
            "lseek": 62, "pread64": 67, "writev": 66, "mmap": 222, "munmap": 215, "mremap": 216, "mprotect": 226, "brk": 214,
            "madvise": 233, "rt_sigreturn": 139, "rt_sigaction": 134, "rt_sigprocmask": 135, "sigaltstack": 132,
            "restart_syscall": 128, "gettimeofday": 169, "getpid": 172, "gettid": 178, "tgkill": 131, "exit": 93, "exit_group": 94,
            "execve": 221, "execveat": 281, "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "pidfd_getfd": 438,
            "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "setns": 268, "unshare": 97, "move_mount": 429,
            "open_tree": 428, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442, "bpf": 280,
            "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "userfaultfd": 282, "perf_event_open": 241,
            "init_module": 105, "finit_module": 273, "delete_module": 106, "kexec_load": 104, "kexec_file_load": 294, "reboot": 142,
            "keyctl": 219, "add_key": 217, "request_key": 218, "open_by_handle_at": 265, "seccomp": 277,
        },
        newest=450,
    ),
}  # fmt: skip
"""By the machine's name (uname). Numbers of asm/unistd_64.h and asm-generic/unistd.h; a test compares them."""


def architecture() -> Architecture | None:
    """This process's own; None if its numbers are not known."""
    return ARCHITECTURES.get(platform.machine()) if sys.maxsize > 1 << 32 else None
