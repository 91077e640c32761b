"""Clients as applications in pods are: they dial an address, say a name, and know nothing of a proxy."""

from __future__ import annotations

import errno
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from .servers import ANONYMOUS
from .topology import Namespace

TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Answer:
    """How it ended for the client. end: what it would show its user, one of answered, forbidden (an HTTP status of 4xx), refused,
    reset, closed (an end before any answer), alert (of TLS), unreachable, silence. text: the answer, or the error's name."""

    end: str
    text: str = ""


def get(namespace: Namespace, address: str, port: int, host: str, path: str = "/") -> Answer:
    """One HTTP request with Host: host, on a connection of its own."""
    return get_several(namespace, address, port, [host], path)[0]


def get_several(namespace: Namespace, address: str, port: int, hosts: Iterable[str], path: str = "/") -> list[Answer]:
    """A request for each of hosts, one after the other on one connection; ends at the first that is not answered by 200."""
    answers: list[Answer] = []
    with _errors_as_answers(answers):
        with namespace.connect(address, port, timeout_s=TIMEOUT_S) as connection:
            for host in hosts:
                answers.append(_request(connection, host, path))
                if answers[-1].end != "answered":
                    break
    return answers


class TlsSession:
    """A TLS connection with name as SNI that stays open for many requests; a context manager. Raises OSError if it cannot be had."""

    def __init__(self, namespace: Namespace, address: str, port: int, name: str) -> None:
        self._name = name
        connection = namespace.connect(address, port, timeout_s=TIMEOUT_S)
        try:
            self._secure = _tls().wrap_socket(connection, server_hostname=name)
        except BaseException:
            connection.close()
            raise

    def request(self, path: str = "/") -> Answer:
        """One HTTP request on the open connection."""
        answers: list[Answer] = []
        with _errors_as_answers(answers):
            answers.append(_request(self._secure, self._name, path))
        return answers[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._secure.close()


@dataclass(frozen=True)
class Try:
    """One of many: when it began and ended (time.monotonic()), and how."""

    started: float
    ended: float
    answer: Answer


class Traffic:
    """Does act again and again, in a thread of its own, from entering to leaving the context; at most rate times a second."""

    def __init__(self, act: Callable[[], Answer], rate: float = 200.0) -> None:
        self._act = act
        self._interval_s = 1 / rate
        self._tries: list[Try] = []
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="traffic", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def tries(self) -> list[Try]:
        """All that have ended so far, in order."""
        with self._changed:
            return list(self._tries)

    def wait(self, holds: Callable[[Try], bool], timeout_s: float, count: int = 1) -> bool:
        """True as soon as the last count tries that ended from now on all fulfil holds; False after timeout_s."""
        with self._changed:
            begin = len(self._tries)
            return self._changed.wait_for(
                lambda: len(self._tries) - begin >= count and all(holds(each) for each in self._tries[-count:]),
                timeout_s,
            )

    def _run(self) -> None:
        while not self._stop.is_set():
            started = time.monotonic()
            answer = self._act()
            done = Try(started, time.monotonic(), answer)
            with self._changed:
                self._tries.append(done)
                self._changed.notify_all()
            self._stop.wait(self._interval_s)


def get_tls(namespace: Namespace, address: str, port: int, name: str | None, path: str = "/") -> Answer:
    """One HTTP request in TLS, with name as SNI; None sends no SNI."""
    answers: list[Answer] = []
    with _errors_as_answers(answers):
        with namespace.connect(address, port, timeout_s=TIMEOUT_S) as connection:
            with _tls().wrap_socket(connection, server_hostname=name) as secure:
                answers.append(_request(secure, name or address, path))
    return answers[0]


def greet(namespace: Namespace, address: str, port: int) -> Answer:
    """Waits for the server's greeting before it says a word, as mail clients do; then NOOP and QUIT."""
    answers: list[Answer] = []
    with _errors_as_answers(answers):
        with namespace.connect(address, port, timeout_s=TIMEOUT_S) as connection, connection.makefile("rb") as lines:
            banner = lines.readline()
            connection.sendall(b"NOOP\r\n")
            reply = lines.readline()
            connection.sendall(b"QUIT\r\n")
            lines.read()
            answers.append(
                Answer("answered", (banner + reply).decode("latin-1").strip()) if reply else Answer("closed")
            )
    return answers[0]


def _tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers(ANONYMOUS)
    return context


def _request(connection: socket.socket, host: str, path: str) -> Answer:
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: lab\r\n\r\n".encode())
    received = b""
    while b"\r\n\r\n" not in received:
        received += _receive(connection)
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    length = int(headers.get("content-length", "0"))
    while len(body) < length:
        body += _receive(connection)
    status = int(lines[0].split(" ")[1])
    text = body[:200].decode("latin-1").strip()
    return Answer("answered", text) if status == 200 else Answer("forbidden", f"{status} {text}".strip())


def _receive(connection: socket.socket) -> bytes:
    received = connection.recv(65536)
    if not received:
        raise EOFError
    return received


@contextmanager
def _errors_as_answers(answers: list[Answer]) -> Iterator[None]:
    """What ends a connection becomes the last of answers."""
    try:
        yield
    except EOFError:
        answers.append(Answer("closed"))
    except TimeoutError:
        answers.append(Answer("silence"))
    except ConnectionRefusedError:
        answers.append(Answer("refused"))
    except (ConnectionResetError, BrokenPipeError):
        answers.append(Answer("reset"))
    except ssl.SSLEOFError:
        answers.append(Answer("closed"))
    except ssl.SSLError as err:
        answers.append(Answer("alert", err.reason or str(err)))
    except OSError as err:
        if err.errno not in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES):
            raise
        answers.append(Answer("unreachable", errno.errorcode[err.errno]))
