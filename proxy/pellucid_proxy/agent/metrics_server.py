"""The HTTP end of metrics and health, in threads of its own: a slow scraper costs the loop nothing."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Callable, Iterable
from typing import Any, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from ..control import Series
from .collector import SeriesCollector

IDLE_TIMEOUT_S = 10.0


class MetricsServer:
    """Serves /metrics, and /healthz: 200 while healthy() is empty, else 503 and what it says."""

    def __init__(self, address: str, gather: Callable[[], Iterable[Series]], healthy: Callable[[], str]) -> None:
        """address: ADDR:PORT, IPv6 in brackets. Raises ValueError or OSError, each saying what is wrong with it."""
        host, port = split_address(address)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(SeriesCollector(gather))
        metrics = make_wsgi_app(registry)

        def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            if environ["PATH_INFO"] == "/metrics":
                return cast("Iterable[bytes]", metrics(environ, start_response))
            if environ["PATH_INFO"] == "/healthz":
                why = healthy()
                return _text(start_response, "503 Service Unavailable" if why else "200 OK", why or "ok")
            return _text(start_response, "404 Not Found", "here are /metrics and /healthz")

        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._server = _Server.of(family)((host, port), _Handler)
        self.port: int = self._server.server_address[1]
        self._server.set_app(app)
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def split_address(text: str) -> tuple[str, int]:
    """("::1", 9090) for "[::1]:9090". Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{text} is not ADDR:PORT; write for example 127.0.0.1:9090 or [::1]:9090")
    return host.removeprefix("[").removesuffix("]"), int(port)


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False

    @classmethod
    def of(cls, family: socket.AddressFamily) -> type[_Server]:
        return type(cls.__name__, (cls,), {"address_family": family})

    def server_bind(self) -> None:
        """Without http.server's look-up of the own name, which may wait long for a resolver."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()


class _Handler(WSGIRequestHandler):
    timeout = IDLE_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - named by the base class
        """A scrape is no event."""


def _text(start_response: Any, status: str, body: str) -> list[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [body.encode() + b"\n"]
