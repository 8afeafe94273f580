"""The cache gives what the encoder gives, in the order asked for, and takes up an interrupted extraction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import scripts.features as features
from handler.captioner import Captioner
from handler.checkpoint import Checkpoint
from handler.config import ImageLimits, PreprocessingConfig
from handler.image import decode
from scripts.features import RESAVED, FeatureCache, Photos, augmented, cached_features, saved_once_more
from scripts.toy_dataset import make
from tests.conftest import SAMPLES

SIZE = PreprocessingConfig(size=64)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("toy")
    make(folder, photos=7)
    return sorted((folder / "photos").iterdir())


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "SHARD", 3)


def extract(cache: Path, checkpoint: Checkpoint, photos: list[Path], view: int = 0, digest: str = "e") -> FeatureCache:
    return cached_features(cache, checkpoint.encoder, SIZE, photos, encoder_digest=digest, view=view)


def test_features_are_those_that_are_served(
    tmp_path: Path, checkpoint: Checkpoint, captioner: Captioner, photos: list[Path]
) -> None:
    served = torch.from_numpy(captioner.encode([captioner.prepare(path.read_bytes()).pixels for path in photos]))
    rows = torch.tensor([6, 0, 3, 3])
    cached = extract(tmp_path, checkpoint, photos)[rows]
    # bf16 has three digits
    assert torch.nn.functional.cosine_similarity(cached, served[rows]).min() > 0.999
    assert (cached - served[rows]).abs().max() < 0.05 * served.abs().max()


def test_nothing_is_computed_twice(
    tmp_path: Path, checkpoint: Checkpoint, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = extract(tmp_path, checkpoint, photos)
    shards = sorted(tmp_path.rglob("shard-*.npy"))
    assert len(shards) == 3
    shards[1].unlink()
    seen: list[int] = []
    plain = features.encode

    def counting(encoder: object, images: torch.Tensor, config: object) -> torch.Tensor:
        seen.append(len(images))
        return plain(encoder, images, config)  # type: ignore[arg-type]

    monkeypatch.setattr(features, "encode", counting)
    again = extract(tmp_path, checkpoint, photos)
    assert sum(seen) == 3  # the one missing shard
    assert torch.equal(first[torch.arange(7)], again[torch.arange(7)])


def test_what_features_depend_on_has_a_cache_of_its_own(tmp_path: Path, checkpoint: Checkpoint, photos: list[Path]) -> None:
    extract(tmp_path, checkpoint, photos)
    extract(tmp_path, checkpoint, photos, view=1)
    extract(tmp_path, checkpoint, photos, digest="another")
    extract(tmp_path, checkpoint, photos[:4])
    assert len(list(tmp_path.iterdir())) == 4


def test_views(photo) -> None:
    assert augmented(photo, "a", 0) is photo
    mirrored = augmented(photo, "a", 1)
    assert mirrored.getpixel((0, 0)) == photo.getpixel((89, 0))
    crop = augmented(photo, "a", 2)
    assert crop.tobytes() == augmented(photo, "a", 2).tobytes() != augmented(photo, "a", 3).tobytes()
    assert 0.5 < crop.width * crop.height / (90 * 60) <= 1


def test_saved_once_more_it_is_the_same_photo_in_other_pixels() -> None:
    again = saved_once_more(SAMPLES[0])
    assert again == saved_once_more(SAMPLES[0]) != SAMPLES[0].read_bytes()
    before, after = (np.asarray(decode(data, ImageLimits()).image, float) for data in (SAMPLES[0].read_bytes(), again))
    assert 0 < np.abs(before - after).mean() < 8
    plain, resaved = (Photos([SAMPLES[0]], SIZE, view)[0].float() for view in (0, RESAVED))
    assert 0 < (plain - resaved).abs().mean() < 8
