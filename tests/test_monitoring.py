"""Alert rules and the dashboard: valid for Prometheus, and about metrics that the service has."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

MONITORING = ROOT / "deploy/monitoring"


@pytest.fixture(scope="module")
def promtool() -> str:
    """Debian's package `prometheus` has it."""
    if shutil.which("promtool") is None and os.environ.get("CI") == "true" and os.geteuid() == 0:
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "prometheus"]
        subprocess.run(["apt-get", "update", "-qq"], check=False, capture_output=True)
        subprocess.run(install, check=True, capture_output=True, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"})
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is missing; on Debian and Ubuntu: apt-get install prometheus")
    return found


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def queries() -> list[str]:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_the_configuration_and_the_rules_are_valid(promtool: str) -> None:
    run(promtool, "check", "config", str(MONITORING / "prometheus.yaml"))


def test_the_alerts_fire_when_they_should_and_only_then(promtool: str) -> None:
    run(promtool, "test", "rules", str(MONITORING / "alerts_test.yaml"))


def test_the_dashboards_queries_are_valid(promtool: str, tmp_path: Path) -> None:
    """Grafana fills in its variables; what is left is Prometheus's language, which promtool reads in rules only."""
    filled = [query.replace("$__rate_interval", "5m").replace("$instance", ".*") for query in queries()]
    rules = [{"record": f"query_{number}", "expr": query} for number, query in enumerate(filled)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    run(promtool, "check", "rules", str(tmp_path / "rules.yaml"))


def test_dashboard_and_alerts_speak_of_metrics_that_exist() -> None:
    settings = yaml.safe_load((ROOT / "deploy/torchserve/metrics.yaml").read_text())
    known = {m["name"] for kind in ("ts_metrics", "model_metrics") for group in settings[kind].values() for m in group}
    alerts = yaml.safe_load((MONITORING / "rules.yaml").read_text())
    expressions = queries() + [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    assert len(expressions) > 15
    used = {name for e in expressions for name in re.findall(r"\b([A-Za-z_0-9]+)(?=[{\[])", re.sub(r"by \(.*?\)", "", e))}
    assert used - known <= {"up"}
