"""From the bytes of an image file to the encoder's input.

`decode` judges the file and gives an upright RGB photo, `pixels` brings it to the model's size, `normalize` to the
model's numbers. Training, evaluation, the command line and the server all come through here.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from handler.config import PreprocessingConfig
from handler.decoding import FORMATS, Photo, decode, fitted, smallest_useful_side

__all__ = ["FORMATS", "Photo", "decode", "mean_and_std", "normalize", "pixels", "smallest_useful_side"]


def pixels(photo: Image.Image, config: PreprocessingConfig) -> Tensor:
    """An RGB photo to uint8 pixels (3, size, size), RGB, as `config.fit` and `config.interpolation` say."""
    return torch.tensor(fitted(photo, config)).permute(2, 0, 1)


def normalize(images: Tensor, config: PreprocessingConfig, constants: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Pixels (B, 3, H, W) in 0..255, RGB, any dtype, to the encoder's float32 input (B, 3, H, W).

    constants: `mean_and_std`, for who cannot make them anew each time.
    """
    if config.channel_order == "BGR":
        images = images.flip(1)
    mean, std = constants or mean_and_std(config, images.device)
    return (images * config.scale - mean) / std


def mean_and_std(config: PreprocessingConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """(1, 3, 1, 1) each."""
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (config.mean, config.std))
    return mean, std
