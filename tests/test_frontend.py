"""The Java class that replaces one of TorchServe's own."""

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

SOURCE = ROOT / "deploy/torchserve/frontend/org/pytorch/serve/http/HttpRequestHandler.java"


def jar() -> Path:
    package = importlib.util.find_spec("ts")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "frontend/model-server.jar"


def test_the_compiled_class_is_that_of_the_source(tmp_path: Path) -> None:
    """After a change: the same command with `-d deploy/torchserve/frontend`."""
    javac = shutil.which("javac")
    version = subprocess.run([javac, "-version"], capture_output=True, text=True, check=True).stdout if javac else ""
    if javac is None or not re.match(r"javac 17\.", version):
        pytest.skip("JDK 17 is missing, whose compiler makes these bytes: apt-get install openjdk-17-jdk-headless")
    command = [javac, "--release", "11", "-g:none", "-cp", str(jar()), "-d", str(tmp_path), str(SOURCE)]
    subprocess.run(command, check=True)
    compiled = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.class")}
    assert compiled == {path.relative_to(SOURCE.parents[4]): path.read_bytes() for path in SOURCE.parent.glob("*.class")}


def test_torchserves_own_class_has_not_changed() -> None:
    """The replacement was written for this one; another version of TorchServe needs another look."""
    with zipfile.ZipFile(jar()) as archive:
        own = archive.read("org/pytorch/serve/http/HttpRequestHandler.class")
    assert (len(own), zlib.crc32(own)) == (5082, 3771440795)
