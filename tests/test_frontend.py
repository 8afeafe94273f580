"""The Java classes that replace some of TorchServe's own."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from scripts.class_archive import create
from scripts.package_mar import package
from scripts.server import CLASS_PATH, TorchServe, free_settings
from tests.conftest import ROOT, SAMPLES

FRONTEND = ROOT / "deploy/torchserve/frontend"
SOURCES = sorted(FRONTEND.rglob("*.java"))


def test_the_compiled_classes_are_those_of_the_sources(tmp_path: Path) -> None:
    """After a change: the same command, and `jar --create --file deploy/torchserve/frontend.jar -C FOLDER org`."""
    javac = shutil.which("javac")
    version = subprocess.run([javac, "-version"], capture_output=True, text=True, check=True).stdout if javac else ""
    if javac is None or not re.match(r"javac 17\.", version):
        pytest.skip("JDK 17 is missing, whose compiler makes these bytes: apt-get install openjdk-17-jdk-headless")
    command = [javac, "--release", "11", "-g:none", "-cp", str(CLASS_PATH[1]), "-d", str(tmp_path), *map(str, SOURCES)]
    subprocess.run(command, check=True)
    compiled = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.class")}
    with zipfile.ZipFile(CLASS_PATH[0]) as archive:
        names = [name for name in archive.namelist() if name.endswith(".class")]
        assert compiled == {Path(name): archive.read(name) for name in names}


def test_torchserves_own_classes_have_not_changed() -> None:
    """The replacements were written for these; another version of TorchServe needs another look."""
    with zipfile.ZipFile(CLASS_PATH[1]) as archive:
        own = {path.stem: archive.read(str(path.relative_to(FRONTEND).with_suffix(".class"))) for path in SOURCES}
    assert {name: (len(content), zlib.crc32(content)) for name, content in own.items()} == {
        "HttpRequestHandler": (5082, 3771440795),
        "BatchAggregator": (7745, 1560168086),
        "ZipUtils": (7233, 285945365),
    }


@pytest.mark.server
def test_two_clients_are_served_by_two_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Otherwise a request waits for another to share its batch, and one worker has both while the other has nothing."""
    model_config = ROOT / "deploy/torchserve/model-config.yaml"
    package(ROOT / "weights/en", tmp_path / "caption.mar", name="caption", model_config=model_config)
    monkeypatch.setenv("TS_DEFAULT_WORKERS_PER_MODEL", "2")
    photo = SAMPLES[0].read_bytes()

    def client(url: str) -> None:
        for _ in range(50):
            requests.post(url, data=photo, timeout=60).raise_for_status()

    with TorchServe(free_settings() | {"model_store": str(tmp_path)}) as running:
        running.wait_until_ready()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(client, [running.address("inference") + "/predictions/caption"] * 2))
        running.drain()
    log = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith('{"time"')]
    alone = [entry["batch"] == 1 for entry in log]
    assert len(alone) >= 100
    print(f"{sum(alone)} of {len(alone)} requests had a worker to themselves")
    assert sum(alone) > 0.8 * len(alone)


@pytest.mark.server
def test_an_archive_cannot_write_outside_of_its_directory(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "caption.mar", "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", "{}")
        archive.writestr("../../escaped", "x")
    with TorchServe(free_settings() | {"model_store": str(tmp_path)}) as running:
        assert running.key_file is not None
        folder = running.key_file.parent  # where it unpacks
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(requests.ConnectionError):
                requests.get(running.address("inference") + "/ping", timeout=5)
                break
            time.sleep(0.1)
        unpacked = [path.name for path in (folder / "models").iterdir()]
        assert not list(folder.rglob("escaped"))
    assert unpacked == []  # of what could not be unpacked nothing is left


@pytest.mark.server
def test_java_takes_the_classes_from_the_archive_that_was_made(server: TorchServe, tmp_path: Path) -> None:
    """TorchServe's own and ours; `server` is for its packed model."""
    store = {"model_store": server.settings["model_store"]}
    archive, log = tmp_path / "frontend.jsa", tmp_path / "classes.log"
    create(archive, store)
    assert [path.name for path in tmp_path.iterdir()] == ["frontend.jsa"]
    options = [f"-XX:SharedArchiveFile={archive}", f"-Xlog:class+load:file={log}"]
    with TorchServe(free_settings() | store, java_options=options) as running:
        running.wait_until_ready()
    loaded = dict(re.findall(r" (org\.pytorch\.serve\.[\w.]+) source: (.+)", log.read_text()))
    assert {name: loaded[name] for name in ("org.pytorch.serve.ModelServer", "org.pytorch.serve.http.HttpRequestHandler")} == {
        "org.pytorch.serve.ModelServer": "shared objects file (top)",
        "org.pytorch.serve.http.HttpRequestHandler": "shared objects file (top)",
    }
