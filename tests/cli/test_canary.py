"""`pellucid canary` against servers on loopback."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from click.testing import CliRunner

from pellucid_cli.commands import canary
from pellucid_cli.main import main
from pellucid_proxy.session import canary as workers
from pellucid_proxy.settings import NodeSettings


@contextmanager
def answering(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(canary, "PORT", server.getsockname()[1])

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            thread.join()


def test_it_asks_where_workers_answer() -> None:
    assert NodeSettings(scope=()).canary == canary.ADDRESSES
    assert canary.PORT == workers.PORT


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nabc n-1\n", 0, "revision abc on n-1"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", 1, "somebody answers who is not Pellucid"),
        (b"", 1, "no answer"),
    ],
)
def test_only_a_workers_answer_counts(monkeypatch: pytest.MonkeyPatch, answer: bytes, status: int, said: str) -> None:
    with answering(answer, monkeypatch):
        shown = CliRunner().invoke(main, ["canary", "--once", "--address", "127.0.0.1"])
    assert (shown.exit_code, said in shown.output) == (status, True), shown.output


def test_where_nobody_answers_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(canary, "PORT", server.getsockname()[1])
    shown = CliRunner().invoke(main, ["canary", "--once", "--address", "127.0.0.1"])
    assert (shown.exit_code, "refused" in shown.output) == (1, True)
