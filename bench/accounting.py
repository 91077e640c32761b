"""CPU and memory: of the proxy, of the drivers, of kernel threads, and of everything else (foreign)."""

from __future__ import annotations

import contextlib
import glob
import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

from bench import lab

TICKS = os.sysconf("SC_CLK_TCK")
GRACE_S = 3.0


class Cpu(NamedTuple):
    """Seconds of CPU time."""

    total: float
    user: float
    system: float


class Group:
    """A cgroup with all processes of one side, children included. Whoever makes it calls kill() and remove()."""

    def __init__(self, name: str) -> None:
        self.path = lab.CGROUPS / f"pellucid-bench-{os.getpid()}-{name}"
        self.path.mkdir(exist_ok=True)
        self.procs = self.path / "cgroup.procs"

    def pids(self) -> list[int]:
        return [int(pid) for pid in self.procs.read_text().split()]

    def cpu(self) -> Cpu:
        """What its processes have used since the group was made, dead ones included."""
        stat = dict(line.split() for line in (self.path / "cpu.stat").read_text().splitlines())
        return Cpu(*(int(stat[key]) / 1e6 for key in ("usage_usec", "user_usec", "system_usec")))

    def pss_kib(self) -> int:
        """Proportional set size of all processes together: shared pages count once."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):  # it may have just ended
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
        return total

    def pin(self, cpus: set[int]) -> None:
        """Every thread that runs now may use these CPUs only."""
        for pid in self.pids():
            for task in glob.glob(f"/proc/{pid}/task/*"):
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(int(os.path.basename(task)), cpus)

    def kill(self) -> None:
        """End all its processes: asked first, forced after GRACE_S."""
        for pid in self.pids():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while self.pids() and time.monotonic() < deadline:
            time.sleep(0.02)
        (self.path / "cgroup.kill").write_text("1")
        while self.pids():
            time.sleep(0.02)

    def remove(self) -> None:
        self.path.rmdir()


def machine_busy_s() -> float:
    """Seconds of CPU spent by the whole machine, all CPUs together."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]
    user, nice, system, _idle, _iowait, irq, softirq = map(int, fields)
    return (user + nice + system + irq + softirq) / TICKS


def kernel_threads() -> list[str]:
    found = []
    for path in glob.glob("/proc/[0-9]*"):
        with contextlib.suppress(OSError):
            stat = Path(path, "stat").read_text()
            parent = int(stat[stat.rindex(")") + 2 :].split()[1])
            if parent == 2:
                found.append(path)
    return found


def run_time_s(paths: list[str]) -> float:
    total = 0
    for path in paths:
        with contextlib.suppress(OSError):
            total += int(Path(path, "schedstat").read_text().split()[0])
    return total / 1e9


class Reading(NamedTuple):
    proxy: Cpu
    drivers: Cpu
    threads: float
    busy: float
    at: float


class Meter:
    """Reads every clock when made; spent() gives what happened since, in seconds of CPU. `foreign` is in CPUs."""

    def __init__(self, proxy: Group, drivers: Group) -> None:
        self.proxy, self.drivers = proxy, drivers
        self.threads = kernel_threads()
        self.start = self.read()

    def read(self) -> Reading:
        return Reading(
            self.proxy.cpu(), self.drivers.cpu(), run_time_s(self.threads), machine_busy_s(), time.monotonic()
        )

    def spent(self) -> dict[str, float]:
        before, after = self.start, self.read()
        wall = after.at - before.at
        proxy = after.proxy.total - before.proxy.total
        drivers = after.drivers.total - before.drivers.total
        threads = after.threads - before.threads
        others = max(0.0, after.busy - before.busy - proxy - drivers - threads)
        return {
            "wall_s": round(wall, 3),
            "proxy_cpu_s": round(proxy, 4),
            "proxy_user_s": round(after.proxy.user - before.proxy.user, 3),
            "proxy_system_s": round(after.proxy.system - before.proxy.system, 3),
            "driver_cpu_s": round(drivers, 4),
            "kernel_thread_cpu_s": round(threads, 4),
            "foreign": round(others / wall, 3),
        }
