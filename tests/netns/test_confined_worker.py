"""Inside a process with a worker's rights: what must fail fails, and what a worker does works."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from .confined import MUST_FAIL, MUST_WORK

KILLED = {
    *("exec", "execveat", "ptrace", "read another's memory", "take another's descriptor", "mount", "umount"),
    *("new mount interface", "chroot", "unshare", "setns", "bpf", "io_uring", "userfaultfd", "perf", "keys", "module"),
}
"""What only an intruder calls ends the worker; the rest is EPERM."""


def test_what_a_worker_must_not_do_fails_and_its_work_goes_on() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.netns.confined"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    expected = {name: "SIGSYS" if name in KILLED else "EPERM" for name in MUST_FAIL}
    expected |= dict.fromkeys(MUST_WORK, "worked") | {
        "abort": "SIGABRT",
        "import": "ModuleNotFoundError: No module named 'colorsys'",
    }
    assert outcomes == expected
    assert "ValueError: odd" in done.stderr
    assert "Logging error" not in done.stderr
