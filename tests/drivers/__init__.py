"""A server and a client in C that play connections of many kinds and count how each went (wire.h, server.c, client.c)."""

from __future__ import annotations

import json
import subprocess
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pellucid_cli.lab.topology import Namespace

SOURCES = Path(__file__).parent
BUILT = SOURCES.parents[1] / "build" / "drivers"
PATIENCE_S = 60.0


def program(name: str) -> str:
    """The path of a driver, compiled anew where a source is newer. Raises CalledProcessError with the compiler's message on stderr."""
    built = BUILT / name
    sources = [*SOURCES.glob("*.[ch]"), *(SOURCES.parents[1] / "bench" / "drivers").glob("*.h")]
    if not built.exists() or built.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        BUILT.mkdir(parents=True, exist_ok=True)
        making = built.with_suffix(f".{threading.get_ident()}")
        subprocess.run(
            ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(making), str(SOURCES / f"{name}.c")], check=True
        )
        making.replace(built)
    return str(built)


class CServer:
    """The server on one port of host, both families, inside the context."""

    def __init__(self, host: Namespace, port: int, *, nice: int = 0) -> None:
        self._command, self._host = [*_priority(nice), program("server"), str(port)], host

    def __enter__(self) -> Self:
        self._process = self._host.popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._answer()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    @property
    def pid(self) -> int:
        return self._process.pid

    def counts(self) -> dict[str, Any]:
        """So far: accepted, live, and by kind those that asked and those that went as they should: {"asked": {"A": 3}, …}."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return dict(json.loads(self._answer()))

    def _answer(self) -> bytes:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the server has ended")
        return line


class CClient:
    """A client in host, running from entering the context; client.c has its options. Leaving the context lets go of what it holds.

    progress: connections that have ended so far, a second old at most. held: all that it is to hold are there."""

    def __init__(self, host: Namespace, options: str, addresses: Sequence[str], *, nice: int = 0) -> None:
        self._command = [*_priority(nice), program("client"), *options.split(), *addresses]
        self._host = host
        self.progress = 0
        self.held = threading.Event()
        self.result: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._process = self._host.popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.let_go()
        self._reader.join(PATIENCE_S if kind is None else 0)
        self._process.kill()
        self._process.wait()

    def let_go(self) -> None:
        """What it holds ends now."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def stop(self) -> None:
        """It has ended, without a result; the kernel ends what it has open."""
        self._process.kill()
        self._process.wait()

    def wait(self, timeout_s: float) -> dict[str, Any]:
        """What it printed at its end: started, ended, right, wrong, seconds, answers, p50_us, p99_us, max_us. Raises TimeoutError."""
        self._reader.join(timeout_s)
        if self._reader.is_alive():
            raise TimeoutError(
                f"{' '.join(self._command)}: no end after {timeout_s:g} s, {self.progress} connections ended"
            )
        return self.result

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._reader.is_alive()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                if line.startswith(b"PROGRESS"):
                    self.progress = int(line.split()[1])
                elif line.startswith(b"HELD"):
                    self.held.set()
                else:
                    self.result = json.loads(line)
                    self.progress = self.result["ended"]


def _priority(nice: int) -> list[str]:
    return ["nice", "-n", str(nice)] if nice else []


def total(results: Sequence[dict[str, Any]], what: str) -> Counter[str]:
    """The counts called what of several results, added up."""
    return sum((Counter(each[what]) for each in results), Counter())
