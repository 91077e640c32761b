"""manifests/install.yaml: what the chart makes with its own values, for those who do not use helm.

python -m tools.manifests            writes it
python -m tools.manifests --check    exits with 1 if it is not what the chart makes
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from e2e.cluster import programs

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "manifests" / "install.yaml"
NAMESPACE = "pellucid-system"
HEAD = f"""# Made by `make manifests` from charts/pellucid with its own values: change them there.
# kubectl apply --server-side -f manifests/install.yaml
# Before you delete it: kubectl -n {NAMESPACE} run uninstall … as docs/kubernetes.md says, which helm does by a hook.
---
apiVersion: v1
kind: Namespace
metadata: {{name: {NAMESPACE}}}
"""


def rendered() -> str:
    """What the file should hold."""
    command = [
        str(programs.built() / "helm"),
        "template",
        "pellucid",
        str(ROOT / "charts" / "pellucid"),
        "-n",
        NAMESPACE,
        "--no-hooks",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return HEAD + "\n".join(line for line in done.stdout.splitlines() if not line.startswith("# Source:")) + "\n"


def main() -> int:
    text = rendered()
    if "--check" in sys.argv:
        return 0 if FILE.read_text() == text else 1
    FILE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
