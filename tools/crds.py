#!/usr/bin/env python3
"""Write manifests/crds.yaml, the CustomResourceDefinitions, from the types of the API (pellucid_policy/crds.py).

--check    write nothing, and fail if the file is not what it should be
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "manifests" / "crds.yaml"
HEAD = "# Made by tools/crds.py from the types in policy/pellucid_policy: change those.\n"


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        """No anchors: they are not everybody's YAML."""
        return True


def text() -> str:
    sys.path.insert(0, str(ROOT / "policy"))
    from pellucid_policy import crds

    return HEAD + yaml.dump_all(crds.definitions(), Dumper=_Plain, sort_keys=False, width=140)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    made = text()
    if check and (not FILE.exists() or FILE.read_text() != made):
        print(f"{FILE.relative_to(ROOT)} is out of date: run tools/crds.py", file=sys.stderr)
        return 1
    if not check:
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
