"""ImageNet weights of torchvision for the encoder."""

from __future__ import annotations

import urllib.error
from pathlib import Path

import torch

from handler.checkpoint import write_safetensors
from handler.errors import CaptionError
from handler.torchvision_models import models

TORCHVISION_WEIGHTS = {
    "imagenet-v1": models.ResNet50_Weights.IMAGENET1K_V1,
    "imagenet-v2": models.ResNet50_Weights.IMAGENET1K_V2,
}


class DownloadError(CaptionError):
    """Weights can neither be found in the cache nor downloaded."""


def torchvision_encoder(name: str, path: Path) -> Path:
    """Write the encoder of torchvision's weights `name` to `path` as safetensors, unless it is there. Gives `path`.

    They come through torch.hub's cache, are downloaded into it when missing, and checked by the hash in their file name.

    Raises DownloadError.
    """
    if path.exists():
        return path
    weights = TORCHVISION_WEIGHTS[name]
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        state = weights.get_state_dict(progress=True, check_hash=True)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise DownloadError(
            f"{weights.url} cannot be had: {error}. Without a connection, download it elsewhere and put it into {folder}"
        ) from error
    write_safetensors(path, {key: value for key, value in state.items() if not key.startswith("fc.")}, half=True)
    return path
