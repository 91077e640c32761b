"""The dashboard's and the alerts' queries, asked of a real Prometheus that scrapes the cluster."""

from __future__ import annotations

import json
import subprocess
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.cluster import control
from pellucid_cli.lab.clients import Traffic, get
from pellucid_cli.lab.servers import Journal, RecordingServer, speak_http

from .conftest import Figure
from .hosts import internet, manifest, pods
from .product import CHART, Product, eventually, only, policy

ADDRESS = "127.0.0.1:19090"
BUSY = ("Denials", "New connections", "Bytes", "First byte", "Policy lag", "Canaries", "Revisions")
"""Panels that must show something after some traffic."""


def panels() -> list[tuple[str, str]]:
    board = json.loads((CHART / "files" / "dashboard.json").read_text())
    return [
        (panel["title"], target["expr"].replace("$__rate_interval", "10s"))
        for panel in board["panels"]
        for target in panel["targets"]
    ]


def alerts() -> list[tuple[str, str]]:
    groups = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())["groups"]
    return [(rule["alert"], rule["expr"]) for group in groups for rule in group["rules"]]


class Prometheus:
    def __init__(self, pellucid: Product) -> None:
        self._pellucid = pellucid

    def ask(self, query: str) -> list[Any]:
        """The values that a query has now. Raises AssertionError with Prometheus' own words."""
        url = f"http://{ADDRESS}/api/v1/query?query={urllib.parse.quote(query)}"
        plan = self._pellucid.plan
        done = subprocess.run(control.outside(plan, "cp", ["curl", "-sS", url]), capture_output=True, text=True)
        answer = json.loads(done.stdout or "{}")
        assert answer.get("status") == "success", (query, answer, done.stderr)
        found: list[Any] = answer["data"]["result"]
        return found


@contextmanager
def prometheus(pellucid: Product, folder: Path) -> Iterator[Prometheus]:
    """Scrapes every node and the operator once a second."""
    (operator,) = pellucid.pods("operator")
    targets = [f"{node.ipv4}:9464" for node in pellucid.plan.worker_nodes] + [f"{operator['status']['podIP']}:9465"]
    scrape = {"job_name": "pellucid", "static_configs": [{"targets": targets}]}
    rules = CHART / "files" / "alerts.yaml"
    (folder / "prometheus.yml").write_text(yaml.safe_dump({
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"}, "scrape_configs": [scrape], "rule_files": [str(rules)],
    }))  # fmt: skip
    command = [
        "prometheus",
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address={ADDRESS}",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(control.outside(pellucid.plan, "cp", command), stdout=log, stderr=log)
    try:
        yield Prometheus(pellucid)
    finally:
        process.terminate()
        process.wait()


def test_every_query_of_dashboard_and_alerts_is_answered_by_prometheus(
    pellucid: Product, figure: Figure, tmp_path: Path
) -> None:
    node = pellucid.plan.worker_nodes[0].name
    outside = internet(pellucid.plan)
    with (
        pods(pellucid.cluster, manifest("measured", node=node, labels={"app": "measured"})) as (client,),
        RecordingServer(outside, {80: speak_http}, Journal()),
        pellucid.applied(policy(only("good.example"), app="measured")),
        prometheus(pellucid, tmp_path) as asked,
        Traffic(lambda: get(client, outside.ipv4, 80, "good.example"), rate=20),
        Traffic(lambda: get(client, outside.ipv4, 80, "bad.example"), rate=20),
    ):
        up = f"sum(up) == {len(pellucid.plan.worker_nodes) + 1}"
        assert eventually(lambda: _answers(asked, up), 60, 0.5), (tmp_path / "log").read_text()[-2000:]
        pellucid.cluster.kubectl("patch", "transparentpolicy", "p", "--type=merge", "-p", '{"spec": {"priority": 7}}')
        busy = [(title, query) for title, query in panels() if title.startswith(BUSY)]
        empty = [title for title, query in busy if not eventually(partial(_answers, asked, query), 30, 0.5)]
        for _, query in [*panels(), *alerts()]:
            asked.ask(query)
        critical = {"PellucidCanarySilent", "PellucidWorkerDown", "PellucidSlippedThrough"}
        firing = {each["metric"]["alertname"] for each in asked.ask('ALERTS{alertstate="firing"}')} & critical
    figure(
        "dashboard and alerts",
        f"{len(panels())} and {len(alerts())} queries answered by Prometheus, {len(empty)} panels empty under traffic",
    )
    assert empty == []
    assert firing == set()


def _answers(asked: Prometheus, query: str) -> bool:
    try:
        return bool(asked.ask(query))
    except AssertionError:
        return False


def test_promtool_takes_the_alerts() -> None:
    done = subprocess.run(
        ["promtool", "check", "rules", str(CHART / "files" / "alerts.yaml")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(alerts())} rules found" in done.stdout


@pytest.mark.parametrize(
    "values", [("prometheus.serviceMonitor=true",), ("prometheus.rules=true",), ("dashboards.enabled=true",)]
)
def test_the_chart_makes_what_is_asked_for(pellucid: Product, values: tuple[str, ...]) -> None:
    kinds = {
        "prometheus.serviceMonitor": "ServiceMonitor",
        "prometheus.rules": "PrometheusRule",
        "dashboards.enabled": "ConfigMap",
    }
    said = pellucid.helm(
        "template",
        "x",
        str(CHART),
        *(word for each in values for word in ("--set", each)),
        "--show-only",
        "templates/monitoring.yaml",
    )
    made = [each for each in yaml.safe_load_all(said.stdout) if each]
    assert [each["kind"] for each in made] == [kinds[each.partition("=")[0]] for each in values]
