"""The whole way that a user's own photos go: train, evaluate, package, serve, caption over HTTP, and evaluate that too."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from scripts.package_mar import package
from scripts.server import TorchServe, free_settings
from scripts.toy_dataset import make
from tests.conftest import ROOT

pytestmark = [pytest.mark.server, pytest.mark.slow]


def run(*arguments: str | Path) -> str:
    done = subprocess.run([sys.executable, "-m", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_from_photos_to_captions_over_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make(tmp_path / "toy", photos=200)
    data = ("--images", tmp_path / "toy/photos", "--captions", table)
    settings = ("--min-count", "1", "--epochs", "15", "--batch", "32", "--cache", tmp_path / "features")
    run("scripts.train", tmp_path / "run", *data, *settings)

    checkpoint, store = tmp_path / "run/best", tmp_path / "model_store"
    package(checkpoint, store / "caption.mar", name="caption", model_config=ROOT / "deploy/torchserve/model-config.yaml")
    shutil.rmtree(tmp_path / "features")  # the archive has all that serving needs
    with TorchServe(free_settings() | {"model_store": str(store)}) as server:
        server.wait_until_ready()
        url = server.address("inference") + "/predictions/caption"
        with open(table, encoding="utf-8") as file:
            dev = {
                row["image"]: row["caption"].lower().rstrip(".").split()
                for row in csv.DictReader(file)
                if row["split"] == "dev"
            }
        right = 0
        for name, words in dev.items():
            answer = requests.post(url, files={"image": (tmp_path / "toy/photos" / name).read_bytes()}, timeout=60)
            assert answer.status_code == 200
            caption = answer.json()["captions"][0]["caption"].split()
            right += words[-2] in caption  # the last caption of a photo is "There is a COLOUR SHAPE."
        assert right > 0.7 * len(dev)  # one of four colours is right by chance

    monkeypatch.setenv("CAPTION_ENGINE", "torch-fp32")  # evaluation's; bf16 may well call a shape blue that is nearly red
    with TorchServe(free_settings() | {"model_store": str(store)}) as server:
        server.wait_until_ready()
        url = server.address("inference") + "/predictions/caption"
        for subject, folder in ((("--url", url), "url"), ((checkpoint,), "checkpoint")):
            run("scripts.evaluate", *subject, *data, "--beam", "1", "3", "--no-java", "--output", tmp_path / folder)

    def captions(folder: str) -> list[list[str]]:
        content = json.loads((tmp_path / folder / "captions.json").read_text())
        return [[photo["caption"] for photo in content[beam].values()] for beam in ("1", "3")]

    assert captions("url") == captions("checkpoint")
    for name in ("evaluation.json", "evaluation.md", "evaluation.png"):
        assert (tmp_path / "checkpoint" / name).stat().st_size > 0
    found = json.loads((tmp_path / "checkpoint/evaluation.json").read_text())["beams"]
    assert [beam["beam"] for beam in found] == [1, 3]
    assert all(beam["metrics"]["CIDEr"] > 1 for beam in found)
