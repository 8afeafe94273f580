"""An int8 encoder is made, packed and served, unless its captions are worse."""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

import pytest
import torch

from handler.captioner import Captioner, load_captioner
from handler.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from handler.config import ServingConfig
from handler.engine import INT8_FLAGS, cpu_flags
from scripts import quantize
from scripts.export import export, int8_directory
from scripts.package_mar import package
from scripts.quantize import Comparison, QuantizationError, calibration_photos
from tests.conftest import ROOT, SAMPLES

pytest.importorskip("nncf", reason="NNCF is not installed: pip install -r requirements/quantize.txt")


@pytest.fixture
def saved(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    parts = {"vocabulary": checkpoint.vocabulary, "encoder": checkpoint.encoder, "decoder": checkpoint.decoder}
    save_checkpoint(tmp_path / "en", config=checkpoint.config, **parts)  # type: ignore[arg-type]
    return tmp_path / "en"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # NNCF's own
def test_int8_is_close_packed_and_served(saved: Path, tmp_path: Path) -> None:
    target = int8_directory(saved)
    quantize.quantize(saved, SAMPLES, target)
    export(saved, tmp_path / "engine")
    package(saved, tmp_path / "caption.mar", name="caption", model_config=ROOT / "deploy/torchserve/model-config.yaml")
    with zipfile.ZipFile(tmp_path / "caption.mar") as packed:
        assert {"engine/float/encoder.bin", "engine/int8/encoder.bin"} <= set(packed.namelist())
    captioner = load_captioner(saved, tmp_path / "engine", ServingConfig(threads=1), environment={})
    if not INT8_FLAGS & cpu_flags():
        assert captioner.engine.name == "openvino-fp32"
        return
    assert captioner.engine.name == "openvino-int8"
    pixels = [captioner.prepare(path.read_bytes()).pixels for path in SAMPLES]
    expected = Captioner(load_checkpoint(saved)).encode(pixels)
    assert float(torch.cosine_similarity(*map(torch.from_numpy, (captioner.encode(pixels), expected))).min()) > 0.9


@pytest.mark.parametrize(("after", "written"), [(0.996, True), (0.98, False)])
def test_worse_captions_leave_nothing_behind(
    saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, after: float, written: bool
) -> None:
    def make(_checkpoint: Path, _photos: object, directory: Path) -> None:
        directory.mkdir()
        (directory / "encoder.xml").write_text("made")

    monkeypatch.setattr(quantize, "quantize", make)
    monkeypatch.setattr(quantize, "compare", lambda *_: Comparison(10, 9, 1.0, after))
    monkeypatch.setattr(quantize, "calibration_photos", lambda *_: SAMPLES)
    (tmp_path / "captions.csv").write_text(f"image,caption,split\n{SAMPLES[0].name},a photo,dev\n")
    arguments = argparse.Namespace(
        checkpoint=saved, calibrate=tmp_path, photos=4, on="dev", judged=10, images=ROOT / "samples",
        captions=[("", tmp_path / "captions.csv")], split=[], strict=False,
    )  # fmt: skip
    if written:
        assert "a loss of 0.40%" in quantize.run(arguments)
    else:
        with pytest.raises(QuantizationError, match=r"2\.00%, more than 0\.5%"):
            quantize.run(arguments)
    assert int8_directory(saved).exists() == written


def test_too_few_photos_are_refused(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="needs 32 or more"):
        calibration_photos(tmp_path, 300)
