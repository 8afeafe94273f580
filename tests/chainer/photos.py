"""Photos of many shapes, the same from numpy alone everywhere."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

SIZES = {
    "landscape": (640, 480),  # (width, height); 480 * 224 / 640 is a tie of nearest-neighbour sampling
    "portrait": (333, 500),
    "square": (224, 224),
    "panorama": (1001, 150),
    "tiny": (7, 5),
    "pixel_column": (1, 3),
}


def photos() -> dict[str, bytes]:
    """Name to PNG file, which is lossless: every decoder gives the same pixels."""
    return {name: _png(photo(number, *size)) for number, (name, size) in enumerate(SIZES.items())}


def photo(seed: int, width: int, height: int) -> np.ndarray:
    """Coloured waves, edges and noise (height, width, 3), uint8."""
    random = np.random.RandomState(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    image = np.zeros((height, width, 3))
    for _ in range(6):
        direction, frequency, phase = random.uniform(0, np.pi), random.uniform(2, 60), random.uniform(0, 2 * np.pi)
        wave = np.sin(frequency * (x * np.cos(direction) + y * np.sin(direction)) + phase)
        if random.uniform() < 0.5:
            wave = np.sign(wave)
        image += wave[..., None] * random.uniform(-1, 1, 3)
    image = 128 + 40 * image + random.uniform(-60, 60, 3) + random.standard_normal(image.shape) * 8
    return image.clip(0, 255).round().astype(np.uint8)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
