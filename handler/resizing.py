"""An RGB photo at another size, as Pillow makes it, but bilinear in a fifth of the time.

That is what a JPEG of a quarter of a megapixel spends most of its preprocessing on. The library that is faster
(https://github.com/Cykooz/cykooz.resizer) has no wheel for Linux on Arm, where Pillow does all. The two differ by one of
256 levels at most; with the filters that overshoot it would be more, so those are Pillow's everywhere.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

try:
    import cykooz_resizer
except ImportError:
    cykooz_resizer = None

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def resized(photo: Image.Image, width: int, height: int, interpolation: str) -> np.ndarray:
    """Pixels (height, width, 3), uint8, read-only. Where a photo becomes smaller, bilinear and bicubic average."""
    if interpolation == "bilinear" and cykooz_resizer is not None:
        return _bilinear(photo, width, height)
    return np.asarray(photo.resize((width, height), _RESAMPLING[interpolation]))


def _bilinear(photo: Image.Image, width: int, height: int) -> np.ndarray:
    # Not `resize_pil`, which needs no copy but reads the structs of Pillow's C code, whatever version they are of.
    rgb = cykooz_resizer.PixelType.U8x3
    source = cykooz_resizer.ImageData(photo.width, photo.height, rgb, photo.tobytes())
    target = cykooz_resizer.ImageData(width, height, rgb)
    convolution = cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType.bilinear)
    cykooz_resizer.Resizer().resize(source, target, cykooz_resizer.ResizeOptions(resize_alg=convolution))
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(height, width, 3)
