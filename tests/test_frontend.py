"""The Java classes that replace some of TorchServe's own."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import zipfile
import zlib
from pathlib import Path

import pytest

from tests.conftest import ROOT

FRONTEND = ROOT / "deploy/torchserve/frontend"
SOURCES = sorted(FRONTEND.rglob("*.java"))


def jar() -> Path:
    package = importlib.util.find_spec("ts")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "frontend/model-server.jar"


def test_the_compiled_classes_are_those_of_the_sources(tmp_path: Path) -> None:
    """After a change: the same command with `-d deploy/torchserve/frontend`."""
    javac = shutil.which("javac")
    version = subprocess.run([javac, "-version"], capture_output=True, text=True, check=True).stdout if javac else ""
    if javac is None or not re.match(r"javac 17\.", version):
        pytest.skip("JDK 17 is missing, whose compiler makes these bytes: apt-get install openjdk-17-jdk-headless")
    command = [javac, "--release", "11", "-g:none", "-cp", str(jar()), "-d", str(tmp_path), *map(str, SOURCES)]
    subprocess.run(command, check=True)
    compiled = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.class")}
    assert compiled == {path.relative_to(FRONTEND): path.read_bytes() for path in FRONTEND.rglob("*.class")}


def test_torchserves_own_classes_have_not_changed() -> None:
    """The replacements were written for these; another version of TorchServe needs another look."""
    with zipfile.ZipFile(jar()) as archive:
        own = {path.stem: archive.read(str(path.relative_to(FRONTEND).with_suffix(".class"))) for path in SOURCES}
    assert {name: (len(content), zlib.crc32(content)) for name, content in own.items()} == {
        "HttpRequestHandler": (5082, 3771440795),
        "BatchAggregator": (7745, 1560168086),
    }
