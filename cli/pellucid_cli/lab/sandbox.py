"""A private place for network experiments: nothing in it touches the machine, and nothing of it stays.

`enter()` moves the calling process there. `python -m pellucid_cli.lab.sandbox COMMAND…` runs COMMAND there.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import socket
import struct
import sys
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1

MARKER = "PELLUCID_SANDBOX"
_TOKEN = Path("/run/.pellucid-sandbox")

_libc = ctypes.CDLL(None, use_errno=True)


class SandboxError(RuntimeError):
    """The kernel does not let this process have namespaces of its own. The message holds the cure."""


def inside() -> bool:
    """Whether this process already lives in a sandbox. The marker alone is not believed: it may have been carried out of one."""
    token = os.environ.get(MARKER)
    try:
        return token is not None and _TOKEN.read_text() == token
    except OSError:
        return False


def enter() -> None:
    """This process then has a network and a mount namespace of its own (and, unless it may do so as it is, a user namespace
    in which it is root), mounts private, loopback up and an empty /run, so that `ip netns add` works and names never collide.

    Does nothing where it holds already. All of it goes when the last process in it ends. Raises SandboxError with the cure.
    Must be called while the process has one thread: a thread that exists already would stay outside.
    """
    if inside():
        return
    if len(os.listdir("/proc/self/task")) > 1:
        raise SandboxError(
            "sandbox: the process has several threads; call enter() before it starts any, or use "
            "`python -m pellucid_cli.lab.sandbox COMMAND`"
        )
    _unshare()
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", "/run", "tmpfs", 0)
    token = secrets.token_hex(16)
    _TOKEN.write_text(token)
    os.environ[MARKER] = token
    os.environ["PATH"] = (
        os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"
    )  # an ordinary user lacks ip and nft
    _raise_loopback()


def _unshare() -> None:
    flags = CLONE_NEWNET | CLONE_NEWNS
    if os.geteuid() == 0 and _libc.unshare(flags) == 0:
        return
    uid, gid = os.geteuid(), os.getegid()
    if _libc.unshare(flags | CLONE_NEWUSER) != 0:
        raise SandboxError(_why(ctypes.get_errno()))
    try:
        Path("/proc/self/setgroups").write_text("deny")  # else gid_map is refused: user_namespaces(7)
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    except OSError as err:
        raise SandboxError(f"sandbox: the id maps of the new user namespace are refused ({err}); run as root") from err


def _why(code: int) -> str:
    said = f"sandbox: the kernel refuses new namespaces ({os.strerror(code)}); "
    if _number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == 1:
        return said + "run as root, or set `sysctl kernel.apparmor_restrict_unprivileged_userns=0`"
    if _number("/proc/sys/kernel/unprivileged_userns_clone") == 0:
        return said + "run as root, or `sysctl kernel.unprivileged_userns_clone=1`"
    if _number("/proc/sys/user/max_user_namespaces") == 0 or code == errno.ENOSPC:
        return said + "run as root, or raise `sysctl user.max_user_namespaces`"
    if code == errno.EINVAL:
        return said + "this kernel has no user namespaces (CONFIG_USER_NS): run as root"
    return said + "run as root; in a container, add SYS_ADMIN and a seccomp profile that permits unshare and mount"


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


def _mount(source: str, target: str, kind: str | None, flags: int) -> None:
    if _libc.mount(source.encode(), target.encode(), kind.encode() if kind else None, ctypes.c_ulong(flags), None) != 0:
        raise SandboxError(
            f"sandbox: mount on {target} is refused ({os.strerror(ctypes.get_errno())}); run as root, "
            "and in a container permit mount in its AppArmor and seccomp profiles"
        )


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        request = struct.pack("16sH14x", b"lo", 0)
        (flags,) = struct.unpack_from("H", fcntl.ioctl(asker, SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(asker, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | IFF_UP))


def main(command: list[str]) -> int:
    """Become command inside a sandbox; returns only when that failed: 2 for wrong use, 126 for no sandbox, 127 for no command."""
    if not command or command[0] in ("-h", "--help"):
        print("usage: python -m pellucid_cli.lab.sandbox COMMAND [ARGUMENT...]", file=sys.stderr)
        return 0 if command else 2
    try:
        enter()
        os.execvp(command[0], command)
    except SandboxError as err:
        print(err, file=sys.stderr)
        return 126
    except OSError as err:
        print(f"sandbox: {command[0]}: {err.strerror}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
