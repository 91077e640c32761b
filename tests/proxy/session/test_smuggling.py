"""What the guard passes, other servers read as it does: the same requests, for the same hosts.

HAProxy and nginx are asked where they are installed; where neither is, the guard's own tests (test_http_guard.py) are all there is.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pellucid_proxy.session.http_guard import RequestGuard
from tests.smuggling import techniques

from .test_http_guard import GET, VALID

PATIENCE_S = 5.0
HAPROXY = """
defaults
  mode http
  timeout client 2s
  timeout http-request 2s
frontend all
  bind 127.0.0.1:{port}
  http-request return status 200 content-type text/plain lf-string "heard %[req.hdr(host)]\\n"
"""
NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error;
events {{ }}
http {{
  access_log off; client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c;
  uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e; client_body_timeout 2s; client_header_timeout 2s; keepalive_timeout 2s;
  server {{ listen 127.0.0.1:{port}; location / {{ return 200 "heard $http_host\\n"; }} }}
}}
"""


def haproxy(folder: Path, port: int) -> list[str]:
    (folder / "haproxy.cfg").write_text(HAPROXY.format(port=port))
    return ["haproxy", "-db", "-q", "-f", str(folder / "haproxy.cfg")]


def nginx(folder: Path, port: int) -> list[str]:
    (folder / "nginx.conf").write_text(NGINX.format(port=port, folder=folder))
    return ["nginx", "-e", str(folder / "error"), "-p", str(folder), "-c", str(folder / "nginx.conf")]


SERVERS: dict[str, Callable[[Path, int], list[str]]] = {"haproxy": haproxy, "nginx": nginx}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, int]]:
    """The ports of those that are installed, by name."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(_running(command, tmp_path_factory.mktemp(name)))
            for name, command in SERVERS.items()
            if shutil.which(name)
        }


@contextmanager
def _running(command: Callable[[Path, int], list[str]], folder: Path) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(command(folder, port))
    try:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), PATIENCE_S).close()
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline, f"{command.__name__} does not listen"
                assert process.poll() is None, f"{command.__name__} ended"
                time.sleep(0.01)  # between two looks
        yield port
    finally:
        process.terminate()
        process.wait()


def heard(port: int, data: bytes) -> list[str]:
    """The hosts of the requests that a server answers with 200 when data is all that comes."""
    said = b""
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while more := connection.recv(65536):
                said += more
        except OSError:  # a server that has heard enough resets; what it said counts
            pass
    return [host.decode("latin-1") for host in re.findall(rb"heard ([^\n]*)\n", said)]


def passed(data: bytes) -> tuple[bytes, list[str]]:
    """What the guard passes of data, and the hosts that it was asked about and allowed."""
    hosts: list[str] = []

    def allow(name: str | None, mismatch: bool) -> bool:
        if name == "evil.example" or mismatch:
            return False
        hosts.append(name or "")
        return True

    return RequestGuard(allow).feed(data)[0], hosts


def test_servers_read_what_passes_as_the_guard_does(
    servers: dict[str, int], record_property: Callable[[str, object], None]
) -> None:
    inputs = {f"valid: {name}": data for name, data in VALID.items()}
    inputs |= {name: GET + each.sent for name, each in techniques().items()}
    disagreements, differently = [], 0
    for name, data in inputs.items():
        through, hosts = passed(data)
        for server, port in servers.items():
            answered = heard(port, through)
            if answered != hosts[: len(answered)]:
                disagreements.append((server, name, answered, hosts))
        differently += len({tuple(heard(port, data)) for port in servers.values()}) > 1
    record_property("compared with", ", ".join(servers) or "nobody")
    record_property("read differently by them without the guard", f"{differently} of {len(inputs)}")
    assert disagreements == []
