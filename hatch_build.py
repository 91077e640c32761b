"""hatchling's build hook: put the compiled form of the chosen modules into the wheel.

PELLUCID_COMPILE: "require" fails without a compiled form (releases, images), "try" (default) falls back to a pure wheel
with a warning, "no" makes a pure wheel (coverage, debugging). Editable installs and sdists are never compiled.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

WISHES = ("require", "try", "no")


class CompileHook(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        wish = os.environ.get("PELLUCID_COMPILE", "try")
        if wish not in WISHES:
            raise SystemExit(f"PELLUCID_COMPILE={wish}: must be one of {', '.join(WISHES)}")
        if wish == "no" or version == "editable" or self.target_name != "wheel":
            return
        self._copy = tempfile.TemporaryDirectory(prefix="pellucid-wheel-")
        target = Path(self._copy.name) / "compiled"
        command = [sys.executable, str(Path(self.root) / "tools" / "build_compiled.py"), "--into", str(target)]
        if subprocess.run(command, cwd=self.root, stdout=subprocess.DEVNULL, check=False).returncode:
            if wish == "require":
                raise SystemExit("the wheel could not be compiled (see above), and PELLUCID_COMPILE=require")
            self.app.display_warning("this wheel is not compiled: it works, at half the speed")
            return
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        for built in target.rglob("*.so"):
            build_data["force_include"][str(built)] = str(built.relative_to(target))

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "_copy"):
            self._copy.cleanup()
