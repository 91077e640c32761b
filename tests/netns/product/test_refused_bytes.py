"""What was only read to decide by it is not counted as relayed."""

from __future__ import annotations

from pathlib import Path

from pellucid_cli.lab.clients import get
from pellucid_cli.lab.servers import speak_http

from .stage import Stage, policy, wait_for_records
from .test_metrics import ADDRESS, _scrape, _value


def test_bytes_that_were_never_relayed_are_not_counted(tmp_path: Path) -> None:
    with Stage(tmp_path) as stage:
        stage.serve("web", {80: speak_http})
        stage.write("policy.yaml", policy("  - {match: {destinations: [{domain: blocked.example}]}, action: Block}"))
        with stage.run("--metrics", ADDRESS) as instance:
            assert get(stage["a"], stage["web"].ipv4, 80, "blocked.example").end == "reset"
            (record,) = wait_for_records(instance, 1)
            up = _value(_scrape(stage), "bytes_total", direction="up")
        assert len(stage.journal) == 0
        assert (record["bytes"]["up"], up) == (0, 0)
