"""`pellucid run` as a process in the node of a topology."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

from pellucid_proxy.agent.status import NotRunning, read_status

from .topology import Namespace

READY_S = 20.0
STOP_S = 15.0
_POLL_S = 0.02


class NotReady(RuntimeError):
    """The instance ended, or did not come to enforce its policy in time; the message holds the end of its log."""


class Instance:
    """A context manager: inside it pellucid enforces the policy folder in node; afterwards it has ended in order.

    folder: where its state, log and flow records lie. Raises NotReady on entering.
    """

    def __init__(
        self,
        node: Namespace,
        policy: Path,
        folder: Path,
        *,
        scope: Sequence[str] = (),
        options: Sequence[str] = ("--drain", "2"),
        log: str = "log",
    ) -> None:
        self.state = folder / "state"
        self.log = folder / log
        self.flows = folder / "flows.json"
        self.flows.touch()
        self._node = node
        self._place = policy, folder, tuple(scope), tuple(options)
        self._command = [
            sys.executable,
            "-m",
            "pellucid_cli",
            "run",
            "--policy",
            str(policy),
            "--state",
            str(self.state),
        ]
        self._command += ["--flows", str(self.flows), *(f"--scope={each}" for each in scope), *options]
        self._process: subprocess.Popen[bytes] | None = None
        self._outer: list[str] = []

    def successor(self, *options: str) -> Instance:
        """One that takes this one's place when it is entered: the same command line, with options added."""
        policy, folder, scope, own = self._place
        log = f"log.{len(list(folder.glob('log*')))}"
        return Instance(self._node, policy, folder, scope=scope, options=(*own, "--takeover", *options), log=log)

    def alone(self) -> Self:
        """It will be process 1 of a namespace of its own, as in a container."""
        self._outer = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child=KILL"]
        return self

    def inner(self) -> int:
        """Of one that is alone: its process, as others see it."""
        assert self._process is not None
        return self._inner_of(self._process)

    def _inner_of(self, process: subprocess.Popen[bytes]) -> int:
        if not self._outer:
            return process.pid
        return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])

    def start(self) -> None:
        """Its process is there; whoever does not enter it waits and stops."""
        with self.log.open("wb") as log:
            # A session of its own: Ctrl-C on the terminal is for whoever runs the lab, who then stops this in order.
            command = ["setpriv", "--pdeathsig", "TERM", "setsid", *self._outer, *self._command]
            self._process = self._node.popen(command, stderr=log, stdout=log, env=dict(os.environ))

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready(READY_S)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_ready(self, timeout_s: float) -> None:
        """The policy is enforced. Raises NotReady."""
        assert self._process is not None
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            status = self._process.poll()
            if status is not None:
                raise NotReady(f"pellucid run ended with status {status}:\n{self.log_end()}")
            try:
                told = read_status(str(self.state))
                if told.phase == "enforcing" and told.instance == self._name():  # and not the one before it
                    return
            except NotRunning:
                pass  # not yet
            time.sleep(_POLL_S)
        raise NotReady(f"pellucid run does not enforce its policy after {timeout_s:g} s:\n{self.log_end()}")

    def _name(self) -> str:
        assert self._process is not None
        named = [value for name, value in pairwise(self._command) if name == "--instance"]
        return named[-1] if named else str(self._process.pid)

    @property
    def running(self) -> bool:
        """Whether its process is there."""
        return self._process is not None and self._process.poll() is None

    def wait(self, timeout_s: float) -> int:
        """Its exit status, once it has ended by itself. Raises TimeoutExpired."""
        assert self._process is not None
        return self._process.wait(timeout_s)

    def stop(self) -> int | None:
        """It has ended, in order or, after STOP_S, by force; its exit status, or None if it had been stopped before."""
        if self._process is None:
            return None
        process, self._process = self._process, None
        if process.poll() is None:
            os.kill(self._inner_of(process), signal.SIGTERM)
        try:
            return process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def log_end(self, lines: int = 20) -> str:
        """The last lines of what it said."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
