#!/usr/bin/env python3
"""Write the CustomResourceDefinitions from the types of the API (pellucid_policy/crds.py):
manifests/crds.yaml and a template of the chart.

--check    write nothing, and fail if a file is not what it should be
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "manifests" / "crds.yaml"
CHART_FILE = ROOT / "charts" / "pellucid" / "templates" / "crds.yaml"
KEEP = {"helm.sh/resource-policy": "keep"}
HEAD = "# Made by tools/crds.py from the types in policy/pellucid_policy: change those.\n"


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        """No anchors: they are not everybody's YAML."""
        return True


def text(annotations: dict[str, str] | None = None) -> str:
    """The definitions as YAML documents, each with the annotations given."""
    sys.path.insert(0, str(ROOT / "policy"))
    from pellucid_policy import crds

    definitions = crds.definitions()
    if annotations:
        for definition in definitions:
            definition["metadata"].setdefault("annotations", {}).update(annotations)
    return HEAD + yaml.dump_all(definitions, Dumper=_Plain, sort_keys=False, width=140)


def chart_text() -> str:
    """The same as a template: an uninstall keeps them, for all policies would go with them."""
    return "{{- if .Values.crds.install }}\n" + text(KEEP) + "{{- end }}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for file, made in ((FILE, text()), (CHART_FILE, chart_text())):
        if check and (not file.exists() or file.read_text() != made):
            print(f"{file.relative_to(ROOT)} is out of date: run tools/crds.py", file=sys.stderr)
            return 1
        if not check:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
