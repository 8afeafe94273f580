"""Features of photos in a cache on disk, so that a decoder trains without the encoder: `python -m scripts.features --help`.

    CACHE/KEY/about.json        encoder digest, preprocessing, view, number of photos
    CACHE/KEY/shard-00000.npy   (1024, 2048) float16, memory-mapped when read

KEY depends on everything that the features depend on: the encoder's weights, the preprocessing, the view, the photos.
An interrupted extraction goes on with the first shard that is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from handler.checkpoint import sha256, write_atomically
from handler.config import EncoderConfig, ImageLimits, PreprocessingConfig
from handler.encoder import FEATURE_SIZE, Encoder
from handler.errors import CaptionError
from handler.image import decode, normalize, pixels, smallest_useful_side
from handler.networks import load_weights
from scripts.datasets import add_dataset_arguments, dataset_from

SHARD = 1024
BATCH = 32
RESAVED, MIRRORED = -1, 1
"""The views of a photo that are the photo saved once more, and its mirror image.

View 0 is the photo as it is served; from 2 on views are random crops.
"""


class Photos(torch.utils.data.Dataset[Tensor]):
    """Photo files as one view of them, (3, size, size) uint8."""

    def __init__(self, paths: Sequence[Path], preprocessing: PreprocessingConfig, view: int = 0) -> None:
        self.paths, self.preprocessing, self.view = paths, preprocessing, view

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Tensor:
        path = self.paths[row]
        try:
            content = saved_once_more(path) if self.view == RESAVED else path.read_bytes()
            photo = decode(content, ImageLimits(), smallest_side=smallest_useful_side(self.preprocessing)).image
        except CaptionError as error:
            raise type(error)(f"{path}: {error}") from error
        return pixels(augmented(photo, path.name, self.view), self.preprocessing)


def augmented(photo: Image.Image, name: str, view: int) -> Image.Image:
    """The photo as it is, mirrored, or as a random crop of 60 to 100 % of its area, half of them mirrored.

    The same name and view give the same crop.
    """
    if view in (0, RESAVED):
        return photo
    if view == MIRRORED:
        return ImageOps.mirror(photo)
    chance = random.Random(f"{name} {view}")
    area, ratio = chance.uniform(0.6, 1), chance.uniform(0.8, 1.25)
    width, height = min(1.0, (area * ratio) ** 0.5), min(1.0, (area / ratio) ** 0.5)
    left, top = chance.uniform(0, 1 - width), chance.uniform(0, 1 - height)
    box = (left * photo.width, top * photo.height, (left + width) * photo.width, (top + height) * photo.height)
    photo = photo.crop(tuple(round(side) for side in box))  # type: ignore[arg-type]
    return ImageOps.mirror(photo) if chance.random() < 0.5 else photo


def saved_once_more(path: Path) -> bytes:
    """The photo as a JPEG of a quality from 75 to 95, always the same for its name."""
    chance, file = random.Random(path.name), io.BytesIO()
    photo = decode(path.read_bytes(), ImageLimits()).image
    photo.save(file, "JPEG", quality=chance.randint(75, 95), subsampling=chance.randint(0, 2))
    return file.getvalue()


class FeatureCache:
    """Features (N, 2048) of N photos, memory-mapped; rows in the order of the photos."""

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self.shards = shards

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Row numbers (B,) to features (B, 2048) float32."""
        numbers = rows.numpy()
        found = np.empty((len(numbers), self.shards[0].shape[1]), self.shards[0].dtype)
        for shard in np.unique(numbers // SHARD):
            here = numbers // SHARD == shard
            found[here] = self.shards[shard][numbers[here] % SHARD]
        return torch.from_numpy(found).float()


def cached_features(
    cache: Path,
    encoder: Encoder,
    preprocessing: PreprocessingConfig,
    paths: Sequence[Path],
    *,
    encoder_digest: str,
    view: int = 0,
    workers: int = 0,
    device: str = "cpu",
) -> FeatureCache:
    """Read the features of `paths` from the cache, after extracting those that are missing.

    encoder_digest: SHA-256 of the encoder's weight file.
    """
    folder = cache / _key(encoder, preprocessing, paths, encoder_digest, view)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"encoder": encoder_digest, "preprocessing": preprocessing.model_dump(), "view": view, "photos": len(paths)}
    write_atomically(folder / "about.json", lambda part: part.write_text(json.dumps(about, indent=2)))
    shards = [folder / f"shard-{start // SHARD:05d}.npy" for start in range(0, len(paths), SHARD)]
    encoder = encoder.to(device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    missing = sum(not shard.exists() for shard in shards)
    with tqdm(total=len(paths), desc=f"features, view {view}", unit="photo", disable=not missing) as bar:
        for number, shard in enumerate(shards):
            part_paths = paths[number * SHARD : (number + 1) * SHARD]
            if shard.exists():
                bar.update(len(part_paths))
                continue
            extracted = []
            photos = Photos(part_paths, preprocessing, view)
            for batch in torch.utils.data.DataLoader(photos, BATCH, num_workers=workers):
                with torch.inference_mode():
                    extracted.append(encode(encoder, batch.to(device), preprocessing).cpu().half().numpy())
                bar.update(len(batch))
            features = np.concatenate(extracted)
            write_atomically(shard, lambda part, features=features: _save(part, features))  # type: ignore[misc]
    return FeatureCache([np.load(shard, mmap_mode="r") for shard in shards])


def encode(encoder: Encoder, images: Tensor, preprocessing: PreprocessingConfig) -> Tensor:
    """Pixels (B, 3, size, size) uint8 to features (B, 2048), computed in bf16, which is twice as fast and as good here."""
    images = normalize(images, preprocessing).contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, dtype=torch.bfloat16):
        return encoder.feature_map(images).float().mean((2, 3))


def load_encoder(path: Path, config: EncoderConfig | None = None) -> tuple[Encoder, str]:
    """An encoder from a safetensors file, and the file's SHA-256. Raises CheckpointError."""
    with torch.device("meta"):
        encoder = Encoder(config or EncoderConfig())
    load_weights(encoder, path)
    return encoder.eval(), sha256(path)


def default_workers() -> int:
    """Processes that decode photos beside the one that encodes them."""
    return min(8, (os.cpu_count() or 1) // 4)


def _key(encoder: Encoder, preprocessing: PreprocessingConfig, paths: Sequence[Path], encoder_digest: str, view: int) -> str:
    digest = hashlib.sha256(f"{encoder_digest} {encoder.config} {preprocessing.model_dump_json()} {view}\n".encode())
    for path in paths:
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return f"{digest.hexdigest()[:16]}-view{view}"


def _save(path: Path, features: np.ndarray) -> None:
    with open(path, "wb") as file:  # np.save would add a suffix to a path
        np.save(file, features)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_dataset_arguments(parser)
    parser.add_argument("--cache", type=Path, default=Path("runs/features"), help="folder of the cache")
    parser.add_argument("--encoder", type=Path, required=True, help="encoder weights, safetensors")
    parser.add_argument("--size", type=int, default=PreprocessingConfig().size, help="side of the square input in pixels")
    parser.add_argument("--views", type=int, default=2, help="1: the photos; 2: and mirrored; more: and random crops")
    parser.add_argument("--workers", type=int, default=default_workers())
    arguments = parser.parse_args()
    try:
        examples = dataset_from(arguments)
        encoder, digest = load_encoder(arguments.encoder)
    except CaptionError as error:
        parser.error(str(error))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for split in sorted({e.split for e in examples}):
        paths = [e.path for e in examples if e.split == split]
        for view in range(arguments.views if split == "train" else 1):
            cached_features(
                arguments.cache,
                encoder,
                PreprocessingConfig(size=arguments.size),
                paths,
                encoder_digest=digest,
                view=view,
                workers=arguments.workers,
                device=device,
            )
    print(f"features of {len(examples)} photos, {FEATURE_SIZE} each: {arguments.cache}")


if __name__ == "__main__":
    main()
