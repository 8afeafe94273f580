"""The archive is the same for the same input, and stands on its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from handler.checkpoint import Checkpoint, save_checkpoint
from handler.errors import CheckpointError
from scripts.package_mar import package
from tests.conftest import ROOT

MODEL_CONFIG = ROOT / "deploy/torchserve/model-config.yaml"


@pytest.fixture(scope="module")
def saved(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("package") / "checkpoint"
    parts = {"vocabulary": checkpoint.vocabulary, "encoder": checkpoint.encoder, "decoder": checkpoint.decoder}
    save_checkpoint(directory, config=checkpoint.config, **parts)  # type: ignore[arg-type]
    return directory


@pytest.fixture(scope="module")
def archive(saved: Path) -> Path:
    output = saved.parent / "caption.mar"
    assert package(saved, output, name="caption", model_config=MODEL_CONFIG)
    return output


def test_the_same_input_gives_the_same_bytes(saved: Path, archive: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(saved, moved)
    package(moved, tmp_path / "other.mar", name="caption", model_config=MODEL_CONFIG)
    assert (tmp_path / "other.mar").read_bytes() == archive.read_bytes()


def test_an_archive_that_is_up_to_date_is_left_alone(saved: Path, archive: Path, tmp_path: Path) -> None:
    before = archive.stat().st_mtime_ns
    assert not package(saved, archive, name="caption", model_config=MODEL_CONFIG)
    assert archive.stat().st_mtime_ns == before
    other = tmp_path / "model-config.yaml"
    other.write_text(MODEL_CONFIG.read_text() + "\nbatchSize: 4\n")
    assert package(saved, tmp_path / "caption.mar", name="caption", model_config=other)


def test_it_imports_and_captions_where_there_is_no_checkout(archive: Path, tmp_path: Path) -> None:
    """As in a TorchServe worker: the unpacked archive is all that is on the path."""
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path)
    program = """
import caption_handler, handler.captioner, pathlib, sys
from handler.checkpoint import load_checkpoint
from handler.parameters import parse_parameters
here = pathlib.Path.cwd()
assert pathlib.Path(handler.captioner.__file__).is_relative_to(here), handler.captioner.__file__
captioner = handler.captioner.Captioner(load_checkpoint(here / "checkpoint"))
image = captioner.prepare(pathlib.Path(sys.argv[1]).read_bytes())
print(len(captioner.caption([image], [parse_parameters({}, captioner.config)])[0].captions))
"""
    command = [sys.executable, "-c", program, str(ROOT / "samples/cat.jpg")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1


def test_the_exported_encoder_is_packed_so_that_a_cold_start_converts_nothing(archive: Path) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install -r requirements/serve.txt")
    with zipfile.ZipFile(archive) as packed:
        files = {f"engine/float/{name}" for name in ("engine.json", "encoder.xml", "encoder.bin")}
        assert files <= set(packed.namelist())


def test_a_damaged_checkpoint_leaves_no_archive(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "damaged")
    (tmp_path / "damaged/decoder.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError):
        package(tmp_path / "damaged", tmp_path / "caption.mar", name="caption", model_config=MODEL_CONFIG)
    assert not list(tmp_path.glob("*.mar*"))
    assert not list(tmp_path.glob(".*.part"))


def test_nothing_of_the_tests_or_scripts_is_packed(archive: Path) -> None:
    with zipfile.ZipFile(archive) as packed:
        names = packed.namelist()
    assert "caption_handler.py" in names
    assert "handler/captioner.py" in names
    assert not [name for name in names if "__pycache__" in name or name.startswith(("tests", "scripts"))]
