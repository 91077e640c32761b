"""`pellucid diff` foretells which verdicts a change makes different: it is asked, then the change is made, and the flows are repeated."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from pellucid_cli.lab.clients import get
from pellucid_cli.lab.instance import Instance
from pellucid_cli.lab.servers import speak_http
from pellucid_proxy.agent.status import read_status

from ..world import eventually
from .conftest import Figure
from .stage import Stage, policy, records, wait_for_records

NAMES = [f"{name}.example" for name in ("a", "b", "c", "d", "e", "f", "g", "h")]
EACH = 3


def _rules(allowed: str, last: str) -> str:
    domains = ", ".join(f"{{domain: {name}.example}}" for name in allowed)
    return policy(f"""
  - {{name: some, match: {{destinations: [{domains}]}}, action: Allow}}
  - {{name: rest, match: {{}}, action: {last}}}
""")


NOW, CHANGED = _rules("abcd", "Block"), _rules("cdefg", "Block")


def _flows(stage: Stage, instance: Instance) -> dict[str, str]:
    """Each name asked for EACH times, and the verdict that was recorded of it."""
    told = len(records(instance))
    for name in NAMES:
        for n in range(EACH):
            get(stage["a"], stage["web"].addresses[n % 2], 80, name)
    found = wait_for_records(instance, told + len(NAMES) * EACH)[told:]
    return {str(record["destination"]["name"]): str(record["verdict"]) for record in found}


def test_what_is_foretold_is_what_happens(tmp_path: Path, figure: Figure) -> None:
    change = tmp_path / "change.yaml"
    change.write_text(CHANGED)
    with Stage(tmp_path) as stage:
        stage.serve("web", {80: speak_http})
        stage.write("policy.yaml", NOW)
        with stage.run() as instance:
            before = _flows(stage, instance)
            command = [
                sys.executable,
                "-m",
                "pellucid_cli",
                "diff",
                "-f",
                str(change),
                "--state",
                str(instance.state),
                "-o",
                "json",
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            said = json.loads(done.stdout)
            revision = read_status(str(instance.state)).revision
            stage.write("policy.yaml", CHANGED)
            assert eventually(lambda: read_status(str(instance.state)).revision != revision)
            after = _flows(stage, instance)
    foretold = {each["destination"].partition(":")[0]: each["after"].split()[0] for each in said["changes"]}
    happened = {name: after[name] for name in NAMES if after[name] != before[name]}
    flows = len(NAMES) * EACH
    figure(
        "diff",
        f"{len(foretold)} of {len(happened)} changes foretold, {said['unchanged']} of {flows} flows unchanged, {said['cannotTell']} untold",
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert foretold == happened
    assert (said["flows"], said["changed"], said["cannotTell"]) == (flows, len(happened) * EACH, 0)
