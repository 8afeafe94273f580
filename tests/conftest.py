"""Small models and images that several tests share."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image
from safetensors.torch import save_file

from handler.captioner import Captioner
from handler.checkpoint import Checkpoint
from handler.config import DecoderConfig, ModelConfig, PreprocessingConfig
from handler.decoder import Decoder
from handler.encoder import Encoder
from handler.networks import weights_of
from handler.torchvision_models import models
from handler.vocabulary import Vocabulary
from scripts.edge import Edge, EdgeError
from scripts.server import TorchServe, free_settings
from scripts.teachers import CLASSES

# A busy machine is slow, which is no failure of what is tested.
settings.register_profile("any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = sorted((ROOT / "samples").glob("*.jpg"))


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return Vocabulary.build([["a", "dog", "runs", "on", "grass", "the", "cat", "sits"]] * 2, min_count=1)


@pytest.fixture(scope="session")
def checkpoint(vocabulary: Vocabulary) -> Checkpoint:
    """A whole model with random weights, a small decoder and a small input."""
    torch.manual_seed(0)
    config = ModelConfig(
        preprocessing=PreprocessingConfig(size=64),
        decoder=DecoderConfig(vocabulary_size=len(vocabulary), embedding_size=16, hidden_size=16),
    )
    encoder, decoder = Encoder(config.encoder).eval(), Decoder(config.decoder).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(8)  # so that features and words matter
    return Checkpoint(config, vocabulary, encoder, weights_of(decoder), "sha256:test")


@pytest.fixture(scope="session")
def captioner(checkpoint: Checkpoint) -> Captioner:
    return Captioner(checkpoint)


@pytest.fixture
def photo() -> Image.Image:
    """A picture with a different colour in each corner, wider than high."""
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[:30, :45], pixels[:30, 45:] = (200, 30, 30), (30, 200, 30)
    pixels[30:, :45], pixels[30:, 45:] = (30, 30, 200), (200, 200, 30)
    return Image.fromarray(pixels)


@pytest.fixture
def encoded(photo: Image.Image) -> Callable[..., bytes]:
    """The photo, or another image, as the bytes of a file."""

    def save(file_format: str = "JPEG", image: Image.Image = photo, **options: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, file_format, **options)
        return buffer.getvalue()

    return save


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint converted from the chainer-caption model of one of tests/chainer/golden's cases."""
    from scripts.convert_chainer import convert
    from tests.chainer.golden import GOLDEN, read
    from tests.chainer.models import write_models

    @functools.cache
    def checkpoint_of(name: str) -> Path:
        answers = read(GOLDEN / name)
        folder = tmp_path_factory.mktemp(name)
        files = write_models(folder, answers.vocabulary, hidden=answers.case["hidden"], seed=answers.case["seed"])
        convert(files.cnn, files.rnn, files.vocabulary, folder / "checkpoint")
        return folder / "checkpoint"

    return checkpoint_of


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    """The service as a real process with the embedded model, on ports of its own."""
    from scripts.package_mar import package

    store = tmp_path_factory.mktemp("model_store")
    package(
        ROOT / "weights/en", store / "caption.mar", name="caption", model_config=ROOT / "deploy/torchserve/model-config.yaml"
    )
    with TorchServe(free_settings() | {"model_store": str(store)}) as running:
        running.wait_until_ready()
        yield running


def missing(what: str) -> NoReturn:
    """Skip the test on a machine that cannot run it; fail in CI, where scripts/setup installs everything."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(what)
    raise AssertionError  # neither returns


@contextlib.contextmanager
def running_edge(settings: dict[str, str]) -> Iterator[Edge]:
    """An edge on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        edge = Edge({"EDGE_LISTEN": f"127.0.0.1:{probe.getsockname()[1]}"} | settings)
    try:
        edge.start()
    except EdgeError as error:
        if "missing" not in str(error):
            raise
        missing(str(error))
    try:
        yield edge
    finally:
        edge.stop()


@pytest.fixture(scope="session")
def edge(server: TorchServe) -> Iterator[Edge]:
    """The edge in front of `server`, with no rate limit that a test would meet."""
    upstream = server.address("inference").removeprefix("http://")
    with running_edge({"EDGE_UPSTREAM": upstream, "EDGE_RATE": "1000r/s", "EDGE_BURST": "1000"}) as running:
        yield running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What fails fast is to fail first: tests without a server, then those with one, then the slow ones.

    Those with real processes get a second try, which the summary shows: a machine busy with something else delays them.
    """
    for item in items:
        if item.get_closest_marker("server") or item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.flaky(reruns=1))
    items.sort(key=lambda item: (item.get_closest_marker("slow") is not None, item.get_closest_marker("server") is not None))


@pytest.fixture(scope="session")
def mobilenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a MobileNetV2 that has learned nothing."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "mobilenet.safetensors"
    weights = models.mobilenet_v2(num_classes=CLASSES).state_dict()
    save_file({name: value.half() for name, value in weights.items() if value.is_floating_point()}, path)
    return path
