"""Container images as docker archives, written without a builder: layers of files, and two JSON documents that name them.

The format: github.com/moby/docker-image-spec, v1.1 (manifest.json, a configuration, tar files)."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from .plan import PAUSE_IMAGE

COREDNS_IMAGE = "pellucid.test/coredns:1"
PYTHON_IMAGE = "pellucid.test/python:1"
_FOLDERS = {"tmp": 0o1777, "etc": 0o755, "proc": 0o755, "sys": 0o755, "dev": 0o755, "run": 0o755}
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PACKAGES = ("python3-minimal", "libpython3-stdlib", "iproute2", "nftables", "netbase", "curl", "ca-certificates")


def made(folder: Path, programs: Path) -> list[Path]:
    """The images that every cluster has; each is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    alone = {PAUSE_IMAGE: programs / "pause", COREDNS_IMAGE: programs / "coredns"}
    found = []
    for name in (*alone, PYTHON_IMAGE):
        file = folder / f"{name.partition('/')[2].partition(':')[0]}.image"
        found.append(file)
        if file.exists():
            continue
        new = file.with_suffix(".new")
        if name in alone:
            place = f"/{alone[name].name}"
            archive(new, name, {place: alone[name]}, entrypoint=[place])
        else:
            archive(new, name, {}, base=debian(folder / "debian.tar"))
        os.replace(new, file)
    return found


def archive(
    file: Path, name: str, files: Mapping[str, Path], *, entrypoint: list[str] | None = None, base: Path | None = None
) -> None:
    """file holds the image name: base, a root file system as a tar, and over it files by their place, all executable."""
    layers: list[tuple[str, bytes | Path]] = []
    if base is not None:
        layers.append((_digest(base), base))
    if files or base is None:
        data = _layer(files, bare=base is None)
        layers.append((hashlib.sha256(data).hexdigest(), data))
    configuration = json.dumps({
        "architecture": "arm64" if os.uname().machine == "aarch64" else "amd64",
        "os": "linux",
        "config": {"Entrypoint": entrypoint or [], "Env": [PATH]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}" for digest, _ in layers]},
    }).encode()  # fmt: skip
    described = f"{hashlib.sha256(configuration).hexdigest()}.json"
    manifest = [{"Config": described, "RepoTags": [name], "Layers": [f"{digest}.tar" for digest, _ in layers]}]
    with tarfile.open(file, "w") as out:
        for digest, content in layers:
            if isinstance(content, Path):
                out.add(content, f"{digest}.tar")
            else:
                _add(out, f"{digest}.tar", content)
        _add(out, described, configuration)
        _add(out, "manifest.json", json.dumps(manifest).encode())


def debian(file: Path, packages: Sequence[str] = PACKAGES) -> Path:
    """A small Debian with packages as one tar, by the machine's own package sources, which are not left in it."""
    if not file.exists():
        sources = next(
            each for each in ("/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list") if Path(each).exists()
        )
        new = file.with_suffix(".new.tar")
        leave_out = [f"--dpkgopt=path-exclude=/usr/share/{each}/*" for each in ("man", "doc", "locale")]
        clean = 'rm -rf "$1"/etc/apt/sources.list* "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*'
        command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(packages)}", *leave_out]
        command += ['--aptopt=Acquire::Languages "none"', f"--customize-hook={clean}", "bookworm", str(new), sources]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"mmdebstrap: {done.stderr.strip()[-2000:]}")
        os.replace(new, file)
    return file


def _layer(files: Mapping[str, Path], bare: bool) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for folder, mode in _FOLDERS.items() if bare else ():
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            tar.addfile(entry)
        for place, source in files.items():
            entry = tarfile.TarInfo(place.lstrip("/"))  # the same bytes whoever makes it, and whenever
            entry.size, entry.mode = source.stat().st_size, 0o755
            with source.open("rb") as content:
                tar.addfile(entry, content)
    return data.getvalue()


def _add(out: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    out.addfile(entry, io.BytesIO(data))


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
