#!/usr/bin/env python3
"""Make the compiled form: a copy of the packages in build/compiled/HASH with the chosen modules compiled by Cython.

Prints the copy's absolute path, to be used as PYTHONPATH, and keeps build/compiled/current pointing at it. HASH covers the
packages' files, this script, the list of modules, Python, Cython and the compiler, so an unchanged tree costs nothing. The sources
stay free of .so files: one that lay beside its .py would win every import, a stale one too.

--into DIR       build there instead (DIR must not exist); no hash, no link
--optional       without a C compiler say so, print nothing and exit with 0
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STORE = ROOT / "build" / "compiled"
KEPT = 3  # copies, and those younger than a day: a long run may still use one
DAY_S = 86400
CFLAGS = "-O2 -g0"


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--into", type=Path, metavar="DIR")
    arguments.add_argument("--optional", action="store_true")
    options = arguments.parse_args()
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC")).split()[0]
    lack = missing(compiler)
    if lack:
        print(f"no compiled form: {lack}", file=sys.stderr)
        return 0 if options.optional else 1
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    packages = [ROOT / package for package in settings["packages"]]
    modules = settings["hooks"]["custom"]["compiled"]
    if options.into:
        copy(packages, options.into)
        compile_in(options.into, modules)
        print(options.into)
        return 0
    target = STORE / content_hash(packages, modules, compiler)
    if not target.is_dir():
        print(f"compiling into {target.relative_to(ROOT)}", file=sys.stderr)
        build(packages, modules, target)
    os.utime(target)
    point_current_at(target)
    prune()
    print(target)
    return 0


def missing(compiler: str) -> str:
    """What the compiled form lacks on this machine and its cure, or an empty string."""
    if shutil.which(compiler) is None:
        return f"the C compiler of this Python, {compiler}, is not installed (apt-get install gcc libc6-dev)"
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        return f"{headers}/Python.h is not there (apt-get install python3-dev)"
    return ""


def content_hash(packages: list[Path], modules: list[str], compiler: str) -> str:
    """16 hexadecimal digits that change with anything the copy is made from."""
    from Cython import __version__ as cython_version

    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(repr((sys.version, cython_version, CFLAGS, modules, version)).encode())
    digest.update(Path(__file__).read_bytes())
    for package in packages:
        for path in sources(package):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(ROOT)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def sources(package: Path) -> Iterator[Path]:
    """The files of package that a copy needs, sorted."""
    for path in sorted(package.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in {".pyc", ".so", ".c"}:
            yield path


def copy(packages: list[Path], target: Path) -> None:
    for package in packages:
        for path in sources(package):
            place = target / path.relative_to(package.parent)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def build(packages: list[Path], modules: list[str], target: Path) -> None:
    """Make target, which appears complete or not at all: other runs may be looking."""
    STORE.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=STORE))
    try:
        draft.chmod(0o755)
        copy(packages, draft)
        compile_in(draft, modules)
        try:
            draft.rename(target)
        except OSError:
            if not target.is_dir():  # else another run was first; its copy has the same content
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def compile_in(folder: Path, modules: list[str]) -> None:
    """Compile the modules that the globs name, within folder; leaves the .so files beside their sources and no C files."""
    chosen: list[str] = []
    for pattern in modules:
        found = [str(path.relative_to(folder)) for path in sorted(folder.glob(pattern)) if path.name != "__init__.py"]
        if not found:
            raise SystemExit(f"pyproject.toml: compiled: {pattern} matches no file")
        chosen += found
    # From within folder, so that a .pxd is found by its package's name.
    command = [
        sys.executable,
        "-m",
        "Cython.Build.Cythonize",
        "-3",
        "-q",
        "-i",
        "-j",
        str(os.cpu_count() or 1),
        *chosen,
    ]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "CFLAGS": CFLAGS}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}\nCython or the C compiler failed on: {' '.join(chosen)}")
    shutil.rmtree(folder / "build", ignore_errors=True)
    for name in chosen:
        (folder / name).with_suffix(".c").unlink()


def point_current_at(target: Path) -> None:
    link = STORE / f".current-{os.getpid()}"
    link.symlink_to(target.name)
    link.replace(STORE / "current")


def prune() -> None:
    copies = [
        path for path in STORE.iterdir() if path.is_dir() and not path.is_symlink() and not path.name.startswith(".")
    ]
    ages = sorted((time.time() - path.stat().st_mtime, path) for path in copies)
    for age, old in ages[KEPT:]:
        if age > DAY_S:
            shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
