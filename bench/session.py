"""One contender in its namespaces: origin and proxy running, drivers on demand, measurements."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
from types import TracebackType
from typing import IO, Any

from bench import lab
from bench.accounting import Group, Meter
from bench.contenders import FLOWS, METRICS, ROOT, WORK, Contender, environment
from bench.policies import BLOCKED
from bench.scenarios import SERVERS, Scenario

LOG = lab.RUN / "proxy.log"
ALL_CPUS = os.sched_getaffinity(0)
FIRST_CPU = {min(ALL_CPUS)}
READY_WITHIN_S = 30.0
SETTLE_S = 0.7
PROBE = "loadgen conn -c 1 -n 1 -d 0.2"
Result = dict[str, Any]


class NotReadyError(Exception):
    """The contender does not do the work that all are compared on."""


class Session:
    """Use as a context manager: nothing of it is left afterwards."""

    def __init__(self, contender: Contender, workers: int) -> None:
        self.contender = contender
        self.environment = environment(contender, workers)
        self.proxy, self.drivers = Group("proxy"), Group("drivers")

    def __enter__(self) -> Session:
        shutil.rmtree(lab.RUN / "state", ignore_errors=True)
        FLOWS.unlink(missing_ok=True)
        lab.up(divert=self.contender.diverts, rules=self.contender.rules)
        self.spawn(lab.SERVER, "exec origin", self.drivers, stdout=subprocess.DEVNULL)
        if self.contender.command:
            with LOG.open("w") as log:
                self.spawn(lab.NODE, self.contender.command, self.proxy, env=self.environment, stdout=log, stderr=log)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for group in (self.proxy, self.drivers):
            group.kill()
            group.remove()
        lab.down()

    def log(self) -> str:
        """What the proxy printed."""
        return LOG.read_text(errors="replace") if self.contender.command else ""

    def wait_until_ready(self) -> None:
        """Return once the contender serves and refuses as it must. Raises NotReadyError with the claim that does not hold in time.

        Without this a proxy that is not intercepting yet, or that skips the policy, would measure as the fastest."""
        deadline = time.monotonic() + READY_WITHIN_S
        while complaint := self._complaint():
            if time.monotonic() > deadline:
                raise NotReadyError(complaint)
            time.sleep(0.25)

    def _complaint(self) -> str | None:
        if self.contender.command and not self.proxy.pids():
            return "it has ended"
        if not self.drive(PROBE, 10).get("done"):
            return "an allowed name does not pass"
        if self.contender.command and self.drive(f"{PROBE} -a {lab.PROBE_ADDRESS} -h {BLOCKED[0]}", 10).get("done"):
            return "a blocked name passes"
        if self.contender.policy and not self.metrics():
            return f"no metrics at {METRICS}"
        if self.contender.policy == "names" and self.flow_records() == 0:
            return f"no flow records in {FLOWS}"
        return None

    def metrics(self) -> str:
        """Pellucid's metrics, or nothing if it does not answer."""
        fetch = f"import urllib.request; print(urllib.request.urlopen('http://{METRICS}/metrics', timeout=5).read().decode())"
        try:
            return lab.run(f"ip netns exec {lab.NODE} python3 -c {shlex.quote(fetch)}")
        except RuntimeError:
            return ""

    @staticmethod
    def flow_records() -> int:
        if not FLOWS.exists():
            return 0
        with FLOWS.open("rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))

    def warm_up(self) -> None:
        self.drive(f"loadgen conn -c 8 -d 0.4 {SERVERS}")
        time.sleep(SETTLE_S)

    def drive(self, command: str, timeout_s: float = 75) -> Result:
        """Run a driver in the pod to its end: the JSON object it printed, or {"failed": why}."""
        process = self.drive_later(command)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return {"failed": f"no end after {timeout_s} s"}
        try:
            return dict(json.loads(output))
        except ValueError:
            return {"failed": f"exit {process.returncode}: {output[-200:]}"}

    def drive_later(self, command: str) -> subprocess.Popen[str]:
        """A driver in the pod, started; it prints a JSON object at its end."""
        return self.spawn(lab.POD, f"exec {command}", self.drivers, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def measure(self, scenario: Scenario) -> Result:
        """Run a scenario once: the driver's figures, and the CPU that each side used meanwhile, in all and for a unit of work."""
        command = scenario.command
        records = self.flow_records()
        if scenario.pinned:
            self._pin(FIRST_CPU)
            command = f"taskset -c {min(FIRST_CPU)} {command}"
        meter = Meter(self.proxy, self.drivers)
        result = self._hold(command) if scenario.holds else self.drive(command, scenario.timeout_s)
        spent = meter.spent()
        if scenario.pinned:
            self._pin(ALL_CPUS)
        if result.get("mode") == "up" and not result["bytes"]:
            result |= {
                "bytes": result["sent"],
                "gbps": result["sent_gbps"],
                "note": "counted at the sender: no half-close",
            }
        if self.contender.policy:
            time.sleep(SETTLE_S)  # a record follows the end of its connection
            result["flow_records"] = self.flow_records() - records
        work = (result.get(scenario.work) or 0) / scenario.unit
        if work:
            result["cpu_per_unit"] = round(spent["proxy_cpu_s"] / work, 6)
            machine = spent["proxy_cpu_s"] + spent["driver_cpu_s"] + spent["kernel_thread_cpu_s"]
            result["machine_cpu_per_unit"] = round(machine / work, 6)
        return {"contender": self.contender.name, "scenario": scenario.name} | result | spent

    def _pin(self, cpus: set[int]) -> None:
        self.proxy.pin(cpus)
        self.drivers.pin(cpus)

    def _hold(self, command: str) -> Result:
        """Memory while a driver holds connections open: it says READY OPEN ERRORS SECONDS, and lets go at the end of its input."""
        time.sleep(SETTLE_S)
        before = self.proxy.pss_kib()
        process = self.spawn(lab.POD, f"exec {command}", self.drivers, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout
        assert process.stdin
        _, opened, errors, seconds = process.stdout.readline().split()
        time.sleep(SETTLE_S)
        held = self.proxy.pss_kib() - before
        process.stdin.close()
        process.wait(30)
        time.sleep(2 * SETTLE_S)
        return {
            "open": int(opened),
            "errors": int(errors),
            "seconds": float(seconds),
            "pss_kib": round(held / max(int(opened), 1), 3),
            "base_mib": round(before / 1024, 1),
        }

    def spawn(
        self, namespace: str, command: str, group: Group, **options: int | IO[str] | dict[str, str]
    ) -> subprocess.Popen[str]:
        """Start a shell command inside a namespace and a cgroup. The drivers are on its PATH."""
        inside = f"PATH={WORK}/bin:$PATH; {command}"
        entered = f"echo $$ > {group.procs}; exec ip netns exec {namespace} sh -c {shlex.quote(inside)}"
        options = {"stdin": subprocess.DEVNULL} | options
        return subprocess.Popen(["sh", "-c", entered], cwd=ROOT, text=True, **options)  # type: ignore[call-overload, no-any-return]
