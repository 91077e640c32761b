"""The listening sockets of a node: one a family, shared by all workers."""

from __future__ import annotations

import errno
import socket

from ..settings import NodeSettings
from .options import REFUSED, Refusal

BACKLOG = 8192  # the kernel cuts it to net.core.somaxconn
IPV6_TRANSPARENT = 75  # linux/in6.h; the socket module does not know it
IP_TRANSPARENT = 19  # linux/in.h


def open_listeners(settings: NodeSettings) -> tuple[socket.socket, ...]:
    """Listening sockets that tproxy may deliver to: non-blocking, on loopback only. The caller closes them.

    On 0.0.0.0 any pod would reach the proxy by dialling anything:port (design fact 5). No SO_REUSEPORT: a worker that dies would
    take the connections of its own queue with it. Raises Refusal.
    """
    opened: list[socket.socket] = []
    try:
        opened.append(_listener(socket.AF_INET, "127.0.0.1", settings))
        if settings.ipv6:
            opened.append(_listener(socket.AF_INET6, "::1", settings))
    except BaseException:
        for listener in opened:
            listener.close()
        raise
    return tuple(opened)


def _listener(family: socket.AddressFamily, address: str, settings: NodeSettings) -> socket.socket:
    port = settings.listen_port
    try:
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    except OSError as err:
        raise _refusal(err, address, port) from err
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted sockets inherit it: a call less each
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, settings.marks.intercept)  # accepted sockets inherit it
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
        else:
            listener.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
        listener.bind((address, port))
        listener.listen(BACKLOG)
    except OSError as err:
        listener.close()
        raise _refusal(err, address, port) from err
    return listener


def _refusal(err: OSError, address: str, port: int) -> Refusal:
    where = f"listener [{address}]:{port}" if ":" in address else f"listener {address}:{port}"
    match err.errno:
        case errno.EPERM | errno.EACCES:
            return Refusal(
                f"{where}: no right to open a transparent socket; run as root, or with NET_ADMIN and NET_RAW", REFUSED
            )
        case errno.EADDRINUSE:
            return Refusal(
                f"{where}: the port is taken, perhaps by another pellucid; `ss -ltnp` names the process to stop"
            )
        case errno.EADDRNOTAVAIL | errno.EAFNOSUPPORT:
            return Refusal(
                f"{where}: this machine has no such address; bring lo up, or leave IPv6 networks out of the scope",
                REFUSED,
            )
        case _:
            return Refusal(f"{where}: {err.strerror}")
