"""The benchmark runs from end to end; what it measures is not judged here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.server
def test_a_quick_run_measures_everything(tmp_path: Path) -> None:
    if shutil.which("hey") is None and os.environ.get("CI") != "true":
        pytest.skip("hey is missing: sudo apt-get install hey")
    command = [sys.executable, "-m", "scripts.benchmark", "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert report["scaling"]["failed_while_scaling"] == 0
    assert all(row["errors"] == 0 for row in report["service"] if row["rate"] is None)
    assert {row["engine"] for row in report["encoder"]} >= {"torch-fp32"}
    assert {row["search"] for row in report["search"]} >= {"plain"}
    assert set(report["cold_start"]) >= {"first_caption", "imports", "weights", "warm_up"}
    assert len(report["worker_memory_mib"]) == report["plan"]["workers"]
    assert all(value > 0 for value in report["ratios"].values())
    assert "| openvino" in done.stdout or "| torch" in done.stdout
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
