"""On a GPU: captions as on a CPU, graphs that compute what was recorded, and a server whose workers use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
import yaml

from handler.beam_search import Search, search
from handler.captioner import Captioner, load_captioner
from handler.checkpoint import load_checkpoint
from handler.config import EngineName, ServingConfig
from handler.expansion import fold
from handler.networks import load_encoder, weights_of
from handler.parameters import parse_parameters
from handler.torch_engine import TorchEngine
from handler.torch_expansion import TorchExpander
from scripts.package_mar import package
from scripts.server import TorchServe, free_settings
from tests.conftest import ROOT, SAMPLES
from tests.test_beam_search import END, FORBIDDEN, START, random_decoder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

MODEL = ROOT / "weights/en"


@pytest.fixture(scope="module")
def nothing_exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


def on_gpu(engine: EngineName, nothing_exported: Path) -> Captioner:
    return load_captioner(MODEL, nothing_exported, ServingConfig(engine=engine), device="cuda:0", environment={})


def test_captions_in_fp32_are_those_of_the_cpu(nothing_exported: Path) -> None:
    gpu, cpu = on_gpu("torch-fp32", nothing_exported), Captioner(load_checkpoint(MODEL))
    images = [cpu.prepare(path.read_bytes()) for path in SAMPLES]
    wanted = [parse_parameters({}, cpu.config)] * len(images)
    for one, other in zip(cpu.caption(images, wanted), gpu.caption(images, wanted), strict=True):
        assert [c.caption for c in one.captions] == [c.caption for c in other.captions]
        for c, d in zip(one.captions, other.captions, strict=True):
            assert c.log_likelihood == pytest.approx(d.log_likelihood, abs=1e-3)


def test_half_precision_is_the_default_and_close(nothing_exported: Path) -> None:
    captioner = on_gpu("auto", nothing_exported)
    assert captioner.engine.name == "torch-fp16"
    pixels = [captioner.prepare(path.read_bytes()).pixels for path in SAMPLES]
    expected = Captioner(load_checkpoint(MODEL)).encode(pixels)
    assert float(torch.cosine_similarity(*map(torch.from_numpy, (captioner.encode(pixels), expected))).min()) > 0.999


def test_a_graph_computes_what_was_recorded_for_every_number_of_images(nothing_exported: Path) -> None:
    recorded = on_gpu("torch-fp32", nothing_exported).engine
    config = load_checkpoint(MODEL, with_encoder=False).config.preprocessing
    plain = TorchEngine(load_encoder(MODEL), config, name="torch-fp32", device="cuda:0")
    pixels = np.random.default_rng(0).integers(0, 256, (37, 3, config.size, config.size), np.uint8)
    for count in (1, 2, 3, 7, 8, 15, 16, 17, 37):
        np.testing.assert_allclose(recorded.encode(pixels[:count]), plain.encode(pixels[:count]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("images", [1, 3, 8, 40])
def test_the_recorded_search_finds_what_the_plain_one_does(images: int) -> None:
    from handler.cuda_graphs import RecordedExpander

    folded = fold(weights_of(random_decoder(5, hidden=16, vocabulary=40)), FORBIDDEN)
    features = np.random.default_rng(images).standard_normal((images, 6), np.float32)
    wanted = [Search(START, 1 + number % 10, 12, 0.75) for number in range(images)]
    plain, recorded = TorchExpander(folded, "cuda"), RecordedExpander(folded, "cuda")
    for _ in range(2):  # the second time, what the first left behind is overwritten
        expected = search(plain, features, wanted, end_token=END)
        found = search(recorded, features, wanted, end_token=END)
        assert [[h.tokens for h in of] for of in found] == [[h.tokens for h in of] for of in expected]


@pytest.mark.server
@pytest.mark.parametrize(
    ("settings", "extra", "gpu"), [({}, {}, True), ({"number_of_gpu": "0"}, {}, False), ({}, {"deviceIds": [0]}, True)]
)
def test_workers_are_given_the_gpu_unless_it_is_switched_off(
    tmp_path: Path, settings: dict[str, str], extra: dict[str, Any], gpu: bool
) -> None:
    config = yaml.safe_load((ROOT / "deploy/torchserve/model-config.yaml").read_text()) | extra
    (tmp_path / "model-config.yaml").write_text(yaml.safe_dump(config))
    package(MODEL, tmp_path / "store/caption.mar", name="caption", model_config=tmp_path / "model-config.yaml")
    with TorchServe(free_settings() | {"model_store": str(tmp_path / "store")} | settings) as server:
        server.wait_until_ready()
        answer = requests.post(f"{server.address('inference')}/predictions/caption", data=SAMPLES[0].read_bytes(), timeout=60)
        (model,) = requests.get(f"{server.address('management')}/models/caption", timeout=10).json()
    assert answer.status_code == 200
    assert all(worker["gpu"] is gpu for worker in model["workers"])
