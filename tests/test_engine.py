"""The engine that serves is the fastest that archive and machine allow, and all engines compute the same."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import handler.engine
from handler.captioner import Captioner, load_captioner
from handler.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from handler.config import EngineName, ServingConfig
from handler.cuda_graphs import RecordedEncoder
from handler.engine import cpu_flags
from handler.errors import CheckpointError
from handler.parameters import parse_parameters
from handler.torch_engine import TorchEngine
from scripts.export import export
from tests.conftest import ROOT, SAMPLES

openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install -r requirements/serve.txt")


@pytest.fixture(scope="module")
def saved(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("engine") / "checkpoint"
    parts = {"vocabulary": checkpoint.vocabulary, "encoder": checkpoint.encoder, "decoder": checkpoint.decoder}
    save_checkpoint(directory, config=checkpoint.config, **parts)  # type: ignore[arg-type]
    return directory


@pytest.fixture(scope="module")
def exported(saved: Path) -> Path:
    directory = saved.parent / "engine"
    export(saved, directory)
    return directory


@pytest.fixture
def load(saved: Path, exported: Path) -> Callable[..., Captioner]:
    def of(engine: EngineName = "auto", exported: Path = exported, **environment: str) -> Captioner:
        return load_captioner(saved, exported, ServingConfig(engine=engine, threads=2), environment=environment)

    return of


@pytest.fixture
def pixels(load: Callable[..., Captioner]) -> np.ndarray:
    captioner = load("torch-fp32")
    return np.stack([captioner.prepare(path.read_bytes()).pixels for path in SAMPLES])


def test_a_photo_that_comes_alone_gets_the_same_features(saved: Path, exported: Path, pixels: np.ndarray) -> None:
    """By a second copy of the encoder, with more threads."""
    serving = ServingConfig(engine="openvino-fp32", threads=1)
    captioner = load_captioner(saved, exported, serving, environment={"CAPTION_THREADS_ALONE": "2"})
    together = captioner.encode(pixels)
    captioner.encode(pixels[:1])  # from now on the copy is being made
    encoder = cast(Any, captioner.engine)
    encoder._making.join()
    assert encoder._alone is not encoder._request
    alone = np.concatenate([captioner.encode([photo]) for photo in pixels])
    np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-4 * float(together.max()))


@pytest.mark.parametrize("count", [1, 3, 16, 17])
def test_recorded_for_other_numbers_of_images_the_encoder_computes_the_same(
    load: Callable[..., Captioner], pixels: np.ndarray, count: int
) -> None:
    """Padding, and parts of what is too much at once; the recording itself needs a GPU."""
    plain = load("torch-fp32").engine

    def encode(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(plain.encode(images.numpy()))

    recorded = RecordedEncoder(encode, pixels.shape[-1], torch.device("cpu"))
    images = torch.from_numpy(pixels[np.arange(count) % len(pixels)])
    first = recorded.encode(images)
    recorded.encode(images.flip(0))  # goes to the same place
    torch.testing.assert_close(first, encode(images), rtol=1e-4, atol=1e-4)


def test_fp32_engines_compute_the_same(load: Callable[..., Captioner], pixels: np.ndarray) -> None:
    expected, found = load("torch-fp32").encode(pixels), load("openvino-fp32").encode(pixels)
    assert found.shape == (len(pixels), 2048)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2 * float(expected.max()))


@pytest.mark.parametrize("name", ["torch-bf16", "openvino-bf16"])
def test_bfloat16_is_close(load: Callable[..., Captioner], pixels: np.ndarray, name: EngineName) -> None:
    captioner = load(name)
    if captioner.engine.name != name:
        pytest.skip("this CPU has no instructions for bfloat16")
    similarity = torch.cosine_similarity(*(torch.from_numpy(one.encode(pixels)) for one in (captioner, load("torch-fp32"))))
    assert float(similarity.min()) > 0.99


def test_engines_give_the_same_captions(load: Callable[..., Captioner]) -> None:
    """The same words and, to 1e-3, the same likelihoods: encoder and search by two libraries."""
    answers = []
    for name in ("torch-fp32", "openvino-fp32"):
        captioner = load(name)
        images = [captioner.prepare(path.read_bytes()) for path in SAMPLES]
        found = captioner.caption(images, [parse_parameters({}, captioner.config)] * len(images))
        answers.append([(c.caption, c.log_likelihood) for image in found for c in image.captions])
    for (one, likelihood), (other, close) in zip(*answers, strict=True):
        assert one == other
        assert likelihood == pytest.approx(close, abs=1e-2)


def test_features_of_one_call_outlive_the_next(load: Callable[..., Captioner], pixels: np.ndarray) -> None:
    """OpenVINO writes every result to the same place."""
    captioner = load("openvino-fp32")
    first = captioner.encode(pixels[:1])
    before = first.copy()
    captioner.encode(pixels[1:2])
    assert np.array_equal(first, before)


def test_auto_takes_openvino_where_the_archive_has_it(load: Callable[..., Captioner]) -> None:
    assert load().engine.name in ("openvino-bf16", "openvino-fp32")


def test_the_environment_overrides_the_archive(load: Callable[..., Captioner]) -> None:
    assert load("auto", CAPTION_ENGINE="torch-fp32").engine.name == "torch-fp32"
    with pytest.raises(ValueError, match="engine"):
        load("auto", CAPTION_ENGINE="faster")


def test_without_the_package_torch_serves_and_the_log_says_so(
    load: Callable[..., Captioner], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(handler.engine.importlib.util, "find_spec", lambda _name: None)
    with caplog.at_level(logging.INFO, logger="handler.engine"):
        assert isinstance(load("openvino-fp32").engine, TorchEngine)
    (record,) = [r for r in caplog.records if "not openvino-fp32" in r.message]
    assert record.levelno == logging.WARNING
    assert "not installed" in record.message


def test_a_cpu_without_the_instructions_falls_back(
    load: Callable[..., Captioner], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("handler.openvino_engine.has_bfloat16", lambda: False)
    monkeypatch.setattr(handler.engine, "cpu_flags", set)
    with caplog.at_level(logging.INFO, logger="handler.engine"):
        assert load("openvino-bf16").engine.name == "openvino-fp32"
    assert "no instructions for bfloat16" in caplog.text


def test_an_archive_without_an_export_is_served_by_torch(load: Callable[..., Captioner], tmp_path: Path) -> None:
    assert load(exported=tmp_path).engine.name.startswith("torch")


def test_an_export_of_another_encoder_is_not_used(load: Callable[..., Captioner], exported: Path, tmp_path: Path) -> None:
    other = shutil.copytree(exported, tmp_path / "engine")
    manifest = other / "float/engine.json"
    text = manifest.read_text()
    digest = text.partition('"encoder_sha256": "')[2].partition('"')[0]
    manifest.write_text(text.replace(digest, "0" * 64))
    assert load(exported=other).engine.name.startswith("torch")


def test_a_damaged_export_is_refused(load: Callable[..., Captioner], exported: Path, tmp_path: Path) -> None:
    """A model with other weights would answer nonsense."""
    other = shutil.copytree(exported, tmp_path / "engine")
    with open(other / "float/encoder.bin", "r+b") as file:
        file.write(b"damaged")
    with pytest.raises(CheckpointError, match="damaged"):
        load(exported=other)


@pytest.mark.parametrize("model", ["en", "zh"])
def test_the_embedded_models_are_served_in_int8(model: str, tmp_path: Path) -> None:
    """After a change of the encoder, `scripts.quantize` has to be run again; what it left before is not used."""
    checkpoint = ROOT / "weights" / model
    export(checkpoint, tmp_path)
    served = load_captioner(checkpoint, tmp_path, ServingConfig(threads=2), environment={})
    if not handler.engine.INT8_FLAGS & cpu_flags():
        assert served.engine.name == "openvino-fp32"
        pytest.skip("this CPU has no instructions for int8")
    assert served.engine.name == "openvino-int8"
    pixels = [served.prepare(path.read_bytes()).pixels for path in SAMPLES]
    expected = Captioner(load_checkpoint(checkpoint)).encode(pixels)
    centre = expected.mean(0)
    error = np.linalg.norm(served.encode(pixels) - expected) / np.linalg.norm(expected - centre)
    assert float(error) < 0.15  # of what tells the photos apart; rounding each weight makes it 0.8
    # The loop's nodes cannot be seen, but what is before it: the same product for the image as for each step.
    graph = cast(Any, served.searcher)._request.get_compiled_model().get_runtime_model()
    nodes = [{name: value.astype(str) for name, value in node.get_rt_info().items()} for node in graph.get_ordered_ops()]
    products = [node["runtimePrecision"] for node in nodes if node["layerType"] == "FullyConnected"]
    assert products.count("i8") == 1  # or OpenVINO rounds and then multiplies floats, slower than without


def test_where_openvino_serves_torch_is_not_imported(saved: Path, exported: Path) -> None:
    """A cold start reads and imports only what serves. A process that ends early waits for the second copy of the encoder."""
    import subprocess
    import sys

    program = """
import sys, pathlib
from handler.captioner import load_captioner
from handler.config import ServingConfig
captioner = load_captioner(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), ServingConfig())
captioner.warm_up()
print(sorted(name for name in ("torch", "torchvision", "scipy", "matplotlib") if name in sys.modules))
"""
    environment = os.environ | {"CAPTION_THREADS": "1", "CAPTION_THREADS_ALONE": "2"}
    command = [sys.executable, "-c", program, str(saved), str(exported)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_flags_are_the_cpus_own() -> None:
    assert all(flag == flag.strip() and flag for flag in cpu_flags())
