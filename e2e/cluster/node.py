"""The first process of a node, in network, mount, PID, UTS and IPC namespaces of its own: makes of them a machine, and runs its daemons.

usage: node.py SPEC         a file as plan.spec() says

The node has a /proc, /sys and /run of its own, and its own changes over the machine's /etc and /var. So a host path, hostPID and /run/netns
mean the node, as on a real one. Ended by SIGKILL alone: then the kernel ends every process of the node and undoes every mount.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

RESTART_S = 1.0
KERNEL_WIDE = (
    "vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)  # fmt: skip
"""What a kubelet sets of the whole kernel: it sets a copy."""
WORKER_FOLDERS = {"/var/lib/containerd": "containerd", "/var/lib/kubelet": "kubelet", "/var/log/pods": "logs"}


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def own_files(disk: Path, worker: bool) -> None:
    """Every mount of the node."""
    mount("--make-rprivate", "/")
    for name in ("cgroup", "etc", "etc-work", "var", "var-work", "sysctl"):
        (disk / name).mkdir(parents=True, exist_ok=True)
    mount("--rbind", "/sys/fs/cgroup", str(disk / "cgroup"))
    mount("-t", "sysfs", "sysfs", "/sys")  # of this network namespace
    mount("--move", str(disk / "cgroup"), "/sys/fs/cgroup")
    for name in ("etc", "var"):
        layers = f"lowerdir=/{name},upperdir={disk}/{name},workdir={disk}/{name}-work"
        mount("-t", "overlay", "overlay", "-o", layers, f"/{name}")
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    for folder in ("/run/lock", "/run/netns"):
        Path(folder).mkdir()
    for name in KERNEL_WIDE:
        copy, real = disk / "sysctl" / name.replace("/", "."), Path("/proc/sys", name)
        copy.write_text(real.read_text())
        mount("--bind", str(copy), str(real))
    if worker:
        for target, source in WORKER_FOLDERS.items():
            (disk / source).mkdir(exist_ok=True)
            Path(target).mkdir(parents=True, exist_ok=True)
            mount("--bind", str(disk / source), target)
        mount("--make-rshared", "/")


def write(files: dict[str, str]) -> None:
    for path, text in files.items():
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)  # it may be a link into the machine's /run
        file.write_text(text)


def start(name: str, command: list[str], log: Path) -> int:
    """The process id of a daemon; it is in /run/NAME.pid too. No Popen: it would wait for its children itself."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    files = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o644),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    pid = os.posix_spawn(command[0], command, os.environ, file_actions=files)
    Path(f"/run/{name}.pid").write_text(f"{pid}\n")
    return pid


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    disk, logs = Path(spec["disk"]), Path(spec["logs"])
    own_files(disk, spec["worker"])
    socket.sethostname(spec["name"])
    write(spec["files"])

    def run(name: str) -> int:
        return start(name, spec["daemons"][name], logs / f"{spec['name']}-{name}.log")

    running = {run(name): name for name in spec["daemons"]}
    while True:
        pid, _ = os.wait()  # of orphans as well
        if pid in running:
            time.sleep(RESTART_S)  # as systemd would
            name = running.pop(pid)
            running[run(name)] = name


if __name__ == "__main__":
    main()
