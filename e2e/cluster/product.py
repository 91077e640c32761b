"""The product's own image, made of the Dockerfile by buildah: without a daemon, without a registry, on bases of this machine's packages."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

from . import images

ROOT = Path(__file__).parent.parent.parent
REPOSITORY = "pellucid.test/pellucid"
GOES_IN = (
    "Dockerfile", "requirements.lock", "requirements-image.lock", "pyproject.toml", "hatch_build.py", "tools/build_compiled.py",
    "policy", "proxy", "operator", "cli",
)  # fmt: skip
BUILD_PACKAGES = ("python3", "python3-venv", "python3-dev", "gcc", "libc6-dev", "ca-certificates")
SECRETS = ("/etc/pip.conf", "/etc/ssl/certs")
"""What pip needs of this machine: mounted while it works, never part of the image."""


def image() -> str:
    """The name of the image of this tree: its tag is a hash of what goes in."""
    whole = hashlib.sha256()
    for file in sorted(_files()):
        whole.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return f"{REPOSITORY}:{whole.hexdigest()[:16]}"


def _files() -> list[Path]:
    found = []
    for each in GOES_IN:
        path = ROOT / each
        found += (
            [path]
            if path.is_file()
            else [file for file in path.rglob("*") if file.is_file() and file.suffix not in (".pyc", ".so")]
        )
    return found


def made(folder: Path) -> Path:
    """The image as a docker archive in folder; made if it is not there. Raises RuntimeError."""
    folder.mkdir(parents=True, exist_ok=True)
    name = image()
    archive = folder / f"pellucid-{name.rpartition(':')[2]}.image"
    if not archive.exists():
        started = time.monotonic()
        base = _base(folder, "base", images.debian(folder / "debian.tar"))
        build = _base(folder, "build", images.debian(folder / "debian-build.tar", BUILD_PACKAGES))
        volumes = [word for each in SECRETS if Path(each).exists() for word in ("--volume", f"{each}:{each}:ro")]
        _buildah(
            folder, "bud", "--quiet", "--layers", "--isolation", "chroot", "--network", "host", "--pull-never",
            "--build-arg", f"BASE_IMAGE={base}", "--build-arg", f"BUILD_IMAGE={build}", *volumes, "--tag", name, str(ROOT),
        )  # fmt: skip
        for old in folder.glob("pellucid-*.image"):
            old.unlink()
        new = archive.with_suffix(".new")
        new.unlink(missing_ok=True)
        _buildah(folder, "push", "--quiet", name, f"docker-archive:{new}:{name}")
        os.replace(new, archive)
        print(f"image {name}: made in {time.monotonic() - started:.0f} s", file=sys.stderr)
    return archive


def _base(folder: Path, what: str, tar: Path) -> str:
    """A root file system as an image of buildah's."""
    with tar.open("rb") as file:
        name = f"localhost/pellucid-{what}:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
    if not _buildah(folder, "images", "--quiet", name, check=False):
        container = _buildah(folder, "from", "scratch")
        _buildah(folder, "add", "--quiet", container, str(tar), "/")
        _buildah(folder, "config", "--env", images.PATH, container)
        _buildah(folder, "commit", "--quiet", "--rm", container, name)
    return name


def _buildah(folder: Path, *words: str, check: bool = True) -> str:
    store = folder / "buildah"
    command = ["buildah", "--root", f"{store}/root", "--runroot", f"{store}/run", "--storage-driver", "overlay", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and check:
        raise RuntimeError(f"buildah {words[0]}: {(done.stderr or done.stdout).strip()[-3000:]}")
    return "" if done.returncode else done.stdout.strip()
